"""Which tensor dimensions share one channel axis, read off the traced graph. No maps per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from ..errors import SurgeryError
from ..structure import ChannelGroup, Producer, Slice
from . import _flow_rules, _layer_rules, _norm_rules, _product_rules
from ._axes import Axis, Grid, Ledger, NormUse
from ._equations import equations
from ._memory import memories, overwrite
from ._nodes import Node, overwritten
from ._scaling import fix_unscalable
from ._skeleton import own_tensors, to_meta, with_tensors
from ._substitute import with_open_attention
from ._values import Atoms, Value, compressed, lean, untracked, varying
from .inputs import checked_inputs
from .trace import Traced, is_pick, place, trace

Inputs = torch.Tensor | tuple[Any, ...]
Unit = Literal["dims", "heads"]
Doubts = Mapping[int, tuple[str, tuple[torch.Tensor, ...]]]
NETWORK_OUTPUT = "network output"
"""Why the channels of a classifier's last layer stay; the one reason that every network has."""


def channel_groups(
    module: nn.Module, example_inputs: Inputs, *, unit: Unit = "dims", norms: bool = True
) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in the order of their first producer.

    Args:
        module: any module that runs without data-dependent control flow; it is not changed, and may lie on ``meta``.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.
        unit: what one channel is where the code splits an axis in two, as attention does into heads and dimensions and
            a grouped convolution into groups and positions: ``"dims"``, the same position of every head or group, or
            ``"heads"``, a head or group as a whole.
        norms: whether channels that a LayerNorm, RMSNorm or GroupNorm counts may go; surgery then puts a norm in its
            place that keeps the dense network's statistics.

    Raises:
        SurgeryError: inputs that the network does not take, or a network that cannot be traced.
    """
    if unit not in get_args(Unit):
        raise SurgeryError(f"unit={unit!r}", expected=f"one of {', '.join(get_args(Unit))}", fix="choose one of them")
    inputs = checked_inputs(example_inputs, module)
    shell = with_open_attention(with_tensors(module, lambda _, x: to_meta(x)))[0]
    ledger = analyse(shell, inputs, own_tensors(module))
    for use in ledger.norms:
        if use.module is None or not norms:
            ledger.atoms.pin(use.atoms, use.fixed or f"{use.place} is to keep its width")
    for grid in ledger.grids:
        _coarsen(ledger, grid, unit)
    for parts, where in ledger.balanced:  # what is chosen one by one goes from all parts
        for part in parts[1:]:
            ledger.atoms.unify(parts[0], part, f"channels meet others that cannot go at {where}")
    for equation in equations(ledger):
        if isinstance(equation.expr, int):  # one channel less at such a position would change a size in the code
            alone = (equation.positions.roots == equation.positions.roots[:, :1]).all(axis=1)
            roots = torch.from_numpy(equation.positions.roots[alone, 0])
            ledger.atoms.pin(roots, f"the size is stated by {equation.where}")
    return groups_of(ledger)


def analyse(
    module: nn.Module,
    inputs: tuple[Any, ...],
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    doubts: Doubts | None = None,
    again: Ledger | None = None,
    traced: Traced | None = None,
) -> Ledger:
    """Walk the traced graph once and return what was learnt about channels and constants.

    Args:
        module: the network; its tensors may lie on the ``meta`` device.
        inputs: positional inputs.
        tensors: the weights whose constants matter, by name; by default the module's own.
        doubts: constants not to rely on, by position of the operation: the cause and a mask for each output.
        again: an earlier analysis of the same weights, so that they need not be looked at again.
        traced: the trace, where it is known already.
    """
    traced, doubts = traced or trace(module, inputs, tensors), doubts or {}
    ledger = Ledger(traced, module, usage={} if again is None else again.usage)
    last_use = {source: position for position, node in enumerate(traced.nodes) for source in node.all_input_nodes}
    for position, node in enumerate(traced.nodes):
        if node.op == "call_function":
            ledger.values[node] = _apply(ledger, node)
            if position in doubts:
                _doubt(ledger, node, *doubts[position])
            overwrite(ledger, node, position, last_use)
            for earlier in _written_over(traced, position, doubts):
                _doubt(ledger, traced.nodes[earlier], *doubts[earlier])
        elif node.op == "output":
            for source in node.all_input_nodes:
                for value in held(ledger, source):
                    ledger.pin(value, NETWORK_OUTPUT)
    fix_unscalable(ledger)
    _agree_on_constants(ledger)
    for name, why in {**ledger.reshaped_state, **traced.written}.items():
        for axis in [a for a in ledger.axes.values() if a.name == name]:
            ledger.atoms.pin(axis.atoms, why)
    ledger.atoms.settle()
    return ledger


def _agree_on_constants(ledger: Ledger) -> None:
    """A norm that is called several times counts one number for each channel that goes, so they must be equal."""
    calls: dict[str, list[NormUse]] = {}
    for use in ledger.norms:
        if use.module is not None:
            calls.setdefault(use.module, []).append(use)
    for module, uses in calls.items():
        same = torch.stack([use.constant for use in uses])
        constant = torch.where((same == same[0]).all(dim=0), same[0], torch.nan)
        if len(uses) > 1:
            ledger.norms = [replace(u, constant=constant) if u.module == module else u for u in ledger.norms]


def groups_of(ledger: Ledger) -> tuple[ChannelGroup, ...]:
    """Channels that share a producer's axis form one group."""
    members = memberships(ledger)
    slices: list[list[tuple[Axis, Slice]]] = [[] for _ in members.sizes]
    for axis in ledger.axes.values():
        roots = ledger.roots_of(axis)
        roots = roots if roots.ndim == 1 else roots[0]
        numbers = np.where(roots < 0, -1, members.group[np.maximum(roots, 0)])
        for number in np.unique(numbers[numbers >= 0]).tolist():
            channels = np.where(numbers == number, members.channel[np.maximum(roots, 0)], -1)
            slices[number].append((axis, Slice(axis.name, axis.dim, tuple(channels.tolist()))))
    reasons = pinned_groups(ledger, members)
    found = [
        _group(size, parts, reasons.get(number))
        for number, (size, parts) in enumerate(zip(members.sizes, slices, strict=True))
    ]
    names = told_apart([(group.name, group.producers[0].weight.dim) for group in found])
    return tuple(replace(group, name=name) for group, name in zip(found, names, strict=True))


