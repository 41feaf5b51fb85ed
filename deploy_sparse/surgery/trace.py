"""From a module to its operations: the ATen calls of one run on tensors without memory.

The network runs once in inference mode, where PyTorch's dispatcher sees operations such as ``linear``,
``layer_norm`` or ``scaled_dot_product_attention`` as a whole. Compared with ``torch.export`` this takes
a fraction of the time, and keeps the origin of every size (see ``_provenance``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import SurgeryError
from ._nodes import Node, overwritten
from ._recorder import DataDependent, Recording, record
from ._skeleton import own_tensors, parts_of, state_of, to_meta, with_tensors

Way = Literal["reckoned", "symbolic", "real"]


@dataclass(frozen=True)
class Traced:
    """The operations of a network in evaluation mode, for one input shape.

    Attributes:
        nodes: calls in execution order that something comes of, the output last. ``meta["val"]`` of a node is its
            result (without memory), ``meta["layer"]`` the path of the innermost module, ``meta["call"]`` a number for
            each call of it, ``meta["sizes"]`` the origins of its numbers by argument.
        state: placeholder name to state-dict name, for parameters and buffers.
        tensors: parameters and buffers by name, with their values; NaN for those that the network writes into.
        constants: placeholder name to value, for tensors that are neither.
        parameters: names that are parameters.
        calls: all calls in execution order.
        way: how it ran: without memory and with constants reckoned, without any, or, because it looks at values that
            do not depend on its input, on real tensors.
        written: parameters and buffers that the network writes into: name and a reason for their channels to stay.
        origins: whether sizes say where they come from. Code that asks for the very type ``int`` does not run so.
    """

    nodes: tuple[Node, ...]
    state: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor]
    parameters: frozenset[str]
    calls: tuple[Node, ...]
    way: Way = "reckoned"
    written: Mapping[str, str] = field(default_factory=dict)
    origins: bool = True

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
    _refuse_scripted(module)
    values = own_tensors(module) | dict(tensors or {})
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


def quick_trace(module: nn.Module, inputs: tuple[Any, ...], like: Traced, *, origins: bool) -> Traced | None:
    """:func:`trace` in the way of an earlier one; None where the network does not take inputs of these shapes.

    Args:
        origins: of sizes are remembered, if they were then.
    """
    attempt = like.way, like.origins and origins
    try:
        return _traced(module, *_without_memory(module, inputs, like.tensors, [attempt]), like.tensors)
    except Exception:  # any error of the user's own forward() means that it does not take this size
        return None


def _traced(
    module: nn.Module, recording: Recording, way: Way, origins: bool, values: Mapping[str, torch.Tensor]
) -> Traced:
    written = _written_state(recording)
    unknown = {
        name: torch.full((), torch.nan).expand(values[name].shape) for name in written if weightlike(values[name])
    }
    return Traced(
        nodes=recording.nodes,
        state=recording.state,
        tensors={**values, **unknown} if unknown else values,
        constants=recording.constants,
        parameters=frozenset(name for name, x in state_of(parts_of(module)) if isinstance(x, nn.Parameter)),
        calls=tuple(recording.calls),
        way=way,
        written=written,
        origins=origins,
    )


def _written_state(recording: Recording) -> dict[str, str]:
    found: dict[str, str] = {}
    shown: dict[int, str] = {}  # by memory
    for node in recording.calls:
        for source in node.all_input_nodes:
            if source.name in recording.state:
                shown.setdefault(source.meta["val"].untyped_storage()._cdata, recording.state[source.name])
        for target in overwritten(node):
            name = shown.get(target.meta["val"].untyped_storage()._cdata)
            if name is not None:
                found.setdefault(name, f"{name!r} is written by {place(node)}")
    return found


_ATTEMPTS: tuple[tuple[Way, bool], ...] = (("reckoned", True), ("symbolic", True), ("reckoned", False))


def _first_that_works(
    module: nn.Module, inputs: tuple[Any, ...], values: Mapping[str, torch.Tensor]
) -> tuple[Recording, Way, bool]:
    """Without memory, or else on real tensors."""
    try:
        return _without_memory(module, inputs, values, _ATTEMPTS)
    except Exception:  # of the network's own code: any class
        if any(x.is_meta for x in values.values()):
            raise
    real = with_tensors(module, lambda name, x: values[name].clone()).eval()
    copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    return record(real, copies, real_constants=False), "real", True


def _without_memory(
    module: nn.Module,
    inputs: tuple[Any, ...],
    values: Mapping[str, torch.Tensor],
    attempts: Sequence[tuple[Way, bool]],
) -> tuple[Recording, Way, bool]:
    """With small constants reckoned, or with none, with the origins of sizes or without: the first way that works."""
    light = pytree.tree_map(lambda x: to_meta(x) if isinstance(x, torch.Tensor) else x, inputs)
    *earlier, last = attempts
    for attempt in earlier:
        try:
            return _attempted(module, light, values, *attempt)
        except DataDependent:
            raise
        except Exception:  # of the network's own code: any class
            continue
    return _attempted(module, light, values, *last)


def _attempted(
    module: nn.Module, light: tuple[Any, ...], values: Mapping[str, torch.Tensor], way: Way, origins: bool
) -> tuple[Recording, Way, bool]:
    twin = with_tensors(
        module, lambda name, x: to_meta(x) if weightlike(values.get(name, x)) else values[name].clone()
    ).eval()
    return record(twin, light, real_constants=way == "reckoned", origins=origins), way, origins


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


def numbers_of(node: Node) -> list[float]:
    """What the code reckons with, in the schema's order; sizes and positions apart."""
    found = []
    for position, name, default in _numeric(node.target):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
        if isinstance(value, float | int) and not isinstance(value, bool):
            found.append(value)
    return found


