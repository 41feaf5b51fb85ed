"""Why a layer takes longer than its multiply-accumulates (MACs) predict: what was measured, laid against its shapes.

The prediction is the dense layer's time, times the share of its MACs that is left. What a layer takes beyond it is
split by the parts that the profile has (product, look-ups, conversions, what is applied behind), each against its own
prediction; the product's excess then goes to the first cause whose numbers bear it, in the order of how surely they do:
channels, overhead of a call, memory. The rest is called not explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .layers import LayerPair, LayerTime, NetworkLayers, Part, Reason, Work
from .table import count, significant

REACHED = 0.95  # of the predicted speed-up: no reason is asked for
NEAR_FLOOR = 2.0  # times the shortest piece: most of a call is overhead
MINOR = 0.1  # of what a layer takes too long: no cause of its own
BLOCKED, PLAIN = "NCHWc", "plain"  # memory layouts of ONNX Runtime's convolutions
_AROUND: dict[Part, str] = {
    "look-up": "look-ups of channels",
    "conversion": "conversions of the memory layout",
    "behind": "additions, activations and rescaling that are not fused",
    "other": "other operators",
}


@dataclass(frozen=True)
class Machine:
    """What the machine reached while the layers were timed.

    Attributes:
        macs_per_ms: best rate of any product of either network.
        best: the layer that reached it.
        floor_ms: shortest piece of either network.
        tick_ms: what the profiler counts in.
        move_ms: from bytes to the ms that moving them takes at the least.
        moved_by: how that is known.
        multiple: channel counts that the target wants multiples of.
        tells: whether the runtime tells memory layouts, and so which channel counts cost it what.
    """

    macs_per_ms: float
    best: str
    floor_ms: float
    tick_ms: float
    move_ms: Callable[[int], float]
    moved_by: str
    multiple: int
    tells: bool = False

    def lines(self) -> tuple[str, ...]:
        """What the reasons rest on."""
        return (
            f"most MACs a second: {_rate(self.macs_per_ms)}, by {self.best}; memory: {self.moved_by}",
            f"shortest piece: {_ms(self.floor_ms)} ms; the target wants channel counts in multiples of {self.multiple}",
        )


def machine_of(
    networks: Sequence[NetworkLayers],
    pairs: Sequence[LayerPair],
    multiple: int,
    move_ms: Callable[[int], float] | None = None,
    moved_by: str = "",
) -> Machine:
    """What the networks' layers reached.

    Args:
        networks: as timed.
        pairs: of their layers.
        multiple: channel counts that the target wants multiples of.
        move_ms: measured apart from them; without it the layer that moves most bytes a second stands for the memory.
        moved_by: how it was measured.
    """
    sides = [side for pair in pairs for side in (pair.dense, pair.sparse) if side is not None]
    rates = [(row.work.macs / ms, row.name) for row in sides if (ms := row.part("product"))]
    rate, best = max(rates, default=(0.0, "none"))
    if move_ms is None:
        most, where = max(((row.work.bytes / row.ms, row.name) for row in sides if row.ms), default=(0.0, "none"))

        def of_layers(size: int) -> float:
            return size / most if most else 0.0

        move_ms, moved_by = of_layers, f"{significant(most / 1e6, 3)} GB/s, the most of any layer ({where})"
    pieces = [piece.ms for network in networks for piece in network.pieces if piece.ms > 0]
    tick = max((network.tick_ms for network in networks), default=0.0)
    tells = any(piece.layout is not None for network in networks for piece in network.pieces)
    return Machine(rate, best, max(min(pieces, default=0.0), tick), tick, move_ms, moved_by, multiple, tells)


def explained(pairs: Sequence[LayerPair], machine: Machine) -> tuple[LayerPair, ...]:
    """The pairs with their reasons."""
    return tuple(replace(pair, reasons=reasons(pair, machine)) for pair in pairs)


def reasons(pair: LayerPair, machine: Machine) -> tuple[Reason, ...]:
    """Why a layer falls short of what its MACs predict, the costliest cause first; none where it does not."""
    dense, sparse = pair.dense, pair.sparse
    if sparse is None:
        return (Reason("one side", "only in the dense network"),)
    if dense is None:
        return (Reason("one side", "only in the sparse network", 0.0 if sparse.work.macs else sparse.ms),)
    if pair.predicted is None:
        return _without_macs(dense, sparse, machine)
    share = 1 / pair.predicted
    excess = sparse.ms - share * dense.ms
    unchanged = _same(dense.work, sparse.work)
    same = (Reason("unchanged", f"unchanged: {_shape(sparse)} in both"),) if unchanged else ()
    if excess <= (1 - REACHED) * sparse.ms:
        return same
    if excess <= 2 * machine.tick_ms:
        text = f"too short to tell: {_ms(excess)} ms too long, and the profiler counts in {_ms(machine.tick_ms)}"
        return same or (Reason("too short", text),)
    found = [*_around(dense, sparse, share), *_product(dense, sparse, share, machine)]
    kept = [reason for reason in found if reason.ms >= MINOR * excess]
    rest = excess - sum(reason.ms for reason in kept)
    if rest >= MINOR * excess or not kept:
        kept.append(Reason("not explained", f"not explained: {_ms(rest)} ms; {_rates(dense, sparse)}", rest))
    return (*same, *sorted(kept, key=lambda reason: (reason.kind == "not explained", -reason.ms)))


def _around(dense: LayerTime, sparse: LayerTime, share: float) -> list[Reason]:
    """Of what is not the product: what it takes beyond its share of the dense layer's."""
    found = []
    for part, what in _AROUND.items():
        before, after = dense.part(part), sparse.part(part)
        if (over := after - share * before) > 0:
            beside = f", in dense {_ms(before)} ms" if before else ""
            found.append(Reason(part, f"{what}: {_ms(after)} ms, {100 * after / sparse.ms:.0f} % of it{beside}", over))
    return found


