"""Times of a network's layers, dense beside sparse: nothing counted twice, nothing left out.

A runtime fuses, splits and inserts at will, so what it times ("pieces") are added up under the layers they belong to,
and two networks are compared layer by layer. Where a runtime ran several layers as one piece, in either network, they
make one row in both. What only one network has, has a row of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from .table import Cell, Table, significant, times

Part = Literal["product", "behind", "look-up", "conversion", "other"]
ROWS = 20  # of a table, before the rest is added up


@dataclass(frozen=True)
class Piece:
    """What a runtime timed as one.

    Attributes:
        layers: that it belongs to; several where they were fused.
        part: of the layer: the convolution or matrix product itself, what is applied to its results, look-ups of
            channels, conversions of memory layout, or anything else.
        kind: what the runtime calls it, such as ``Conv``.
        ms: in one run.
        layout: memory layout of a convolution, where the runtime tells.
        macs: carried out, with padded channels, where the runtime tells.
    """

    layers: tuple[str, ...]
    part: Part
    kind: str
    ms: float
    layout: str | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Work:
    """What a layer computes at the batch that was timed, as its shapes have it.

    Attributes:
        shapes: of its products, for people: ``("64→128 3×3",)``.
        counts: of every product: channels that one output is a sum of, and channels written.
        macs: multiply-accumulates.
        bytes: of inputs, weights and outputs, each once; what has to be moved at the least.
    """

    shapes: tuple[str, ...] = ()
    counts: tuple[tuple[int, int], ...] = ()
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.shapes + other.shapes, self.counts + other.counts, self.macs + other.macs, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class LayerTime:
    """A layer, or layers that were fused.

    Attributes:
        name: path of its module, or what it does and behind which layer.
        kind: of the piece that takes longest.
        ms: in one run, over all its pieces.
        share: of all layers.
        parts: ms by part, of those it has.
        calls: how many pieces, by part.
        layouts: of its convolutions, where the runtime tells.
        done: multiply-accumulates carried out, where the runtime tells them for all products.
        work: what it computes; without macs where it is no product.
        layers: whose pieces these are.
    """

    name: str
    kind: str
    ms: float
    share: float
    parts: Mapping[Part, float]
    calls: Mapping[Part, int]
    layouts: frozenset[str] = frozenset()
    done: int | None = None
    work: Work = Work()
    layers: tuple[str, ...] = ()

    def part(self, name: Part) -> float:
        """Ms of a part, 0 where there is none."""
        return self.parts.get(name, 0.0)


@dataclass(frozen=True)
class Reason:
    """Why a layer takes longer than its multiply-accumulates predict.

    Attributes:
        kind: one word or two, the same for the same cause.
        text: the numbers behind it.
        ms: how much of the time it accounts for; 0 where it says why nothing was to be gained.
    """

    kind: str
    text: str
    ms: float = 0.0


@dataclass(frozen=True)
class LayerPair:
    """One layer in the dense and in the sparse network; None where a network lacks it."""

    name: str
    dense: LayerTime | None
    sparse: LayerTime | None
    reasons: tuple[Reason, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Dense time over sparse time."""
        if self.dense is None or self.sparse is None or not self.sparse.ms:
            return None
        return self.dense.ms / self.sparse.ms

    @property
    def predicted(self) -> float | None:
        """The same of multiply-accumulates."""
        if self.dense is None or self.sparse is None or not self.dense.work.macs or not self.sparse.work.macs:
            return None
        return self.dense.work.macs / self.sparse.work.macs


@dataclass(frozen=True)
class NetworkLayers:
    """A network's pieces, what its layers compute, and how they were timed.

    Attributes:
        name: of the network.
        pieces: in the order of execution.
        work: by layer; layers that compute nothing may be missing.
        plain_ms: a whole run without the profiler.
        profiled_ms: a whole run with it.
        runs: that the times are of.
        tick_ms: what the profiler counts in.
        profiler: its name.
    """

    name: str
    pieces: tuple[Piece, ...]
    work: Mapping[str, Work] = field(default_factory=dict)
    plain_ms: float = 0.0
    profiled_ms: float = 0.0
    runs: int = 0
    tick_ms: float = 0.0
    profiler: str = ""

    @property
    def total_ms(self) -> float:
        """The sum over all pieces."""
        return sum(piece.ms for piece in self.pieces)


def layers_of(network: NetworkLayers, fused: Iterable[tuple[str, ...]] = ()) -> tuple[LayerTime, ...]:
    """The pieces added up by layer, in the order of execution; their times add up to the network's.

    Args:
        fused: layers that make one row, besides those that pieces of this network join.
    """
    together = _joined([*fused, *(piece.layers for piece in network.pieces)])
    rows: dict[tuple[str, ...], list[Piece]] = {}
    for piece in network.pieces:
        rows.setdefault(together[piece.layers[0]], []).append(piece)
    total = network.total_ms
    return tuple(_added(layers, pieces, network.work, total) for layers, pieces in rows.items())