def told_apart(producers: Sequence[tuple[str, int]]) -> list[str]:
    """Names of groups by weight and axis of their first producers; the axis is named where a weight has two groups."""
    weights = [name for name, _ in producers]
    return [name if weights.count(name) == 1 else f"{name} (axis {dim})" for name, dim in producers]


def pinned_groups(ledger: Ledger, members: Members) -> dict[int, str]:
    """Why a group's channels must stay: the reason of its first channel that has one."""
    found: dict[int, str] = {}
    for root, why in sorted(ledger.atoms.pins().items()):
        number = int(members.group[root])
        if number >= 0:
            found.setdefault(number, why)
    return found


def as_tuple(example_inputs: Inputs) -> tuple[Any, ...]:
    """Positional inputs as a tuple."""
    return (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)


def held(ledger: Ledger, node: Node) -> tuple[Value, ...]:
    """The tensors a node gives, none for nodes without."""
    known = ledger.values.get(node)
    if isinstance(known, tuple):
        return known
    return (ledger.value(node),) if known is not None or "val" in node.meta else ()


@dataclass(frozen=True)
class Members:
    """Which group every channel that some layer writes belongs to, by smallest joined atom.

    Attributes:
        group: number of the group, -1 for none, int ``[atoms]``.
        channel: position in the group, int ``[atoms]``.
        sizes: channels of each group.
    """

    group: np.ndarray
    channel: np.ndarray
    sizes: tuple[int, ...]


def memberships(ledger: Ledger) -> Members:
    """The groups in the order of their first producers."""
    together = Atoms()
    together.fresh(ledger.atoms.count)
    written = [ledger.roots_of(a).reshape(-1) for a in ledger.axes.values() if a.role == "producer"]
    for roots in map(torch.from_numpy, written):
        together.unify(roots[:1], roots, "")
    firsts = [together.find(roots[0]) for roots in written]
    numbers = {head: number for number, head in enumerate(dict.fromkeys(firsts))}
    group = np.full(ledger.atoms.count, -1)
    channel = np.zeros(ledger.atoms.count, dtype=np.int64)
    if written:
        every = np.unique(np.concatenate(written))  # ascending
        heads = together.roots(torch.from_numpy(every)).tolist()
        group[every] = [numbers[head] for head in heads]
    sizes = []
    for number in range(len(numbers)):
        own = np.flatnonzero(group == number)
        channel[own] = np.arange(len(own))
        sizes.append(len(own))
    return Members(group, channel, tuple(sizes))


