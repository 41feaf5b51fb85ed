"""The multiple that channel counts are to be rounded up to, read from a layer's times at neighbouring counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

from .shapes import LayerShape

LARGEST = 128  # of the boundary that is looked at: there a step of 16 still is a quarter of the time
FREE = 1.05  # a single count may cost this much more rounded up, and as much again where there is noise
STEPS = 4  # that there are at least: a longer one would leave little to choose
PAID = 0.5  # share of the multiply-accumulates that rounding adds which its time may add
MEDIAN = math.pi / 2  # variance of a median over that of a mean
NOISE = 0.05  # standard error of a time from which on nothing is told
ERRORS = 3.0  # standard errors that a verdict keeps away from the limit


@dataclass(frozen=True)
class Staircase:
    """A layer's times in ms with ``c`` input and ``c`` output channels, for neighbouring ``c``.

    Attributes:
        layer: the layer, at its dense counts.
        passes: times at each count, of several passes: how far they differ says what noise there is.
    """

    layer: LayerShape
    passes: tuple[Mapping[int, float], ...]

    @property
    def ms(self) -> dict[int, float]:
        """The median of the passes at each count."""
        return {count: median(found[count] for found in self.passes) for count in self.passes[0]}

    @property
    def noise(self) -> float:
        """Standard error of the logarithm of a time in ``ms``."""
        logs = [[math.log(found[count]) for found in self.passes] for count in self.passes[0]]
        if not logs or len(self.passes) < 2:
            return 0.0
        return math.sqrt(MEDIAN * fmean(variance(times) for times in logs) / len(self.passes))

    @property
    def multiple(self) -> int:
        """The largest multiple, of at most a quarter of the counts, up to which rounding adds no time; 1 where there is
        none or the noise hides it."""
        most = max(self.passes[0], default=0) // STEPS if self.noise < NOISE else 0
        return max((m for m in (2, 4, 8, 16, 32) if m <= most and self._is_free(m)), default=1)

    @property
    def dearest(self) -> float:
        """Time of the count that gains most by rounding up to the multiple, over that count's time rounded up."""
        ms = self.ms
        return max((ms[count] / ms[up] for count, up in self._pairs(self.multiple)), default=1.0)

    def _is_free(self, multiple: int) -> bool:
        """Whether rounding up adds less than half the time that its multiply-accumulates would add, over all counts (so
        that there is a step), and no more than 5 % at any of them (so that it is no longer than the multiple)."""
        pairs = self._pairs(multiple)
        if not pairs:
            return False
        ms, layer = self.ms, self.layer
        time = [math.log(ms[up] / ms[count]) for count, up in pairs]
        macs = [math.log(layer.with_counts(up, up).macs / layer.with_counts(count, count).macs) for count, up in pairs]
        shared = Counter(up for _, up in pairs)  # one noisy time stands in several pairs
        error = self.noise * math.sqrt(sum(count * count + count for count in shared.values()))
        if sum(time) + ERRORS * error >= PAID * sum(macs):
            return False
        return max(time) <= math.log(FREE) + min(math.log(FREE), ERRORS * math.sqrt(2) * self.noise)

    def _pairs(self, multiple: int) -> list[tuple[int, int]]:
        """(count, what it is rounded up to) where both were timed and differ."""
        pairs = [(count, -(-count // multiple) * multiple) for count in self.passes[0]]
        return [(count, up) for count, up in pairs if up != count and up in self.passes[0]]


def counts_of(shape: LayerShape) -> tuple[int, ...]:
    """The counts to time: all of the last 16 before a boundary, and some further down; none of narrow layers."""
    boundary = 1 << min(shape.c_in, shape.c_out, LARGEST).bit_length() - 1
    if boundary < 32 or (shape.kind == "conv" and shape.groups > 1):
        return ()
    low, quarter = boundary // 2, boundary // 4
    further = {low, low + 1, low + quarter, low + quarter + 1}
    return tuple(sorted(further | set(range(boundary - 16, boundary + 1))))


def multiple_of(staircases: Sequence[Staircase], weights: Sequence[float]) -> int:
    """The multiple of the layers that take most of the time; 1 without layers."""
    shares: dict[int, float] = {}
    for found, weight in zip(staircases, weights, strict=True):
        shares[found.multiple] = shares.get(found.multiple, 0.0) + weight
    return max(shares, key=lambda multiple: shares[multiple], default=1)