def median_of(rounds: Sequence[NetworkLayers]) -> NetworkLayers:
    """One network timed several times: of every piece the median, so that a disturbed round does not count.

    Pieces are the same where they are the same number of their kind in the same part of the same layer.

    Args:
        rounds: at least one.
    """
    times: dict[tuple[object, ...], list[float]] = {}
    first: dict[tuple[object, ...], Piece] = {}
    for network in rounds:
        seen: Counter[tuple[object, ...]] = Counter()
        for piece in network.pieces:
            kind = (piece.layers, piece.part, piece.kind, piece.layout, piece.macs)
            key = (*kind, seen[kind])
            seen[kind] += 1
            times.setdefault(key, []).append(piece.ms)
            first.setdefault(key, piece)
    return replace(
        rounds[0],
        pieces=tuple(replace(piece, ms=median(times[key])) for key, piece in first.items()),
        plain_ms=median(network.plain_ms for network in rounds),
        profiled_ms=median(network.profiled_ms for network in rounds),
        runs=sum(network.runs for network in rounds),
    )


def match_layers(dense: NetworkLayers, sparse: NetworkLayers) -> tuple[LayerPair, ...]:
    """Every layer of either network, by name; the longest in the dense one first, then what only the sparse one has."""
    fused = [piece.layers for network in (dense, sparse) for piece in network.pieces]
    before, after = ({row.name: row for row in layers_of(network, fused)} for network in (dense, sparse))
    pairs = [LayerPair(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    return tuple(sorted(pairs, key=_order))


def layer_table(pairs: Sequence[LayerPair], *, rows: int = ROWS, title: str = "Layers", note: str = "") -> Table:
    """Pairs as a table: the ``rows`` longest, the rest added up, and the sum.

    Args:
        pairs: as :func:`match_layers` orders them.
        note: below the table.
    """
    shown, rest = pairs[:rows], pairs[rows:]
    if len(rest) == 1:
        shown, rest = pairs, pairs[:0]
    lines: list[tuple[Cell, ...]] = [_row(pair) for pair in shown]
    if rest:
        lines.append((f"{len(rest)} others", "", *_sums(rest), _of_all(rest), ""))
    lines.append(("all layers", "", *_sums(pairs), _of_all(pairs), ""))
    columns = ("layer", "shape", "dense ms", "share", "sparse ms", "speed-up", "by MACs", "why")
    return Table(title, columns, tuple(lines), note)


def _joined(groups: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """For every name the group of names that it is connected with, in the order in which they first come."""
    group: dict[str, list[str]] = {}
    for names in groups:
        parts = {id(group[name]): group[name] for name in names if name in group}
        merged = [name for part in parts.values() for name in part]
        merged += [name for name in dict.fromkeys(names) if name not in merged]
        for name in merged:
            group[name] = merged
    return {name: tuple(names) for name, names in group.items()}


def _added(layers: tuple[str, ...], pieces: Sequence[Piece], work: Mapping[str, Work], total: float) -> LayerTime:
    ms = sum(piece.ms for piece in pieces)
    products = [piece for piece in pieces if piece.part == "product"]
    told = [piece.macs for piece in products if piece.macs is not None]
    longest = max(pieces, key=lambda piece: piece.ms)
    parts: dict[Part, float] = {}
    for piece in pieces:
        parts[piece.part] = parts.get(piece.part, 0.0) + piece.ms
    return LayerTime(
        name=" + ".join(layers),
        kind=longest.kind,
        ms=ms,
        share=ms / total if total else 0.0,
        parts=parts,
        calls=Counter(piece.part for piece in pieces),
        layouts=frozenset(piece.layout for piece in products if piece.layout is not None),
        done=sum(told) if told and len(told) == len(products) else None,
        work=sum((work[layer] for layer in layers if layer in work), Work()),
        layers=layers,
    )


def _order(pair: LayerPair) -> tuple[bool, float]:
    longest = pair.dense or pair.sparse
    return pair.dense is None, -(longest.ms if longest else 0.0)


def _row(pair: LayerPair) -> tuple[Cell, ...]:
    dense, sparse = pair.dense, pair.sparse
    why = "; ".join(reason.text for reason in pair.reasons)
    return (
        pair.name,
        shape_text(dense, sparse),
        *_cells(dense, sparse),
        _times(pair.ratio),
        _times(pair.predicted),
        why,
    )


def shape_text(dense: LayerTime | None, sparse: LayerTime | None) -> str:
    """Shapes of a layer's products on both sides, once where they are equal."""
    sides = [_shapes(side.work.shapes) for side in (dense, sparse) if side is not None]
    return " ⇒ ".join(dict.fromkeys(side for side in sides if side))


def _shapes(shapes: Sequence[str]) -> str:
    counted = {shape: shapes.count(shape) for shape in shapes}
    return " and ".join(shape if count == 1 else f"{count} of {shape}" for shape, count in counted.items() if shape)


def _cells(dense: LayerTime | None, sparse: LayerTime | None) -> tuple[Cell, ...]:
    share = None if dense is None else f"{100 * dense.share:.1f} %"
    return None if dense is None else _ms(dense.ms), share, None if sparse is None else _ms(sparse.ms)


def _sums(pairs: Sequence[LayerPair]) -> tuple[Cell, ...]:
    dense = sum(pair.dense.ms for pair in pairs if pair.dense)
    share = sum(pair.dense.share for pair in pairs if pair.dense)
    sparse = sum(pair.sparse.ms for pair in pairs if pair.sparse)
    return _ms(dense), f"{100 * share:.1f} %", _ms(sparse), times(dense / sparse) if dense and sparse else None


def _of_all(pairs: Sequence[LayerPair]) -> str | None:
    dense = sum(pair.dense.work.macs for pair in pairs if pair.dense)
    sparse = sum(pair.sparse.work.macs for pair in pairs if pair.sparse)
    return times(dense / sparse) if dense and sparse else None


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else times(ratio)


def _ms(value: float) -> str:
    return significant(value, 3)
