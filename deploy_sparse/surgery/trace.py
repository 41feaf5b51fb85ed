"""From a module to its operations: the ATen graph of ``torch.export``, with parameters named as in the state dict."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import SurgeryError

_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export._trace")


@dataclass(frozen=True)
class Traced:
    """The operations of a network in evaluation mode, for one input shape.

    Attributes:
        nodes: in execution order, placeholders first, the output last.
        state: placeholder name to state-dict name, for parameters and persistent buffers.
        tensors: the state dict.
        constants: placeholder name to value, for buffers outside the state dict and literals.
        parameters: names of the state dict that are parameters.
    """

    nodes: tuple[Node, ...]
    state: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor]
    parameters: frozenset[str]


def trace(module: torch.nn.Module, example_inputs: tuple[Any, ...]) -> Traced:
    """Trace ``module`` in evaluation mode on ``example_inputs``; the module is left as it was.

    Raises:
        SurgeryError: the network does not run on the inputs, or its control flow depends on data.
    """
    modes = {name: part.training for name, part in module.named_modules()}
    module.eval()
    try:
        with _one_message():
            program = torch.export.export(module, example_inputs, strict=False)
    except Exception as problem:
        # The exporter raises many unrelated classes (user code runs inside it); all mean the same to the caller.
        _refuse_other_precision(module, example_inputs)
        _refuse_other_inputs(module, example_inputs)
        raise SurgeryError(
            f"the network cannot be traced: {_first_line(problem)}",
            expected="a module that runs on the example inputs without data-dependent control flow",
            fix="check the input shape, and keep Python branches on tensor values out of forward()",
        ) from problem
    finally:
        for name, part in module.named_modules():
            part.training = modes[name]
    state, constants = {}, {}
    for spec in program.graph_signature.input_specs:
        persistent = spec.kind == InputKind.PARAMETER or (
            spec.kind == InputKind.BUFFER and spec.persistent is not False
        )
        if persistent and spec.target is not None:
            state[spec.arg.name] = spec.target
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None:
            constants[spec.arg.name] = program.constants[spec.target]
    return Traced(
        nodes=tuple(program.graph.nodes),
        state=state,
        tensors={name: tensor.detach() for name, tensor in module.state_dict().items()},
        constants=constants,
        parameters=frozenset(name for name, _ in module.named_parameters()),
    )


def layer_of(node: Node) -> str:
    """Dotted path of the innermost module that ran ``node``; ``""`` is the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return ".".join(part.split("@")[0] for part in path.split("."))


def place(node: Node) -> str:
    """``aten.relu.default in layer 'block.1'``, for messages."""
    layer = layer_of(node)
    return f"{node.target} in {f'layer {layer!r}' if layer else 'the network itself'}"


def operation(node: Node) -> tuple[str, Callable[..., Any]]:
    """Name and function of an operation without side effect: ``relu_`` gives ``"relu"`` and ``aten.relu.default``."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target)), target
    name = target.overloadpacket.__name__
    if target.namespace != "aten":
        return f"{target.namespace}::{name}", target  # another library's "relu" is not ours to interpret
    pure = name.rstrip("_")
    if pure != name and target._overloadname in _overloads(pure):
        return pure, getattr(getattr(torch.ops.aten, pure), target._overloadname)
    return name, target


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of an operation by its schema's name, defaults filled in."""
    target: Any = node.target
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def overwritten(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensor this operation writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    given = arguments(node)
    return tuple(
        given[a.name]
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and isinstance(given[a.name], Node)
    )


def _refuse_other_precision(module: torch.nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Name the precisions of inputs and weights where they differ; networks that cast their inputs are traced."""
    given = _floating(pytree.tree_leaves(example_inputs))
    wanted = _floating(module.parameters())
    if given and wanted and not given & wanted:
        inputs, weights = (" and ".join(sorted(names)) for names in (given, wanted))
        raise SurgeryError(
            f"the example inputs are {inputs}, the weights {weights}",
            expected=f"example inputs in the weights' precision, {weights}",
            fix=f"cast them: example_inputs.to(torch.{min(wanted)})",
        ) from None


def _refuse_other_inputs(module: torch.nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Say so where the network, run plainly on copies of its tensors and the inputs, fails too."""
    state = {name: x.detach().clone() for name, x in (*module.named_parameters(), *module.named_buffers())}
    inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, example_inputs)
    try:
        with torch.no_grad():
            torch.func.functional_call(module, state, inputs)
    except Exception as problem:  # of the network's own code: any class
        tensors = [list(x.shape) for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        shapes = " and ".join(map(str, tensors)) or "no tensor"
        raise SurgeryError(
            f"the network cannot be traced: it does not accept these inputs ({shapes}): {_first_line(problem)}",
            expected="example inputs that model(*example_inputs) takes, the batch axis first: [N, C, H, W] for images",
            fix="mend the shape of the example inputs; one image without its batch axis needs .unsqueeze(0)",
        ) from problem


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Keep torch from writing its graphs and tracebacks to standard error beside the exception it raises."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    said = io.StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with contextlib.redirect_stderr(said):  # torch prints the unfinished graph there
            yield
        sys.stderr.write(said.getvalue())  # of a success: the network's own
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _floating(tensors: Iterable[Any]) -> set[str]:
    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return {str(x.dtype).removeprefix("torch.") for x in floats}


def _overloads(name: str) -> tuple[str, ...]:
    packet = getattr(torch.ops.aten, name, None)
    return tuple(packet.overloads()) if packet is not None else ()


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0]
