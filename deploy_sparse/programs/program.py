"""A network as the bytes of a ``.pt2`` file, the ``torch.export`` form, which loads without any model code.

A ``.pt2`` file is an archive of raw weights and a graph of operators in JSON. PyTorch's own loader unpickles parts of
such a file and evaluates texts in it; files written here hold neither, and :mod:`.vetting` refuses any other.
"""

from __future__ import annotations

import contextlib
import copy
import io
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..errors import ArtifactError, ExportError
from ..exporting import eval_mode, quiet
from .vetting import objection, vet

_BATCHES = (1, 3)
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest accepted ``max|Δ| / max|y|``; the machine precision of the type for others."""


def program_bytes(
    module: nn.Module, inputs: tuple[Any, ...], *, otherwise: str, tolerance: float | None = None, called: str = ""
) -> bytes:
    """The content of a ``.pt2`` file of ``module`` in evaluation mode, checked against the module.

    Axis 0 of every input with as many entries as the first one's becomes a free batch axis where the network allows
    that; all other sizes are those of the inputs. The same weights give the same bytes, which name no path of this
    machine. What is handed out was loaded again and compared with the module on the inputs and at other batch sizes.

    Args:
        module: the network, on any device; the file is for the CPU. It is not changed.
        inputs: positional, each tensor with a batch axis.
        otherwise: what to do where that fails, for messages.
        tolerance: largest accepted ``max|Δ| / max|y|``; by the type of the output unless given.
        called: what the module is called in messages; its class unless given.

    Raises:
        ExportError: ``torch.export`` does not take the network, it uses operators that are not PyTorch's own, returns
            other containers than lists, tuples and dictionaries, or the program computes something else.
    """
    network, inputs = _on_cpu(module), pytree.tree_map(_cpu, inputs)
    with eval_mode(network):
        try:
            program, batched = _exported(network, inputs)
            data = _written(program)
            if (found := objection(data)) is not None:
                raise _Refusal(f"its program needs {found}, which does not load without the network's code")
            loaded = load_bytes(data, "the program", remake=otherwise)
            _compare(network, loaded, inputs, _BATCHES if batched else (), tolerance)
        except _Refusal as problem:
            raise ExportError(
                f"{called or type(module).__name__} has no torch.export form: {str(problem)[:300]}",
                expected="a forward of PyTorch's own operators, without branches on tensor values",
                fix=otherwise,
            ) from problem.__cause__
    return data


def read_bytes(data: bytes, name: str, *, remake: str) -> ExportedProgram:
    """The program in the content of a ``.pt2`` file, on the CPU.

    Args:
        data: the content.
        name: of the file, for messages.
        remake: how such a file is made, for messages.

    Raises:
        ArtifactError: damaged, or anything but a program of tensors and PyTorch's own operators.
    """
    vet(data, name, remake=remake)
    try:
        with quiet():
            return torch.export.load(io.BytesIO(data))
    except Exception as problem:
        raise _not_loaded(problem, name, remake) from problem


def load_bytes(data: bytes, name: str, *, remake: str) -> nn.Module:
    """The network in the content of a ``.pt2`` file; arguments and errors as for :func:`read_bytes`."""
    program = read_bytes(data, name, remake=remake)
    try:
        with quiet():
            module = program.module()
    except Exception as problem:
        raise _not_loaded(problem, name, remake) from problem
    return _always_evaluating(module)


def user_shapes(program: ExportedProgram) -> list[tuple[int | torch.SymInt, ...]]:
    """The shape of every input tensor; sizes that are free are symbols."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


class _Refusal(Exception):
    """Why a network has no such form, in words."""


def _not_loaded(problem: Exception, name: str, remake: str) -> ArtifactError:
    # The deserializer raises whatever its own steps do; the file is consistent, so its torch version is the reason.
    return ArtifactError(
        f"{name} does not load with torch {torch.__version__} ({_first_line(problem)})",
        expected="a program written with this or an older version of torch",
        fix=f"update torch, or make it again: {remake}",
    )