def _numeric(target: Any) -> tuple[tuple[int, str, Any], ...]:
    """Position, name and default of every argument of an operation that may be a number and is no integer."""
    known = _NUMERIC.get(target)
    if known is None:
        listed = enumerate(target._schema.arguments) if hasattr(target, "_schema") else ()
        known = _NUMERIC[target] = tuple(
            (position, argument.name, argument.default_value)
            for position, argument in listed
            if "int" not in str(argument.type).lower()
        )
    return known


_NUMERIC: dict[Any, tuple[tuple[int, str, Any], ...]] = {}


def is_pick(node: Node) -> bool:
    """Whether ``node`` only takes one of several results."""
    return node.target is operator.getitem


def _refuse_scripted(module: nn.Module) -> None:
    for path, part in parts_of(module):
        if isinstance(part, torch.jit.ScriptModule):
            raise SurgeryError(
                f"the network cannot be traced: {f'layer {path!r}' if path else 'it'} is a TorchScript module",
                expected="a network of ordinary modules, whose Python code can be followed",
                fix="build it without torch.jit.script, and script the compact network",
            )


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
    if given or not wanted:
        return
    dtype = getattr(torch, min(wanted))
    cast = pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x, example_inputs)
    try:
        _without_memory(module, cast, own_tensors(module), _ATTEMPTS[:1])
    except Exception:  # of the network's own code: any class
        return  # it is not the precision
    tensors = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    found = " and ".join(dict.fromkeys(_name(x.dtype) for x in tensors))
    images = any(x.dtype == torch.uint8 for x in tensors)
    raise SurgeryError(
        f"the example inputs are {found} of shape {' and '.join(str(list(x.shape)) for x in tensors)}, and the network "
        f"multiplies them with weights in {' and '.join(sorted(wanted))}",
        expected=f"floating numbers{', scaled and normalised as in training' if images else ''}",
        fix=f"cast them: example_inputs.to(torch.{min(wanted)}){' / 255' if images else ''}",
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
    tensors = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    whole = [f"{list(x.shape)}{'' if x.is_floating_point() else f' of {_name(x.dtype)}'}" for x in tensors]
    images = ", as floating numbers" if any(x.dtype == torch.uint8 for x in tensors) else ""
    raise SurgeryError(
        "the network cannot be traced: it does not accept these inputs "
        f"({' and '.join(whole) or 'no tensor'}): {_first_line(problem)}",
        expected="example inputs that model(*example_inputs) takes, the batch axis first: [N, C, H, W] for "
        f"images{images}",
        fix="mend the shape of the example inputs; one image without its batch axis needs .unsqueeze(0)",
    ) from problem


def _floating(tensors: Any) -> set[str]:
    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return {_name(x.dtype) for x in floats}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _overloads(name: str) -> tuple[str, ...]:
    packet = getattr(torch.ops.aten, name, None)
    return tuple(packet.overloads()) if packet is not None else ()


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0]
