"""Which tensor dimensions share one channel axis, read off the traced graph. No maps per model."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..structure import ChannelGroup, Producer, Slice
from . import _flow_rules, _layer_rules
from ._axes import Axis, Ledger
from ._values import Value, compressed, untracked
from .trace import operation, overwritten, place, trace

Inputs = torch.Tensor | tuple[Any, ...]
Doubts = Mapping[int, tuple[str, tuple[torch.Tensor, ...]]]
NETWORK_OUTPUT = "network output"
"""Why the channels of a classifier's last layer stay; the one reason that every network has."""


def channel_groups(module: torch.nn.Module, example_inputs: Inputs) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in the order of their first producer.

    Args:
        module: any module that ``torch.export`` can trace; it is not changed.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.

    Raises:
        SurgeryError: the network cannot be traced.
    """
    return groups_of(analyse(module, example_inputs))


def analyse(
    module: torch.nn.Module, example_inputs: Inputs, *, fixed_sizes: bool = False, doubts: Doubts | None = None
) -> Ledger:
    """Walk the traced graph once and return what was learnt about channels and constants.

    Args:
        module: the network with the weights whose constants matter.
        example_inputs: as in :func:`channel_groups`.
        fixed_sizes: take every size written into a reshape as fixed, and pin the channels it counts.
        doubts: constants not to rely on, by position of the operation: the cause and a mask for each output.
    """
    traced = trace(module, as_tuple(example_inputs))
    ledger = Ledger(traced, module, fixed_sizes)
    last_use = {source: position for position, node in enumerate(traced.nodes) for source in node.all_input_nodes}
    for position, node in enumerate(traced.nodes):
        if node.op == "call_function":
            ledger.values[node] = _apply(ledger, node)
            if doubts and position in doubts:
                _doubt(ledger, node, *doubts[position])
            _overwrite(ledger, node, position, last_use)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for value in held(ledger, source):
                    ledger.pin(value, NETWORK_OUTPUT)
    for name, why in ledger.reshaped_state.items():
        for axis in [a for a in ledger.axes.values() if a.name == name]:
            ledger.atoms.pin(axis.atoms, why)
    return ledger


def groups_of(ledger: Ledger) -> tuple[ChannelGroup, ...]:
    """Channels that share a producer's axis form one group."""
    members = memberships(ledger)
    pins = ledger.atoms.pins()
    slices: list[list[tuple[Axis, Slice]]] = [[] for _ in range(1 + max((g for g, _ in members.values()), default=-1))]
    for axis in ledger.axes.values():
        found = [members.get(atom, (-1, -1)) for atom in ledger.atoms.roots(axis.atoms).tolist()]
        for number in sorted({group for group, _ in found if group >= 0}):
            channels = tuple(channel if group == number else -1 for group, channel in found)
            slices[number].append((axis, Slice(axis.name, axis.dim, channels)))
    sizes = [0] * len(slices)
    reasons: list[str | None] = [None] * len(slices)
    for root, (number, _) in sorted(members.items()):
        sizes[number] += 1
        reasons[number] = reasons[number] or pins.get(root)
    return tuple(_group(size, parts, pinned) for size, parts, pinned in zip(sizes, slices, reasons, strict=True))


def as_tuple(example_inputs: Inputs) -> tuple[Any, ...]:
    """Positional inputs as a tuple."""
    return (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)


def _group(size: int, parts: list[tuple[Axis, Slice]], pinned: str | None) -> ChannelGroup:
    def of(role: str, producer: str | None = None) -> tuple[Slice, ...]:
        return tuple(s for axis, s in parts if axis.role == role and (producer is None or axis.producer == producer))

    producers = []
    for rows in of("producer"):
        biases = of("bias", rows.name)
        producers.append(Producer(rows, biases[0] if biases else None, of("norm", rows.name)))
    owned = {rows.name for rows in of("producer")}
    strays = tuple(s for axis, s in parts if axis.role == "norm" and axis.producer not in owned)
    return ChannelGroup(
        name=producers[0].weight.name,
        size=size,
        producers=tuple(producers),
        shared=(*of("shared"), *strays),
        statistics=of("statistics"),
        consumers=of("consumer"),
        pinned=pinned,
    )