def _group(size: int, parts: list[tuple[Axis, Slice]], pinned: str | None) -> ChannelGroup:
    def of(role: str, producer: str | None = None) -> tuple[Slice, ...]:
        return tuple(s for axis, s in parts if axis.role == role and (producer is None or axis.producer == producer))

    producers = []
    for rows in of("producer"):
        biases = of("bias", rows.name)
        producers.append(Producer(rows, biases[0] if biases else None, of("norm", rows.name)))
    owned = {rows.name for rows in of("producer")}
    strays = tuple(s for axis, s in parts if axis.role == "norm" and axis.producer not in owned)
    # Layers that share a weight have a bias each.
    strays += tuple(s for name in sorted(owned) for s in of("bias", name)[1:])
    return ChannelGroup(
        name=producers[0].weight.name,
        size=size,
        producers=tuple(producers),
        shared=(*of("shared"), *strays),
        statistics=of("statistics"),
        consumers=of("consumer"),
        pinned=pinned,
    )


def _coarsen(ledger: Ledger, grid: Grid, unit: Unit) -> None:
    """Join the channels of a grid so that those left go one by one without breaking its product form."""
    roots = compressed(ledger.atoms.roots(grid.atoms))
    axes = list(varying(roots))
    if len(axes) < 2:
        return
    free = [d for d in axes if d not in grid.fixed] or axes
    kept = free[-1] if unit == "dims" else free[0]
    small = lean(roots)
    others = [d for d in axes if d != kept]
    ledger.atoms.unify(small.amax(dim=others, keepdim=True), small, "channels meet others that cannot go")


def _apply(ledger: Ledger, node: Node) -> Value | tuple[Value, ...]:
    if is_pick(node):
        source, index = node.args
        found = ledger.values[source]
        return found[index] if isinstance(found, tuple) else found
    if any(_is_empty(each.meta["val"]) for each in (node, *node.all_input_nodes)):
        return _give_up(ledger, node, f"no elements in a tensor at {place(node)}")
    for rules in (_layer_rules, _norm_rules):
        layer = rules.rule_for(node)
        if layer is not None:
            problem = rules.unsupported(ledger, node)
            return layer(ledger, node) if problem is None else _give_up(ledger, node, problem)
    flow = _product_rules.rule_for(node) or _flow_rules.rule_for(node)
    return flow(ledger, node) if flow is not None else _give_up(ledger, node, f"unknown operation {place(node)}")


def _is_empty(found: Any) -> bool:
    if isinstance(found, list | tuple):
        return any(map(_is_empty, found))
    return isinstance(found, torch.Tensor) and found.numel() == 0


def _doubt(ledger: Ledger, node: Node, cause: str, masks: tuple[torch.Tensor, ...]) -> None:
    doubted = []
    for value, mask in zip(held(ledger, node), masks, strict=True):
        constant = compressed(torch.where(mask, torch.nan, value.constant))
        ledger.lose(value.atoms, value.constant, constant, cause)
        doubted.append(replace(value, constant=constant))
    ledger.values[node] = tuple(doubted) if isinstance(ledger.values[node], tuple) else doubted[0]


def _written_over(traced: Traced, position: int, doubts: Doubts) -> list[int]:
    """The doubted results that the operation at ``position`` writes into: what they hold from then on is in doubt."""
    targets = overwritten(traced.nodes[position]) if doubts else ()
    touched = {memory for target in targets for memory in memories(target)}
    return [at for at in doubts if at < position and touched & memories(traced.nodes[at])] if touched else []


def _give_up(ledger: Ledger, node: Node, why: str) -> Value | tuple[Value, ...]:
    """Nothing is known about this operation: what reaches it stays, what it gives belongs to no channel."""
    if why not in ledger.unknown:
        ledger.unknown.append(why)
    for source in node.all_input_nodes:
        for value in held(ledger, source):
            ledger.pin(value, why)
        if ledger.is_state(source):
            ledger.reshaped_state.setdefault(ledger.name(source), why)
    outputs = node.meta.get("val")
    if isinstance(outputs, list | tuple):
        return tuple(untracked(o.shape if isinstance(o, torch.Tensor) else (), why) for o in outputs)
    return untracked(outputs.shape if isinstance(outputs, torch.Tensor) else (), why)
