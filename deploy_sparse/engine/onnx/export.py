"""From a module to an ONNX file that computes the same function, with the same bytes every time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import onnx
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...artifact import temporary_name, write_bytes, write_json, writing
from ...errors import ArtifactError, DeploySparseError, ExportError
from ...exporting import eval_mode, frozen, quiet
from ..parity import check_parity, tensors_of, with_batch
from .external import move_out_
from .file import OnnxFile, describe_graph, parse_graph, sidecar_path
from .lookups import lookups_last

OPSET = 20
SIZE_LIMIT = 2_000_000_000
"""Bytes of weights that one file may hold: protobuf ends at 2 GiB and the graph needs some room of its own."""
BATCH_AXIS = "batch"


def export_onnx(
    module: nn.Module | Any,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    path: str | Path,
) -> OnnxFile:
    """Export a module in eval mode, check it against the module, and write ``path`` with its sidecar.

    Axis 0 of every input becomes the dynamic batch axis. Inputs are called ``input`` (``input_0``, ``input_1``… when
    there are several), outputs ``output`` (``output_0``…). The module is left as it was. The same weights give the
    same bytes; the file names no path of the exporting machine. Weights above ``SIZE_LIMIT`` go into a second file
    beside it, ``<name>.onnx.data``, which the first one names.

    Args:
        module: a module, or an object whose ``module`` attribute is one.
        example_inputs: one tensor, or one per argument of ``forward``; axis 0 is the batch.
        path: where to write; a file that is there is replaced only when everything succeeded.

    Raises:
        ExportError: the module cannot be exported, or the graph computes something else.
        ArtifactError: the folder cannot be written.
    """
    network = as_module(module)
    if not isinstance(path, str | Path):
        raise ExportError(
            f"the path is of type {type(path).__name__}",
            expected="where to write the ONNX file",
            fix="give for example 'model.onnx'",
        )
    inputs = checked_inputs(network, example_inputs)
    path = Path(path)
    with eval_mode(network), _scratch(path, _size(network) > SIZE_LIMIT) as scratch:
        model = _graph_of(network, with_batch(inputs, max(2, inputs[0].shape[0])))
        data = _serialized(model, path, scratch)
        parsed = _checked(scratch or path, data)
        described = describe_graph(scratch or path, data, parsed)
        for spec in described.inputs:
            if not spec.batched:
                raise ExportError(
                    f"{spec} lost its batch axis: the module computes with one fixed batch size",
                    expected="a forward that works at any batch size",
                    fix="take the batch size from the input's shape, never as a constant",
                )
        batches = tuple(dict.fromkeys((inputs[0].shape[0], 1, 3)))
        folder = scratch.parent if scratch else None
        parity = check_parity(network, data, inputs, described.inputs, batches, folder=folder)
        found = replace(
            described,
            path=path,
            parameters=sum(p.numel() for p in network.parameters()),
            macs=macs_of(network, inputs),
            parity=parity,
        )
        _write(found, data, scratch)
    return found


def as_module(subject: nn.Module | Any) -> nn.Module:
    """The module itself, or the one in ``subject.module``.

    Raises:
        ExportError: neither.
    """
    for candidate in (subject, getattr(subject, "module", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise ExportError(
        f"a {type(subject).__name__} was given",
        expected="an nn.Module, or an object with one in its attribute 'module'",
        fix="pass the network itself; of a ticket: deploy_sparse.compact(ticket) first; of a state dict: construct the "
        "network and load it first",
    )


def checked_inputs(network: nn.Module, given: Any) -> tuple[torch.Tensor, ...]:
    """Example inputs as a tuple, on the network's device.

    Raises:
        ExportError: no tensors, or without one batch size on axis 0.
    """
    inputs = tuple(given) if isinstance(given, tuple | list) else () if given is None else (given,)
    if not inputs or not all(isinstance(tensor, torch.Tensor) for tensor in inputs):
        kinds = ", ".join(type(tensor).__name__ for tensor in inputs) or "nothing"
        raise ExportError(
            f"example_inputs holds {kinds}",
            expected="a tensor, or a tuple of tensors, one per argument of forward",
            fix="pass for example torch.randn(2, 3, 32, 32)",
        )
    batches = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs}
    if len(batches) > 1 or batches == {0}:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ExportError(
            f"example inputs have shapes {shapes}",
            expected="one batch size of at least 1 on axis 0 of every input",
            fix="add the batch axis: tensor[None]",
        )
    devices = [tensor.device for tensor in (*network.parameters(), *network.buffers())]
    return tuple(tensor.to(devices[0]) if devices else tensor for tensor in inputs)


def _size(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


@contextmanager
def _scratch(path: Path, needed: bool) -> Iterator[Path | None]:
    """The file's place in a temporary folder beside it, from which files get to their own by renaming alone."""
    if not needed:
        yield None
        return
    folder = temporary_name(path)
    with writing(path):
        folder.mkdir(parents=True)
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serialized(model: onnx.ModelProto, path: Path, scratch: Path | None) -> bytes:
    """The model's bytes; where it has a scratch file they are in that too, and its weights in one beside it."""
    data: bytes
    if scratch is None:
        data = model.SerializeToString(deterministic=True)
        return data
    with writing(path):
        move_out_(model, scratch.with_name(f"{path.name}.data"))
        data = model.SerializeToString(deterministic=True)
        scratch.write_bytes(data)
    return data


