"""From a module to its operations: the ATen calls of one run on tensors without memory.

The network runs once in inference mode, where PyTorch's dispatcher sees operations such as ``linear``,
``layer_norm`` or ``scaled_dot_product_attention`` as a whole. Compared with ``torch.export`` this takes
a fraction of the time, and keeps the origin of every size (see ``_provenance``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import SurgeryError
from ._nodes import Node
from ._recorder import DataDependent, Recording, record
from ._skeleton import to_meta, with_tensors

Way = Literal["reckoned", "symbolic", "real"]


@dataclass(frozen=True)
class Traced:
    """The operations of a network in evaluation mode, for one input shape.

    Attributes:
        nodes: calls in execution order that something comes of, the output last. ``meta["val"]`` of a node is its
            result (without memory), ``meta["layer"]`` the path of the innermost module, ``meta["call"]`` a number for
            each call of it, ``meta["sizes"]`` the origins of its numbers by argument.
        state: placeholder name to state-dict name, for parameters and buffers.
        tensors: parameters and buffers by name, with their values.
        constants: placeholder name to value, for tensors that are neither.
        parameters: names that are parameters.
        calls: all calls in execution order.
        way: how it ran: without memory and with constants reckoned, without any, or, because it looks at values that
            do not depend on its input, on real tensors.
    """

    nodes: tuple[Node, ...]
    state: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor]
    parameters: frozenset[str]
    calls: tuple[Node, ...]
    way: Way = "reckoned"

    @property
    def real(self) -> bool:
        """Whether it ran on real tensors."""
        return self.way == "real"


def trace(
    module: nn.Module, example_inputs: tuple[Any, ...], tensors: Mapping[str, torch.Tensor] | None = None
) -> Traced:
    """Trace ``module`` in evaluation mode on ``example_inputs``; the module is left as it was.

    Args:
        module: its tensors may lie on the ``meta`` device.
        example_inputs: positional inputs; only their shapes and types matter.
        tensors: values of parameters and buffers by name, where the module's own do not matter.

    Raises:
        SurgeryError: the network does not run on the inputs, or its control flow depends on data.
    """
    values = dict(module.named_parameters()) | dict(module.named_buffers()) | dict(tensors or {})
    values = {name: value.detach() for name, value in values.items()}
    try:
        recording = _first_that_works(module, example_inputs, values)
    except Exception as problem:  # of the network's own code: any class
        _refuse_other_precision(module, example_inputs)
        _refuse_other_inputs(module, example_inputs, problem)
        raise SurgeryError(
            f"the network cannot be traced: {_first_line(problem)}",
            expected="a module that runs on the example inputs without data-dependent control flow",
            fix="check the input shape, and keep Python branches on tensor values out of forward()",
        ) from problem
    return _traced(module, *recording, values)


def quick_trace(
    module: nn.Module, inputs: tuple[Any, ...], tensors: Mapping[str, torch.Tensor], like: Traced
) -> Traced | None:
    """:func:`trace` in the way of an earlier one; None where the network does not take inputs of these shapes."""
    values = dict(module.named_parameters()) | dict(module.named_buffers()) | dict(tensors)
    values = {name: value.detach() for name, value in values.items()}
    try:
        return _traced(module, *_without_memory(module, inputs, values, (like.way,)), values)
    except Exception:  # any error of the user's own forward() means that it does not take this size
        return None


def _traced(module: nn.Module, recording: Recording, way: Way, values: Mapping[str, torch.Tensor]) -> Traced:
    return Traced(
        nodes=recording.nodes,
        state=recording.state,
        tensors=values,
        constants=recording.constants,
        parameters=frozenset(name for name, _ in module.named_parameters()),
        calls=tuple(recording.calls),
        way=way,
    )


def _first_that_works(
    module: nn.Module, inputs: tuple[Any, ...], values: Mapping[str, torch.Tensor]
) -> tuple[Recording, Way]:
    """Without memory, or else on real tensors."""
    try:
        return _without_memory(module, inputs, values, ("reckoned", "symbolic"))
    except Exception:  # of the network's own code: any class
        if any(x.is_meta for x in values.values()):
            raise
    real = with_tensors(module, lambda name, x: values[name].clone()).eval()
    copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    return record(real, copies, real_constants=False), "real"


def _without_memory(
    module: nn.Module, inputs: tuple[Any, ...], values: Mapping[str, torch.Tensor], ways: Sequence[Way]
) -> tuple[Recording, Way]:
    """With small constants reckoned, or with none: the first way that works."""
    light = pytree.tree_map(lambda x: to_meta(x) if isinstance(x, torch.Tensor) else x, inputs)
    for way in ways:
        twin = with_tensors(
            module, lambda name, x: to_meta(x) if weightlike(values.get(name, x)) else values[name]
        ).eval()
        try:
            return record(twin, light, real_constants=way == "reckoned"), way
        except DataDependent:
            raise
        except Exception as problem:  # of the network's own code: any class
            found = problem
    raise found


def weightlike(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be without memory. Tables of indices and counters stay real: networks decide by them."""
    return tensor.is_meta or (tensor.is_floating_point() and tensor.dim() > 0)


def layer_of(node: Node) -> str:
    """Dotted path of the innermost module that ran ``node``; ``""`` is the network itself."""
    return str(node.meta.get("layer", ""))


def place(node: Node) -> str:
    """``aten.relu.default in layer 'block.1'``, for messages."""
    layer = layer_of(node)
    return f"{node.target} in {f'layer {layer!r}' if layer else 'the network itself'}"


def operation(node: Node) -> tuple[str, Callable[..., Any]]:
    """Name and function of an operation without side effect: ``relu_`` gives ``"relu"`` and ``aten.relu.default``."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target)), target
    known = _PURE.get(target)
    if known is None:
        known = _PURE[target] = _pure(target)
    return known


_PURE: dict[Any, tuple[str, Callable[..., Any]]] = {}


def _pure(target: torch._ops.OpOverload[Any, Any]) -> tuple[str, Callable[..., Any]]:
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


def is_pick(node: Node) -> bool:
    """Whether ``node`` only takes one of several results."""
    return node.target is operator.getitem


def _refuse_other_precision(module: nn.Module, example_inputs: tuple[Any, ...]) -> None:
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


def _refuse_other_inputs(module: nn.Module, example_inputs: tuple[Any, ...], found: Exception) -> None:
    """Say so where the network, run plainly on copies of its tensors and the inputs, fails too."""
    problem: Exception = found
    if not any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        real = with_tensors(module, lambda name, x: x.clone()).eval()
        inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, example_inputs)
        try:
            with torch.no_grad():
                real(*inputs)
        except Exception as own:  # of the network's own code: any class
            problem = own
        else:
            return
    elif isinstance(found, DataDependent):
        return
    tensors = [list(x.shape) for x in pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    shapes = " and ".join(map(str, tensors)) or "no tensor"
    raise SurgeryError(
        f"the network cannot be traced: it does not accept these inputs ({shapes}): {_first_line(problem)}",
        expected="example inputs that model(*example_inputs) takes, the batch axis first: [N, C, H, W] for images",
        fix="mend the shape of the example inputs; one image without its batch axis needs .unsqueeze(0)",
    ) from problem


def _floating(tensors: Any) -> set[str]:
    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return {str(x.dtype).removeprefix("torch.") for x in floats}


def _overloads(name: str) -> tuple[str, ...]:
    packet = getattr(torch.ops.aten, name, None)
    return tuple(packet.overloads()) if packet is not None else ()


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0]