def _product(dense: LayerTime, sparse: LayerTime, share: float, machine: Machine) -> list[Reason]:
    """Of the convolutions and matrix products themselves: each cause takes what it can bear of what is left."""
    predicted, took = share * dense.part("product"), sparse.part("product")
    rest = took - predicted
    found: list[Reason] = []
    for cause in (_filled_up, _fixed_cost, _off_multiple, _moving):
        if rest <= machine.tick_ms:
            break
        if (reason := cause(dense, sparse, predicted, rest, machine)) is not None:
            found.append(reason)
            rest -= reason.ms
    return found


def _filled_up(dense: LayerTime, sparse: LayerTime, predicted: float, rest: float, _: Machine) -> Reason | None:
    """Channels that the runtime adds up to its next step, of which it tells the sizes."""
    if not (dense.done and sparse.done and dense.work.macs and sparse.work.macs):
        return None
    more = (sparse.done / sparse.work.macs) / (dense.done / dense.work.macs)
    if more <= 1.001:
        return None
    text = (
        f"channels filled up to the runtime's next step ({_shape(sparse)}): "
        f"{count(sparse.done)} MACs for {count(sparse.work.macs)}"
    )
    return Reason("width", text, min(rest, predicted * (more - 1)))


def _fixed_cost(dense: LayerTime, sparse: LayerTime, _: float, rest: float, machine: Machine) -> Reason | None:
    """What every call costs whatever it computes: at the least what the shortest piece takes."""
    calls, before = sparse.calls.get("product", 0), dense.calls.get("product", 0)
    if not calls:
        return None
    each = sparse.part("product") / calls
    often = f" in {calls} calls" if calls > 1 else ""
    if each <= NEAR_FLOOR * machine.floor_ms:
        text = f"overhead: {_ms(each)} ms a call{often}, where the shortest piece takes {_ms(machine.floor_ms)}"
        return Reason("overhead", text, rest)
    fixed = machine.floor_ms * (calls - before * sparse.work.macs / dense.work.macs)
    if fixed <= 0:
        return None
    text = f"overhead: {_ms(machine.floor_ms)} ms of the {_ms(each)} of a call{often}, as the shortest piece takes that"
    return Reason("overhead", text, min(rest, fixed))


