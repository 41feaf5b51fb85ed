"""Other input sizes: what is known at the traced size only must not be built into the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn

from ._agreement import same_constants, same_operations
from ._axes import Ledger
from ._nodes import Node
from ._values import Value, lean, varying
from .graph import Doubts, analyse, held
from .trace import Traced, layer_of, place, quick_trace

Shapes = tuple[torch.Size, ...]
_SEED = 20220715
_OTHER_OPERATIONS = "would not be the same at other input sizes, where the network runs other operations"


@dataclass(frozen=True)
class Setup:
    """Inputs of another size.

    Attributes:
        inputs: without memory.
        traced: the dense network's operations there.
        ledger: what was learnt there, None where that can be nothing new.
        alike: the same operations happen as at the example's size.
    """

    inputs: tuple[Any, ...]
    traced: Traced
    ledger: Ledger | None
    alike: bool


def free_size(inputs: tuple[Any, ...]) -> bool:
    """Whether random inputs make sense: floating tensors with a batch axis; what is no tensor stays as it is."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    return bool(tensors) and all(x.is_floating_point() and x.dim() > 0 for x in tensors)


def shapes_of_inputs(inputs: tuple[Any, ...]) -> Shapes:
    """The shape of each input, an empty one for what is no tensor."""
    return tuple(x.shape if isinstance(x, torch.Tensor) else torch.Size() for x in inputs)


def random_inputs(inputs: tuple[Any, ...], shapes: Shapes, generator: torch.Generator) -> tuple[Any, ...]:
    """Standard normal float64 numbers of ``shapes``, on the devices of ``inputs``."""
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device) if isinstance(x, torch.Tensor) else x
        for shape, x in zip(shapes, inputs, strict=True)
    )


def grown(shapes: Shapes, larger: Callable[[int, int], int], axes: frozenset[int] | None = None) -> Shapes:
    """``shapes`` with some axes made ``larger(size, place counted from the end)``: ``axes``, or from the third on."""
    return tuple(
        torch.Size(
            [larger(n, len(shape) - d) if (d > 1 if axes is None else d in axes) else n for d, n in enumerate(shape)]
        )
        for shape in shapes
    )


def slightly_larger(shapes: Shapes) -> tuple[tuple[Shapes, ...], ...]:
    """Other sizes for a comparison, in families of which the first that runs is taken.

    Heights and widths that are even and odd, or twice the size where a multiple is asked for; and axis 1 too, for
    networks whose channels lie elsewhere.
    """
    rank = max((len(shape) for shape in shapes), default=0)
    if rank < 3:
        return ()
    mixed = grown(shapes, lambda n, place: n + (3 if place == 1 else 2))
    odd = grown(shapes, lambda n, place: n + (2 if place == 1 else 1))
    first = tuple(grown(shapes, lambda n, _: n + 1, axes) for axes in _axis_sets(rank) if 1 in axes)
    return (mixed, grown(shapes, lambda n, _: 2 * n)), (odd,), first


def _axis_sets(rank: int) -> list[frozenset[int]]:
    """All axes but the batch's, and all but one of them, as one holds channels."""
    every = frozenset(range(1, rank))
    return [every, *(every - {d} for d in sorted(every))]


def analyse_at_any_size(
    module: nn.Module, inputs: tuple[Any, ...], tensors: Mapping[str, torch.Tensor]
) -> tuple[Ledger, tuple[Setup, ...]]:
    """:func:`analyse`, with only those constants that analyses at other input sizes find again.

    The rules know where a constant depends on the size (a sum over positions); here the rest is found: numbers that
    ``forward()`` reckons from ``x.shape``, which the graph shows as if they were written out, and operations that
    happen at some sizes only, such as padding of odd ones. Networks that take no other size keep everything.

    Returns:
        what was learnt, and the other sizes.
    """
    ledger = analyse(module, inputs, tensors)
    constants = _has_constants(ledger)
    setups: list[Setup] = []
    doubts: dict[int, tuple[str, tuple[torch.Tensor, ...]]] = {}
    families = [] if ledger.traced.real else list(_much_larger(inputs, thorough=constants))
    failed = 0  # ways to change the sizes that the network does not take
    for family in families[: 2 if constants and _read_constants(ledger) else 1]:
        setup = None
        for number, others in enumerate(family[failed:], start=failed):
            if (traced := quick_trace(module, others, ledger.traced, origins=False)) is not None:
                setup, failed = Setup(others, traced, None, True), number
                break
        if setup is None:
            continue
        alike = same_operations(ledger.traced, setup.traced)
        if not alike or not same_constants(ledger, setup.traced):
            there = None if alike else quick_trace(module, setup.inputs, ledger.traced, origins=True)
            other = analyse(module, setup.inputs, tensors, again=ledger, traced=there or setup.traced)
            setup = replace(setup, traced=other.traced, ledger=other, alike=alike)
            _join(doubts, _doubts(ledger, other))
        setups.append(setup)
    if doubts:
        ledger = analyse(module, inputs, tensors, doubts=doubts, again=ledger, traced=ledger.traced)
    return ledger, tuple(setups)