def _graph_of(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """Trace with a symbolic batch and convert; ``inputs`` has at least two rows, one would be taken for a constant."""
    names = ["input"] if len(inputs) == 1 else [f"input_{index}" for index in range(len(inputs))]
    axis, shapes = torch.export.Dim(BATCH_AXIS), cast(Any, torch.export.ShapesCollection)()
    for tensor in inputs:
        shapes[tensor] = {0: axis}  # by tensor, not by argument: forward may take *args
    with quiet():
        try:
            with torch.no_grad():
                count = len(tensors_of(_outputs(network, inputs)))
                program = torch.export.export(network, inputs, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=names,
                output_names=["output"] if count == 1 else [f"output_{index}" for index in range(count)],
                verbose=False,
            )
        except DeploySparseError:
            raise
        except Exception as problem:
            raise _unexportable(network, problem) from problem
    if exported is None:
        raise _unexportable(network, RuntimeError("the exporter returned nothing"))
    return lookups_last(_plain(exported.model_proto))


def _outputs(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """What the module returns. Where it fails, but not on inputs of its weights' type, the types are the reason."""
    try:
        return network(*inputs)
    except Exception:
        weights = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
        others = {f"example input {i}": x.dtype for i, x in enumerate(inputs) if x.dtype != weights}
        if weights is None or not others:
            raise
        try:
            network(*(tensor.to(weights) for tensor in inputs))
        except Exception:
            others = {}
        if not others:
            raise
        raise ExportError(
            f"{', '.join(f'{name} is {dtype}' for name, dtype in others.items())}; the weights are {weights}",
            expected="example inputs of the type that the network computes with",
            fix="convert the example inputs: tensor.float()"
            + ("" if weights == torch.float32 else "; and the network: module.float()"),
        ) from None


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without traces, doc strings and metadata (they hold paths); the batch axis named, einsums in small letters."""
    graph = model.graph
    carriers: list[Any] = [
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ]
    for function in model.functions:
        carriers += [function, *function.node]
    for carrier in carriers:
        carrier.ClearField("metadata_props")
        carrier.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Einsum" and attribute.name == "equation":
                attribute.s = _in_small_letters(attribute.s.decode()).encode()
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    if symbol:
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH_AXIS, dim.dim_param)
    return model


def _in_small_letters(equation: str) -> str:
    """The same einsum: TensorRT takes no capitals."""
    letters = list(dict.fromkeys(filter(str.isalpha, equation)))
    if not any(map(str.isupper, letters)) or len(letters) > len(ascii_lowercase):
        return equation
    return equation.translate(str.maketrans("".join(letters), ascii_lowercase[: len(letters)]))


def _checked(path: Path, data: bytes) -> onnx.ModelProto:
    try:
        return parse_graph(path, data)
    except DeploySparseError as problem:
        raise ExportError(
            f"the exporter wrote an invalid graph: {problem.given}",
            expected="a graph that ONNX's checker accepts",
            fix="replace the layer it names; report the network with this message",
        ) from problem


def macs_of(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of one sample: convolutions and matrix products, as PyTorch's own counter sees them."""
    with torch.no_grad(), frozen(network), FlopCounterMode(display=False) as counter:
        network(*with_batch(inputs, 1))
    return int(counter.get_total_flops()) // 2


def _unexportable(network: nn.Module, problem: BaseException) -> ExportError:
    root = problem
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()] or [type(root).__name__]
    fixed = re.search(r"your code specialized it to be a constant \((\d+)\)", str(root))
    reason = f"it computes with one fixed batch size ({fixed[1]})" if fixed else re.sub(r"\x1b\[[0-9;]*m", "", lines[0])
    return ExportError(
        f"{type(network).__name__} cannot be exported: {reason[:300]}",
        expected="a forward without branches on tensor values or a fixed batch size, of operators ONNX has",
        fix="rewrite that part of forward; torch.export.export(module, inputs) shows the same error in full",
    )


def _write(found: OnnxFile, data: bytes, scratch: Path | None) -> None:
    sidecar = sidecar_path(found.path)
    try:
        sidecar.unlink(missing_ok=True)  # a stale one would condemn the new file
        if scratch is not None:
            found.path.unlink(missing_ok=True)  # never beside weights that are not its own
            for file in found.weights:
                os.replace(scratch.with_name(file.name), found.path.with_name(file.name))
    except OSError as problem:
        raise ArtifactError(
            f"{problem.filename or sidecar} cannot be replaced ({problem.strerror})",
            expected="a folder this user may write to",
            fix="choose another output path",
        ) from problem
    write_bytes(found.path, data)
    write_json(sidecar, found.sidecar())