def _off_multiple(dense: LayerTime, sparse: LayerTime, _: float, rest: float, machine: Machine) -> Reason | None:
    """Channel counts for which the runtime has no fast kernel; where it tells no layouts, counts off the multiple."""
    if machine.tells:
        if BLOCKED not in dense.layouts or not sparse.layouts - {BLOCKED}:
            return None
        read = sorted({read for read, _ in sparse.work.counts})
        off = [n for n in read if n % machine.multiple]
        if PLAIN in sparse.layouts:
            why = f"{_listed(off)} channels read are no multiple of {machine.multiple}, so " if off else ""
            return Reason("width", f"{why}not in the {BLOCKED} layout: {_rates(dense, sparse)}", rest)
        text = f"{_listed(read)} channels read do not fill a block of the {BLOCKED} layout: {_rates(dense, sparse)}"
        return Reason("width", text, rest)
    before, after = ({n for pair in side.work.counts for n in pair} for side in (dense, sparse))
    off = sorted(n for n in after - before if n % machine.multiple)
    if not off:
        return None
    return Reason(
        "width", f"{_listed(off)} channels are no multiple of {machine.multiple}: {_rates(dense, sparse)}", rest
    )


def _moving(dense: LayerTime, sparse: LayerTime, predicted: float, rest: float, machine: Machine) -> Reason | None:
    """Memory, where moving a layer's numbers alone takes longer than its MACs predict, and than they must take."""
    moving, computing = machine.move_ms(sparse.work.bytes), _best_ms(sparse, machine)
    if moving <= max(predicted, computing):
        return None
    text = (
        f"memory: moving its {count(sparse.work.bytes)}B takes {_ms(moving)} ms at the least, "
        f"its MACs {_ms(computing)} at the best rate"
    )
    return Reason("memory", text, min(rest, moving - predicted))


def _without_macs(dense: LayerTime, sparse: LayerTime, machine: Machine) -> tuple[Reason, ...]:
    """Of a layer without products nothing is predicted."""
    each = sparse.ms / max(sum(sparse.calls.values()), 1)
    if each <= NEAR_FLOOR * machine.floor_ms:
        text = f"overhead: {_ms(each)} ms a call, where the shortest piece takes {_ms(machine.floor_ms)}"
        return (Reason("overhead", text),)
    if dense.work.bytes and sparse.work.bytes:
        return (Reason("no MACs", f"no MACs; moves {count(sparse.work.bytes)}B, {count(dense.work.bytes)}B in dense"),)
    return (Reason("no MACs", "no MACs"),)


def _same(dense: Work, sparse: Work) -> bool:
    return (dense.macs, dense.bytes, dense.counts) == (sparse.macs, sparse.bytes, sparse.counts)


def _best_ms(row: LayerTime, machine: Machine) -> float:
    return row.work.macs / machine.macs_per_ms if machine.macs_per_ms else 0.0


def _rates(dense: LayerTime, sparse: LayerTime) -> str:
    after, before = (row.work.macs / ms if (ms := row.part("product")) else 0.0 for row in (sparse, dense))
    return f"{_rate(after)}, and {_rate(before)} in dense"


def _rate(macs_per_ms: float) -> str:
    return f"{significant(macs_per_ms / 1e6, 3)} GMAC/s"


def _shape(row: LayerTime) -> str:
    shapes = list(dict.fromkeys(shape for shape in row.work.shapes if shape))
    return " and ".join(shapes) or row.kind


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) if len(numbers) < 4 else f"{numbers[0]}, {numbers[1]} …"


def _ms(value: float) -> str:
    return significant(value, 3)
