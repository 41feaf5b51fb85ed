"""From a module to a torch program in the precision of its target, described as any other engine is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ...artifact import sha256_bytes
from ...errors import ExportError
from ...exporting import eval_mode
from ...programs.program import program_bytes, read_bytes
from ..float_formats import check_precision
from ..onnx.export import BATCH_AXIS, as_module, checked_inputs, macs_of
from ..onnx.file import Parity
from ..parity import TOLERANCE, compare_outputs, tensors_of
from ..target import Target
from ..tensors import Feeds, TensorSpec
from .graph import call_flat, flat_module

VERSION: str = torch.__version__
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROUNDINGS = 8  # by which a program may differ: attention is fused in a module and is not in its program
_OTHERWISE = "rewrite that part of forward; torch.export.export(module, inputs) shows the same error in full"


@dataclass(frozen=True)
class TorchProgram:
    """A checked program and what is known of it.

    Attributes:
        data: the content of the ``.pt2`` file.
        float_types: NumPy's names of the floating-point types of everything but the float32 border of lower precisions.
        inputs, outputs: names, types and shapes; floating-point ones are float32.
        parameters: of the module.
        macs: multiply-accumulates of one sample.
        parity: against the float32 module, run on the CPU.
    """

    data: bytes
    float_types: frozenset[str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    macs: int
    parity: Parity

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_bytes(self.data)


class _AtPrecision(nn.Module):
    """A network converted to a lower precision, between float32 inputs and outputs."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The network's outputs, floating-point ones as float32."""
        outputs = self.network(*(x.to(self.dtype) if x.is_floating_point() else x for x in inputs))
        return pytree.tree_map(_widened, outputs)


def torch_program(module: nn.Module | Any, example_inputs: Any, target: Target) -> TorchProgram:
    """Export a module in eval mode and check the program against it at several batch sizes. The module is not changed.

    Axis 0 of every input becomes the dynamic batch axis. Inputs are called ``input`` (``input_0``, ``input_1``… when
    there are several), outputs ``output`` (``output_0``…).

    Args:
        module: a module, or an object whose ``module`` attribute is one.
        example_inputs: one tensor, or one per argument of ``forward``; axis 0 is the batch.
        target: its precision.

    Raises:
        ExportError: the module cannot be exported, or its outputs are not finite in that precision.
        BuildError: float types other than the one asked for.
    """
    network = as_module(module)
    inputs = tuple(tensor.detach().cpu() for tensor in checked_inputs(network, example_inputs))
    low = target.precision != "fp32"
    if low or any(not tensor.is_cpu for tensor in (*network.parameters(), *network.buffers())):
        network = copy.deepcopy(network).cpu()
    if low:
        network, inputs = network.float(), tuple(map(_widened, inputs))
    converted = _AtPrecision(network, _TYPES[target.precision]) if low else network
    with eval_mode(network), eval_mode(converted):
        data = program_bytes(
            converted,
            inputs,
            otherwise=_OTHERWISE,
            tolerance=_ROUNDINGS * torch.finfo(_TYPES[target.precision]).eps if low else None,
            called=f"{type(network).__name__} in {target.precision}" if low else "",
        )
        program = read_bytes(data, "the program", remake=_OTHERWISE)
        types = _float_types(program, border=low)
        check_precision(types, target, "the torch program")
        with torch.no_grad():
            tensors_of(network(*inputs))  # refuses outputs that are no tensors
        accepted, returned = _specs(program)
        parity = compare_outputs(
            network,
            _run(program, accepted, returned),
            inputs,
            accepted,
            tuple(dict.fromkeys((inputs[0].shape[0], 1, 3))),
            runtime=f"the {target.precision} program",
            tolerance=None if low else TOLERANCE,
        )
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return TorchProgram(data, types, accepted, returned, parameters, macs_of(network, inputs), parity)


def _specs(program: ExportedProgram) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as the other runtimes name them.

    Raises:
        ExportError: an input without a free batch axis.
    """
    module = flat_module(program)
    placeholders = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    (outputs,) = module.graph.find_nodes(op="output")
    accepted = _named("input", placeholders)
    symbols = {str(value.shape[0]) for value in placeholders if value.dim()}
    for spec in accepted:
        if not spec.batched:
            raise ExportError(
                f"{spec} lost its batch axis: the module computes with one fixed batch size",
                expected="a forward that works at any batch size",
                fix="take the batch size from the input's shape, never as a constant",
            )
    values = [node.meta["val"] for node in outputs.args[0] if hasattr(node, "meta")]
    return _renamed(accepted, symbols), _renamed(_named("output", values), symbols)


def _named(what: str, values: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
    names = [what] if len(values) == 1 else [f"{what}_{index}" for index in range(len(values))]
    return tuple(
        TensorSpec(name, str(x.dtype).removeprefix("torch."), tuple(e if type(e) is int else str(e) for e in x.shape))
        for name, x in zip(names, values, strict=True)
    )


def _renamed(specs: tuple[TensorSpec, ...], symbols: set[str]) -> tuple[TensorSpec, ...]:
    """With the batch axis called by its name."""
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(symbols)))
    return tuple(
        replace(spec, shape=tuple(e if isinstance(e, int) else pattern.sub(BATCH_AXIS, e) for e in spec.shape))
        for spec in specs
    )


def _float_types(program: ExportedProgram, *, border: bool) -> frozenset[str]:
    """Floating-point types of all tensors of the program; those that cross its border only unless ``border``."""
    found = {tensor.dtype for tensor in (*program.state_dict.values(), *program.constants.values())}
    crossing = {*program.graph_signature.user_inputs, *program.graph_signature.user_outputs} if border else set()
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            nodes = [node for node in part.graph.nodes if node.op != "output" and node.name not in crossing]
            values = [node.meta.get("val") for node in nodes]
            found |= {x.dtype for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)}
    return frozenset(str(dtype).removeprefix("torch.") for dtype in found if dtype.is_floating_point)


def _run(
    program: ExportedProgram, accepted: Sequence[TensorSpec], returned: Sequence[TensorSpec]
) -> Callable[[Feeds], dict[str, np.ndarray]]:
    module = flat_module(program)

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = call_flat(module, [torch.from_numpy(feeds[spec.name].copy()) for spec in accepted])
        return {spec.name: y.detach().numpy() for spec, y in zip(returned, outputs, strict=True)}

    return run


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