def memberships(ledger: Ledger) -> dict[int, tuple[int, int]]:
    """``(group number, channel in the group)`` by smallest joined atom, for every channel that some layer writes."""
    producers = [axis for axis in ledger.axes.values() if axis.role == "producer"]
    rows = [ledger.atoms.roots(axis.atoms).tolist() for axis in producers]
    group_of: dict[int, int] = {}
    merged: list[int] = []  # group number -> the smaller group it was merged into, or itself
    for channels in rows:
        met = sorted({_head(merged, group_of[c]) for c in channels if c in group_of})
        home = met[0] if met else len(merged)
        if not met:
            merged.append(home)
        for other in met[1:]:
            merged[other] = home
        for channel in channels:
            group_of.setdefault(channel, home)
    heads = sorted({_head(merged, g) for g in group_of.values()})
    members: dict[int, tuple[int, int]] = {}
    for number, head in enumerate(heads):
        own = sorted(c for c, g in group_of.items() if _head(merged, g) == head)
        members |= {channel: (number, position) for position, channel in enumerate(own)}
    return members


def _head(merged: list[int], group: int) -> int:
    while merged[group] != group:
        group = merged[group]
    return group


def _apply(ledger: Ledger, node: Node) -> Value | tuple[Value, ...]:
    if node.target is operator.getitem:
        source, index = node.args
        found = ledger.values[source]  # type: ignore[index]
        return found[index] if isinstance(found, tuple) else found  # type: ignore[index]
    if operation(node)[0] == "_assert_tensor_metadata":
        return untracked((), "")  # what export leaves of a cast: it computes nothing
    layer = _layer_rules.rule_for(node)
    if layer is not None:
        problem = _layer_rules.unsupported(ledger, node)
        return layer(ledger, node) if problem is None else _give_up(ledger, node, problem)
    flow = _flow_rules.rule_for(node)
    return flow(ledger, node) if flow is not None else _give_up(ledger, node, f"unknown operation {place(node)}")


def _doubt(ledger: Ledger, node: Node, cause: str, masks: tuple[torch.Tensor, ...]) -> None:
    doubted = []
    for value, mask in zip(held(ledger, node), masks, strict=True):
        constant = compressed(torch.where(mask, torch.nan, value.constant))
        ledger.lose(value.atoms, value.constant, constant, cause)
        doubted.append(replace(value, constant=constant))
    ledger.values[node] = tuple(doubted) if isinstance(ledger.values[node], tuple) else doubted[0]


def _give_up(ledger: Ledger, node: Node, why: str) -> Value | tuple[Value, ...]:
    """Nothing is known about this operation: what reaches it stays, what it gives belongs to no channel."""
    if why not in ledger.unknown:
        ledger.unknown.append(why)
    for source in node.all_input_nodes:
        for value in held(ledger, source):
            ledger.pin(value, why)
    outputs = node.meta.get("val")
    if isinstance(outputs, list | tuple):
        return tuple(untracked(o.shape if isinstance(o, torch.Tensor) else (), why) for o in outputs)
    return untracked(outputs.shape if isinstance(outputs, torch.Tensor) else (), why)


def held(ledger: Ledger, node: Node) -> tuple[Value, ...]:
    """The tensors a node gives, none for nodes without."""
    known = ledger.values.get(node)
    if isinstance(known, tuple):
        return known
    return (ledger.value(node),) if known is not None or "val" in node.meta else ()


def _overwrite(ledger: Ledger, node: Node, position: int, last_use: dict[Node, int]) -> None:
    """After an in-place operation every tensor over the same memory holds the result too.

    A tensor of the same extent has exactly the result's value; of other views only that they changed is known.
    """
    for target in overwritten(node):
        if last_use[target] > position:
            ledger.values[target] = ledger.values[node]
        for other in list(ledger.values):
            stale = last_use.get(other, -1) > position and other not in (node, target)
            if not stale or not _memory(other) & _memory(target):
                continue
            if _extent(other) == _extent(target):
                ledger.values[other] = ledger.values[node]
            else:
                _give_up_view(ledger, other, f"memory shared with in-place {place(node)}")


def _give_up_view(ledger: Ledger, node: Node, why: str) -> None:
    values = held(ledger, node)
    for value in values:
        ledger.pin(value, why)
    changed = tuple(untracked(value.shape, why) for value in values)
    ledger.values[node] = changed if isinstance(ledger.values[node], tuple) else changed[0]


def _memory(node: Node) -> set[int]:
    outputs = node.meta.get("val")
    tensors = outputs if isinstance(outputs, list | tuple) else (outputs,)
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)}


def _extent(node: Node) -> tuple[Any, ...]:
    tensor = node.meta["val"]
    if not isinstance(tensor, torch.Tensor):
        return (node,)
    return (tensor.shape, tensor.stride(), tensor.storage_offset())
