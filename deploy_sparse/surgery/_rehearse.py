"""A run of the narrowed network without memory: does its code give every tensor the predicted size?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ._axes import Ledger
from ._equations import Extents
from ._nodes import Node
from ._recorder import Recording, record
from ._scaling import factor, scalable
from ._skeleton import to_meta, with_tensors
from ._words import names
from .parts import Rescale
from .trace import Traced, is_pick, layer_of, numbers_of, operation


@dataclass(frozen=True)
class Rehearsal:
    """How the narrowed network ran.

    Attributes:
        wrong: the first operation of the dense network that came out otherwise, None when all went as predicted.
        problem: what happened there.
        ran: whether that operation was reached at all.
        rescales: rows that make up for numbers in the code which follow a width.
        calls: all operations of the narrowed network.
        factors: by position among the operations compared: what the rows that make up are multiplied by.
    """

    wrong: Node | None
    problem: str
    ran: bool = True
    rescales: tuple[Rescale, ...] = ()
    calls: tuple[Node, ...] = ()
    factors: Mapping[int, float] = field(default_factory=dict)


def rehearse(
    ledger: Ledger, removed: np.ndarray, shell: nn.Module, inputs: tuple[Any, ...], replaced: Sequence[str]
) -> Rehearsal:
    """Run the narrowed network without memory beside the dense one's record.

    Args:
        ledger: of the dense network.
        removed: the channels that went.
        shell: the narrowed network without memory.
        inputs: positional inputs.
        replaced: paths of layers that run other operations than the dense ones.
    """
    ran, problem = _run(shell, inputs, ledger.traced)
    extents, rescales = Extents(ledger), list(_roots(ledger, removed))
    factors: dict[int, float] = {}
    invented = _made_from_nothing(ledger.traced.calls)
    dense = list(_compared(ledger.traced.calls, replaced))
    compact = list(_compared(ran.calls, replaced))
    for position, (expected, found) in enumerate(zip(dense, compact, strict=False)):
        if expected.target != found.target:
            return Rehearsal(expected, f"the code runs {found.target} instead")
        if expected not in ledger.values:
            continue
        for before, after in zip(numbers_of(expected), numbers_of(found), strict=True):
            if before == after:
                continue
            by = factor(expected, before, after)
            rows = scalable(ledger, expected.args[0]) if by is not None else None
            if by is None or rows is None:
                return Rehearsal(expected, "its numbers depend on the width")
            rescales.append(Rescale(rows.weight, rows.bias, rows.rows, by))
            factors[position] = by
        if not _alike(ledger.traced.constants, expected, ran.constants, found):
            return Rehearsal(expected, "it reads a constant that depends on the width")
        if expected in invented:
            continue
        for part, (before_, after_) in enumerate(zip(_tensors(expected), _tensors(found), strict=False)):
            single = isinstance(expected.meta["val"], torch.Tensor)
            wanted = extents.shape(expected, None if single else part, removed)
            spread = [d for d in range(before_.dim()) if before_.stride(d) == 0]  # follows another tensor's size
            if [n for d, n in enumerate(wanted) if d not in spread] != [
                n for d, n in enumerate(after_.shape) if d not in spread
            ]:
                return Rehearsal(expected, f"it gives the shape {list(after_.shape)} instead of {wanted}")
    if len(dense) != len(compact):
        last = dense[min(len(compact), len(dense) - 1)]
        return Rehearsal(last, problem or "the code runs other operations", ran=False)
    return Rehearsal(None, "", True, tuple(rescales), tuple(ran.calls), factors)


def rehearse_elsewhere(
    first: Rehearsal, ledger: Ledger, there: Traced, shell: nn.Module, inputs: tuple[Any, ...], replaced: Sequence[str]
) -> Rehearsal:
    """Whether the narrowed network, at another size with the same operations, reckons with the same numbers.

    Args:
        first: how it ran at the example's size.
        ledger: of the dense network, at the example's size; ``wrong`` is one of its operations.
        there: the dense network at the other size.
        shell: the narrowed network without memory.
        inputs: of the other size.
        replaced: paths of layers that run other operations than the dense ones.
    """
    ran, problem = _run(shell, inputs, there)
    named, dense, compact = (
        list(_compared(calls, replaced)) for calls in (ledger.traced.calls, there.calls, ran.calls)
    )
    for position, (here, expected, found) in enumerate(zip(named, dense, compact, strict=False)):
        if expected.target != found.target:
            return Rehearsal(here, f"at another size the code runs {found.target} instead")
        for before, after in zip(numbers_of(expected), numbers_of(found), strict=True):
            by = None if before == after else factor(expected, before, after)
            wanted = first.factors.get(position)
            if before != after and (by is None or wanted is None or not math.isclose(by, wanted, rel_tol=1e-12)):
                return Rehearsal(here, "at another size its numbers depend on the width")
        if not _alike(there.constants, expected, ran.constants, found):
            return Rehearsal(here, "at another size it reads a constant that depends on the width")
    if len(dense) != len(compact):
        return Rehearsal(named[min(len(compact), len(named) - 1)], problem or "other operations", ran=False)
    return Rehearsal(None, "")


def _made_from_nothing(nodes: Sequence[Node]) -> set[Node]:
    """Tensors such as ``zeros(y.shape)``: their sizes count where they meet others."""
    found: set[Node] = set()
    for node in nodes:
        if operation(node)[0].startswith("new_") or found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _run(shell: nn.Module, inputs: tuple[Any, ...], like: Traced) -> tuple[Recording, str]:
    """What a copy of the shell ran, in the way of the dense network's trace, and why it stopped."""
    light = pytree.tree_map(lambda x: to_meta(x) if isinstance(x, torch.Tensor) else x, inputs)
    network, ran = with_tensors(shell, lambda _, x: x if x.is_meta else x.clone()), Recording()
    try:
        record(network, light, real_constants=like.way == "reckoned", origins=False, into=ran)
    except Exception as error:  # of the network's own code: any class
        return ran, (str(error).strip() or type(error).__name__).splitlines()[0]
    return ran, ""


