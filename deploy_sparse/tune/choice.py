"""What the planner timed, what it left out and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.target import Target
from ..measure.compare import REOPENING

FLOOR = 0.98  # of dense at the batches that are not the first


@dataclass(frozen=True)
class LayerTime:
    """A layer packed against the same layer dense, on the target.

    Attributes:
        layer: path.
        form: of its blocks, and the look-ups around them.
        share: of its multiply-accumulates that are left.
        ratio: dense time over packed time.
        packed: whether it is packed in the end.
    """

    layer: str
    form: str
    share: float
    ratio: float
    packed: bool


@dataclass(frozen=True)
class BatchTime:
    """Dense time over a network's time at one batch, with the 95 % interval; None with too few pairs for one."""

    batch: int
    ratio: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class NetworkTime:
    """A whole network against the dense one.

    Attributes:
        name: how it is deployed.
        macs: multiply-accumulates of one sample.
        ratio, low, high: dense time over its time at the first batch, with the 95 % interval; None with too few pairs
            for one.
        others: the same at the other batches.
    """

    name: str
    macs: int
    ratio: float
    low: float | None
    high: float | None
    others: tuple[BatchTime, ...] = ()

    @property
    def wins(self) -> bool:
        """Whether a report would call it faster at the first batch, and it surely keeps ``FLOOR`` of dense's speed at
        all others."""
        kept = all(other.low is not None and other.low >= FLOOR for other in self.others)
        return kept and self.low is not None and self.low > 1 + REOPENING

    def __str__(self) -> str:
        others = "".join(f", {other.ratio:.2f}x at batch {other.batch}" for other in self.others)
        return f"{self.ratio:.2f}x as fast as dense{others}"


@dataclass(frozen=True)
class Choice:
    """What was timed and what was taken.

    Attributes:
        name: of the network taken.
        target: its name.
        batch: samples of a timed call.
        layers: packed against dense, layer by layer.
        networks: whole networks against the dense one.
        again: the fastest of them timed once more, until one is faster again; that is the one taken.
        others: other batches, at which a network must not lose.
        dropped: networks and layers that could not be made, exported, compiled or run, with the reason.
    """

    name: str
    target: str
    batch: int
    layers: tuple[LayerTime, ...]
    networks: tuple[NetworkTime, ...]
    again: tuple[NetworkTime, ...] = ()
    others: tuple[int, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """The choice in a few lines of text."""
        found = [f"chosen for {self.target} at {_batches((self.batch, *self.others))}: {self.name}"]
        found += [f"  {network.name}: {network}" for network in self.networks]
        found += [f"  {network.name}, timed once more: {network}" for network in self.again]
        if self.layers:
            packed = sum(layer.packed for layer in self.layers)
            found.append(f"  {packed} of {len(self.layers)} layers of blocks are faster packed")
        return found + [f"  left out: {name}: {why}" for name, why in self.dropped]


def planned_for(target: Target, batches: Sequence[int], align: bool) -> str:
    """What a choice holds for, as plans keep it: another target, batch or rounding of widths needs another choice."""
    return f"{target.name} ({target.digest[:12]}) at {_batches(batches)}{'' if align else ', widths not rounded up'}"


def _batches(batches: Sequence[int]) -> str:
    return f"batch{'es' * (len(batches) > 1)} {', '.join(map(str, batches))}"