def _exported(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[ExportedProgram, bool]:
    """The program, and whether its batch axis is free."""
    with quiet(), torch.no_grad():
        doubled = _with_batch(inputs, max(2, _batch(inputs)))  # an axis of one entry would be taken for a constant
        shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor in _batched(doubled):
            shapes[tensor] = {0: Dim.AUTO}
        with contextlib.suppress(Exception):  # the second attempt tells the reason
            program = torch.export.export(network, doubled, dynamic_shapes=shapes, strict=False)
            sizes = [size for axes in user_shapes(program) for size in axes[:1]]
            if any(isinstance(size, torch.SymInt) for size in sizes):
                return program, True
        try:
            return torch.export.export(network, inputs, strict=False), False
        except Exception as problem:
            raise _Refusal(_first_line(problem)) from problem


def _written(program: ExportedProgram) -> bytes:
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:  # stack traces hold paths of this machine
                node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    program.example_inputs = None  # they would be pickled
    program._guards_code = []  # Python source that a loader executes; input shapes are checked without it
    stream = io.BytesIO()
    with quiet():
        torch.export.save(program, stream)
    return stream.getvalue()


def _compare(
    network: nn.Module, loaded: nn.Module, inputs: tuple[Any, ...], batches: tuple[int, ...], tolerance: float | None
) -> None:
    for batch in dict.fromkeys((_batch(inputs), *batches)):
        sample = _with_batch(inputs, batch) if batch else inputs
        try:
            expected = _tensors(network, sample)
        except Exception:
            if batch == _batch(inputs):
                raise
            continue  # the network itself does not take this batch size
        try:
            actual = _tensors(loaded, sample)
        except Exception as problem:
            raise _Refusal(f"the program fails at batch size {batch}: {_first_line(problem)}") from problem
        if [y.shape for y in actual] != [y.shape for y in expected]:
            raise _Refusal(f"the program's outputs have other shapes at batch size {batch}")
        for reference, output in zip(expected, actual, strict=True):
            if bool(((reference == output) | (reference.isnan() & output.isnan())).all()):
                continue  # numbers that overflow do so in both
            largest = float(reference.double().abs().max()) if reference.numel() else 0.0
            error = float((reference.double() - output.double()).abs().max()) if reference.numel() else 0.0
            exact = not reference.dtype.is_floating_point
            usual = 0.0 if exact else _TOLERANCE.get(reference.dtype, torch.finfo(reference.dtype).eps)
            limit = usual if exact or tolerance is None else tolerance
            if not error <= limit * largest:
                raise _Refusal(f"the program's outputs differ by {error:.3g} at batch size {batch}")


@torch.no_grad()
def _tensors(network: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    outputs = network(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


def _batched(inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """The input tensors with the batch axis: as many entries on axis 0 as the first one."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim() > 0]
    return [x for x in tensors if len(x) == len(tensors[0])]


def _batch(inputs: tuple[Any, ...]) -> int:
    return len(batched[0]) if (batched := _batched(inputs)) else 0


def _with_batch(inputs: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """The inputs with ``batch`` samples, repeating those given."""
    batched = {id(x) for x in _batched(inputs)}

    def resized(x: Any) -> Any:
        return x[torch.arange(batch) % len(x)] if id(x) in batched else x

    return tuple(pytree.tree_map(resized, inputs)) if batched else inputs


def _on_cpu(module: nn.Module) -> nn.Module:
    elsewhere = any(not t.is_cpu for t in (*module.parameters(), *module.buffers()))
    return copy.deepcopy(module).cpu() if elsewhere else module


def _cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _always_evaluating(module: nn.Module) -> nn.Module:
    """``module.eval()`` is what the program is already; PyTorch refuses to call it on a program."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            raise NotImplementedError("a program was exported in evaluation mode: fine-tune it as it is")
        return self

    module.train = MethodType(train, module)  # type: ignore[method-assign]
    module.eval = MethodType(lambda self: self, module)  # type: ignore[method-assign]
    for part in module.modules():
        part.training = False
    return module


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(problem).__name__
