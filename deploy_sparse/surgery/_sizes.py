"""Other input sizes: what is known at the traced size only must not be built into the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ._axes import Ledger
from ._values import Value, lean
from .graph import Doubts, analyse, held
from .trace import layer_of, place, quick_trace

Shapes = tuple[torch.Size, ...]
_SEED = 20220715
_OTHER_OPERATIONS = "would not be the same at other input sizes, where the network runs other operations"


def free_size(inputs: tuple[Any, ...]) -> bool:
    """Whether random inputs of other sizes make sense: floating tensors with a batch axis and nothing else."""
    return all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 0 for x in inputs)


def random_inputs(inputs: tuple[torch.Tensor, ...], shapes: Shapes, generator: torch.Generator) -> tuple[Any, ...]:
    """Standard normal float64 numbers of ``shapes``, on the devices of ``inputs``."""
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)
        for shape, x in zip(shapes, inputs, strict=True)
    )


def grown(shapes: Shapes, larger: Callable[[int, int], int]) -> Shapes:
    """``shapes`` with every axis from the third on made ``larger(size, place counted from the end)``."""
    return tuple(
        torch.Size([n if d < 2 else larger(n, len(shape) - d) for d, n in enumerate(shape)]) for shape in shapes
    )


def slightly_larger(shapes: Shapes) -> Iterator[Shapes]:
    """Other spatial sizes for a comparison: ``H + 2, W + 3``, or twice the size where a multiple is asked for."""
    if any(len(shape) > 2 for shape in shapes):
        yield grown(shapes, lambda n, place: n + (3 if place == 1 else 2))
        yield grown(shapes, lambda n, place: 2 * n)


def analyse_at_any_size(
    module: nn.Module, inputs: tuple[Any, ...], tensors: Mapping[str, torch.Tensor]
) -> tuple[Ledger, Ledger | None]:
    """:func:`analyse`, with only those constants that a second analysis, at another input size, finds again.

    The rules know where a constant depends on the size (a sum over positions); here the rest is found: numbers that
    ``forward()`` reckons from ``x.shape``, which the graph shows as if they were written out, and operations that
    happen at some sizes only. Networks that take no other size keep everything.

    Returns:
        what was learnt, and, where other operations happen at the other size, what was learnt there.
    """
    ledger = analyse(module, inputs, tensors)
    if not free_size(inputs):
        return ledger, None
    for shapes in _much_larger(tuple(x.shape for x in inputs)):
        others = tuple(
            torch.empty(shape, dtype=x.dtype, device="meta") for shape, x in zip(shapes, inputs, strict=True)
        )
        traced = quick_trace(module, others, tensors)
        if traced is None:
            continue
        alike = _steps(ledger.traced.nodes) == _steps(traced.nodes)
        if alike and not _has_constants(ledger):
            return ledger, None
        other = analyse(module, others, tensors, again=ledger, traced=traced)
        if doubts := _doubts(ledger, other):
            ledger = analyse(module, inputs, tensors, doubts=doubts, again=ledger, traced=ledger.traced)
        return ledger, None if alike else other
    return ledger, None


def _much_larger(shapes: Shapes) -> Iterator[Shapes]:
    """Other batch and spatial sizes for an analysis: far enough apart that ``x.shape[2] // 8`` changes as well."""
    batches = tuple(torch.Size([3 if shape[0] != 3 else 2, *shape[1:]]) for shape in shapes)
    if any(len(shape) > 2 for shape in shapes):
        yield grown(batches, lambda n, place: n + n // 2 + (2 if place == 1 else 1))
        yield grown(batches, lambda n, place: 2 * n)
    if any(len(shape) == 3 for shape in shapes):  # [batch, tokens, features]
        yield tuple(torch.Size([s[0], s[1] + s[1] // 2 + 1, s[2]]) if len(s) == 3 else s for s in batches)
    yield batches


def _has_constants(ledger: Ledger) -> bool:
    """Whether any channel holds a constant other than zero: only such numbers can depend on the size."""
    return any(
        not value.state and value.tracked and bool((lean(value.constant).nan_to_num() != 0).any())
        for node in ledger.values
        for value in held(ledger, node)
    )


def _doubts(ledger: Ledger, other: Ledger) -> Doubts:
    """By position in the graph: which constants are not the same at the other size, one mask for each output.

    Every step is compared, not only what layers read: ``relu(c - height)`` may be zero at both sizes by chance.
    """
    nodes, others = ledger.traced.nodes, other.traced.nodes
    matching = _matched(nodes, others)
    doubts = {}
    for position, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        values = held(ledger, node)
        counterpart = matching.get(position)
        theirs = held(other, others[counterpart]) if counterpart is not None else (None,) * len(values)
        masks = tuple(_differs(v, match) for v, match in zip(values, theirs, strict=True))
        if any(bool(mask.any()) for mask in masks):
            size = f"would depend on the size of the input in {place(node)}"
            doubts[position] = (_OTHER_OPERATIONS if counterpart is None else size, masks)
    return doubts


def _steps(nodes: Sequence[Node]) -> list[tuple[Any, str]]:
    return [(node.target, layer_of(node)) for node in nodes]


def _matched(nodes: Sequence[Node], others: Sequence[Node]) -> dict[int, int]:
    """Positions of the operations that happen at both sizes, in the same order."""
    mine, theirs = _steps(nodes), _steps(others)
    if mine == theirs:
        return {position: position for position in range(len(mine))}
    blocks = SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
    return {block.a + i: block.b + i for block in blocks for i in range(block.size)}


def _differs(value: Value, other: Value | None) -> torch.Tensor:
    mine = lean(value.constant)
    theirs = None if other is None else lean(other.constant)
    if theirs is None or theirs.shape != mine.shape:
        return ~mine.isnan() & (mine != 0)
    return ~mine.isnan() & ~torch.isclose(mine, theirs, rtol=1e-9, atol=0)