def _roots(ledger: Ledger, removed: np.ndarray) -> Iterator[Rescale]:
    """Attention divides by the root of its head size; queries make up for the size that it lost."""
    extents = Extents(ledger)
    for node in ledger.divided:
        query = node.args[0]
        assert isinstance(query, Node)
        rows, size = scalable(ledger, query), query.meta["val"].dim() - 1
        kept, dense = extents.size(query, size, removed), query.meta["val"].shape[size]
        if rows is not None and 0 < kept < dense:
            yield Rescale(rows.weight, rows.bias, rows.rows, math.sqrt(kept / dense))


def _compared(nodes: Sequence[Node], replaced: Sequence[str]) -> Iterator[Node]:
    inside = tuple(f"{path}." for path in replaced)
    for node in nodes:
        layer = layer_of(node)
        if not is_pick(node) and operation(node)[0] in _COPIES:
            continue  # contiguous() and the like do nothing, or not, as the strides happen to be
        if layer not in replaced and not layer.startswith(inside or ("\0",)):
            yield node


_COPIES = names("contiguous clone alias detach")


def _tensors(node: Node) -> list[torch.Tensor]:
    found = node.meta["val"]
    return [x for x in (found if isinstance(found, list | tuple) else (found,)) if isinstance(x, torch.Tensor)]


def _alike(dense: Mapping[str, torch.Tensor], expected: Node, compact: Mapping[str, torch.Tensor], found: Node) -> bool:
    """Whether both read the same constant tensors; those of other sizes are judged by their shapes."""
    for before, after in zip(expected.all_input_nodes, found.all_input_nodes, strict=False):
        known, now = dense.get(before.name), compact.get(after.name)
        if known is None or now is None or known.shape != now.shape or known.is_meta or now.is_meta:
            continue
        if not torch.equal(known.cpu(), now.cpu()):
            return False
    return True