def _join(known: dict[int, tuple[str, tuple[torch.Tensor, ...]]], more: Doubts) -> None:
    for position, (cause, masks) in more.items():
        if position in known:
            first, before = known[position]
            known[position] = (first, tuple(a | b for a, b in zip(before, masks, strict=True)))
        else:
            known[position] = (cause, masks)


def _much_larger(inputs: tuple[Any, ...], *, thorough: bool) -> Iterator[list[tuple[Any, ...]]]:
    """Other batch and spatial sizes for an analysis, far enough apart that ``x.shape[2] // 8`` changes as well.

    Families of which the first that runs is taken: one with even and odd sizes, and one the other way round. All
    inputs without memory; what is no tensor stays as it is.

    Args:
        thorough: look for axes of free size in any layout, not only where images and tokens have theirs.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not tensors:
        return
    first = tensors[0].shape[0]
    rank = max(x.dim() for x in tensors)
    images, words = frozenset(range(2, rank)), frozenset(range(1, rank))
    ways = [(images, words), (images, frozenset[int]()), (frozenset({1}), words)]
    if thorough and rank > 2:
        ways = [*((axes, words) for axes in _axis_sets(rank)), *ways]

    def made(
        floats: frozenset[int], integers: frozenset[int], larger: Callable[[int, int], int], batch: int = 3
    ) -> tuple[Any, ...]:
        """Inputs with another batch, and larger along some axes of floating and of integer tensors."""

        def size(x: torch.Tensor, d: int, n: int) -> int:
            if d == 0:
                return n if n != first else batch if batch != first else 2
            return larger(n, x.dim() - d) if d in (floats if x.is_floating_point() else integers) else n

        return tuple(
            torch.empty([size(x, d, n) for d, n in enumerate(x.shape)], dtype=x.dtype, device="meta")
            if isinstance(x, torch.Tensor)
            else _other_number(x)
            for x in inputs
        )

    def odd_heights(n: int, place: int) -> int:
        return n + n // 2 + (1 if place % 2 == 0 else 2)

    def odd_widths(n: int, place: int) -> int:
        return n + n // 2 + (2 if place % 2 == 0 else 1)

    nothing = frozenset[int]()
    yield [
        *(made(*axes, odd_heights) for axes in ways),
        *(made(*axes, lambda n, _: 2 * n) for axes in ways),
        made(nothing, nothing, lambda n, _: n),
    ]
    yield [
        *(made(*axes, odd_widths, batch=1) for axes in ways),
        *(made(*axes, lambda n, _: 4 * n, batch=1) for axes in ways),
        made(nothing, nothing, lambda n, _: n, batch=1),
    ]


def _other_number(value: Any) -> Any:
    """Another one for a fraction, which the network may reckon with; anything else may be a choice."""
    return 1.25 * value + 0.125 if isinstance(value, float) else value


def _has_constants(ledger: Ledger) -> bool:
    """Whether any channel holds a constant other than zero: only such numbers can depend on the size."""
    return any(
        not value.state and value.tracked and bool((lean(value.constant).nan_to_num() != 0).any())
        for node in ledger.values
        for value in held(ledger, node)
    )


def _read_constants(ledger: Ledger) -> bool:
    """Whether constants other than zero reach a layer or a norm that counts them."""
    reads = any(bool(((r.constant.nan_to_num() != 0) & ~r.ignored).any()) for r in ledger.reads)
    return reads or any(bool((use.constant.nan_to_num() != 0).any()) for use in ledger.norms)


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
        theirs: tuple[Value | None, ...] = held(other, others[counterpart]) if counterpart is not None else ()
        if len(theirs) != len(values):  # as many parts as there are positions
            theirs = (None,) * len(values)
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
    """Where a constant is not the same at the other size; zero passes where positions of channels do not compare."""
    mine = lean(value.constant)
    nonzero = ~mine.isnan() & (mine != 0)
    if other is None or other.constant.dim() != mine.dim():
        return nonzero
    theirs = lean(other.constant)
    if theirs.shape != mine.shape:
        if any(value.shape[d] != other.shape[d] for d in {*varying(value.atoms), *varying(other.atoms)}):
            return nonzero
        live = theirs != 0
        for d in range(mine.dim()):
            live = live if value.shape[d] == other.shape[d] else live.any(dim=d, keepdim=True)
        return nonzero | (~mine.isnan() & live)
    return ~mine.isnan() & ~torch.isclose(mine, theirs, rtol=1e-9, atol=0)
