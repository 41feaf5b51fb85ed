"""In-place operations: every tensor over the same memory holds the result too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ._axes import Ledger
from ._nodes import Node, overwritten
from ._values import UNTRACKED, Value, compressed, untracked
from .trace import place

_FOLLOWED = 1 << 22  # elements of memory; larger ones are given up


def overwrite(ledger: Ledger, node: Node, position: int, last_use: dict[Node, int]) -> None:
    """After an in-place operation, bring the values of all tensors over the same memory up to date."""
    for target in overwritten(node):
        result = ledger.values[node]
        if not isinstance(result, Value) or not memories(node) & memories(target):  # it gives something else
            ledger.value(target)
            for other in list(ledger.values):
                if memories(other) & memories(target):
                    _give_up_view(ledger, other, f"{place(node)} writes into it")
            continue
        if last_use.get(target, -1) > position:
            ledger.value(target)
            ledger.values[target] = result
        for other in list(ledger.values):
            stale = last_use.get(other, -1) > position and other not in (node, target)
            if not stale or not memories(other) & memories(target):
                continue
            if _extent(other) == _extent(target):
                ledger.values[other] = result
            else:
                _write_through(ledger, other, node, result)


def _write_through(ledger: Ledger, other: Node, node: Node, result: Value) -> None:
    """``other`` shows part of the memory just written, or more than that."""
    known, mine, theirs = ledger.values[other], other.meta["val"], node.meta["val"]
    size = 1 + max(_last(t) for t in (mine, theirs) if isinstance(t, torch.Tensor))
    if not isinstance(known, Value) or not isinstance(mine, torch.Tensor) or size > _FOLLOWED:
        _give_up_view(ledger, other, f"memory shared with in-place {place(node)}")
        return

    def seen(before: torch.Tensor, written: torch.Tensor, empty: float) -> torch.Tensor:
        memory = torch.full((size,), empty, dtype=before.dtype)
        _view(memory, mine).copy_(before)
        _view(memory, theirs).copy_(written)
        return compressed(_view(memory, mine).clone())

    atoms = seen(known.atoms, result.atoms, UNTRACKED)
    constant = seen(known.constant, result.constant, torch.nan)
    ledger.values[other] = replace(
        known,
        atoms=atoms,
        constant=constant,
        why=known.why or result.why,
        producer=None,
        scales_with=None,
        sums_to_one=False,
    )


def _view(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(like.shape, like.stride(), like.storage_offset())


def _last(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _give_up_view(ledger: Ledger, node: Node, why: str) -> None:
    known = ledger.values[node]
    values = known if isinstance(known, tuple) else (known,)
    for value in values:
        ledger.pin(value, why)
    changed = tuple(untracked(value.shape, why) for value in values)
    ledger.values[node] = changed if isinstance(known, tuple) else changed[0]


def memories(node: Node) -> set[int]:
    """What tells the memory of an operation's results from any other."""
    outputs = node.meta.get("val")
    tensors = outputs if isinstance(outputs, list | tuple) else (outputs,)
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)}


def _extent(node: Node) -> tuple[Any, ...]:
    tensor = node.meta["val"]
    if not isinstance(tensor, torch.Tensor):
        return (node,)
    return (tensor.shape, tensor.stride(), tensor.storage_offset())
