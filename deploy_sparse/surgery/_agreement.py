"""Two runs of one network at two input sizes: the same operations, and no constant that could come out otherwise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._axes import Ledger
from ._memory import memories
from ._nodes import Node, overwritten
from ._shape_rules import RESHAPE
from ._values import lean, varying
from .graph import held
from .trace import Traced, arguments, layer_of, numbers_of, operation

Keys = Mapping[Node, int | str]


def same_operations(traced: Traced, other: Traced) -> bool:
    """Whether the same layers run the same operations on the same tensors, in the same order."""
    if len(traced.nodes) != len(other.nodes):
        return False
    mine, theirs = _keys(traced), _keys(other)
    return all(
        node.target == counterpart.target
        and layer_of(node) == layer_of(counterpart)
        and [mine[n] for n in node.all_input_nodes] == [theirs[n] for n in counterpart.all_input_nodes]
        for node, counterpart in zip(traced.nodes, other.nodes, strict=True)
    )


def same_constants(ledger: Ledger, other: Traced) -> bool:
    """Whether every constant in ``ledger`` is sure to be the same in ``other``, a run of the same operations.

    The rules look at an operation's arguments, at the constants it reads, and at the positions that channels lie at;
    constants that change from place to place they give up. Where all these are equal, so is the result; a second
    analysis tells only where they are not.
    """
    mine, theirs = _keys(ledger.traced), _keys(other)
    written = {m for node in ledger.traced.nodes for target in overwritten(node) for m in memories(target)}
    for node, counterpart in zip(ledger.traced.nodes, other.nodes, strict=True):
        if node.op != "call_function" or (
            _same_arguments(ledger, node, counterpart, mine, theirs)
            and _same_numbers_read(ledger.traced, node, other, counterpart)
            and _same_places(ledger, node, counterpart)
            and _covers(node) == _covers(counterpart)
        ):
            continue
        known = any(bool((~lean(value.constant).isnan()).any()) for value in held(ledger, node))
        if known or written & memories(node):  # what is written into may have been known before
            return False
    return True


def _keys(traced: Traced) -> Keys:
    """What tells a node: its position, the name of the state it shows, or when it was first read."""
    found: dict[Node, int | str] = {}
    for position, node in enumerate(traced.nodes):
        for source in node.all_input_nodes:
            if source not in found:
                found[source] = traced.state.get(source.name, source.name)
        found[node] = position
    return found


def _same_places(ledger: Ledger, node: Node, counterpart: Node) -> bool:
    """Whether channels lie at the same positions of the results."""
    shapes, others = _shapes(node), _shapes(counterpart)
    values = held(ledger, node)
    if len(shapes) != len(others) or len(shapes) != len(values):
        return False
    for value, shape, theirs in zip(values, shapes, others, strict=True):
        if len(shape) != len(theirs):
            return False
        places = varying(value.atoms)
        if any(n != m and (n == 1 or d in places) for d, (n, m) in enumerate(zip(shape, theirs, strict=True))):
            return False  # along an axis of one position anything is constant
    return operation(node)[0] not in RESHAPE or _regroups_alike(ledger, node, counterpart)


def _regroups_alike(ledger: Ledger, node: Node, counterpart: Node) -> bool:
    """Whether a reshape joins and splits the same axes, in equal parts where channels lie."""
    source, theirs = node.all_input_nodes[0], counterpart.all_input_nodes[0]
    before, after = (list(n.meta["val"].shape) for n in (source, node))
    before_, after_ = (list(n.meta["val"].shape) for n in (theirs, counterpart))
    if operation(node)[0] in ("expand", "expand_as"):
        return True
    blocks = _blocks(before, after)
    if blocks != _blocks(before_, after_):
        return False
    places = [{d for value in held(ledger, n) for d in varying(value.atoms)} for n in (source, node)]
    for inside, outside in blocks:
        if len(inside) == len(outside) == 1 or not (places[0] & set(inside) or places[1] & set(outside)):
            continue
        if any(before[d] != before_[d] for d in inside) or any(after[d] != after_[d] for d in outside):
            return False
    return True


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The fewest axes that hold the same elements before and after a reshape, from the first on."""
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        p = q = 1  # elements
        if i < len(before):
            p, i = before[i], i + 1
        if j < len(after):
            q, j = after[j], j + 1
        while p != q and (i < len(before) or j < len(after)):
            if (p < q and i < len(before)) or j == len(after):
                p, i = p * before[i], i + 1
            else:
                q, j = q * after[j], j + 1
        found.append((range(first, i), range(second, j)))
    return found


def _same_arguments(ledger: Ledger, node: Node, counterpart: Node, mine: Keys, theirs: Keys) -> bool:
    name = operation(node)[0]
    if name in RESHAPE or name.startswith(_SIZE_ONLY):
        return True
    if name == "pad" and _pads_zeros_with_zeros(ledger, node):
        return numbers_of(node) == numbers_of(counterpart)
    return _equal((node.args, node.kwargs), (counterpart.args, counterpart.kwargs), mine, theirs)


_SIZE_ONLY = ("upsample_", "_upsample_", "adaptive_", "max_pool")
"""Operations that leave a constant as it is, whatever size they give."""


def _pads_zeros_with_zeros(ledger: Ledger, node: Node) -> bool:
    given = arguments(node)
    zero = all(bool((lean(value.constant).nan_to_num() == 0).all()) for value in held(ledger, node))
    return bool(zero and given["mode"] == "constant" and not given["value"])


def _same_numbers_read(traced: Traced, node: Node, other: Traced, counterpart: Node) -> bool:
    """Whether the constants among what an operation reads are equal."""
    for source, theirs in zip(node.all_input_nodes, counterpart.all_input_nodes, strict=True):
        if source.name in traced.constants:
            a, b = traced.constants[source.name], other.constants[theirs.name]
            if a.shape != b.shape or a.is_meta or b.is_meta or not torch.equal(a, b):
                return False
    return True


def _covers(node: Node) -> bool:
    """Whether an operation that writes into a tensor writes the whole memory of it."""
    return all(
        x.numel() * x.element_size() == x.untyped_storage().nbytes()
        for target in overwritten(node)
        if isinstance(x := target.meta["val"], torch.Tensor)
    )


def _equal(value: Any, other: Any, mine: Keys, theirs: Keys) -> bool:
    if isinstance(value, Node):
        return isinstance(other, Node) and mine[value] == theirs[other]
    if isinstance(value, list | tuple):
        pairs = zip(value, other, strict=False)
        return len(value) == len(other) and all(_equal(a, b, mine, theirs) for a, b in pairs)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_equal(value[k], other[k], mine, theirs) for k in value)
    return bool(value == other)


def _shapes(node: Node) -> list[torch.Size]:
    found = node.meta["val"]
    listed = found if isinstance(found, list | tuple) else (found,)
    return [x.shape if isinstance(x, torch.Tensor) else torch.Size() for x in listed]
