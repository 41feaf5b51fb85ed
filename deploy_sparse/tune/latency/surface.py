"""A layer's latency over its input and output channels, from a few measured points.

Counts are rounded up to whole steps. Along the two edges, where the other count is the dense one, times are joined by
straight lines. In between stands the product of the edges, as latency nearly is a product, times a correction that is
measured on a coarse grid and linear in the logarithms of the counts. So every measured point of edges and grid is met.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...errors import ConfigError
from .shapes import LayerShape

Point = tuple[int, int]


@dataclass(frozen=True)
class Surface:
    """Latency in ms of one layer alone.

    Attributes:
        layer: at its dense counts.
        step: counts are rounded up to multiples of it, never above the dense ones.
        points: measured ms by (c_in, c_out); of depthwise layers c_out follows c_in.
        rows, columns: input and output counts of the grid on which the correction was measured.
        checks: measured ms of points that the surface does not use: they say how good it is.
        settled: whether nothing more is to be measured; False where time ran out before.
    """

    layer: LayerShape
    step: int
    points: Mapping[Point, float]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    checks: Mapping[Point, float] = field(default_factory=dict)
    settled: bool = True

    def ms(self, c_in: int, c_out: int) -> float:
        """Latency with these counts.

        Raises:
            ConfigError: a count below 1 or above the dense one: nothing was measured there.
        """
        for name, count, most in (("input", c_in, self.layer.c_in), ("output", c_out, self.layer.c_out)):
            if isinstance(count, bool) or not 1 <= count <= most:
                raise ConfigError(
                    f"{count} {name} channels of the layer {self.layer}",
                    expected=f"a count from 1 to {most}, the range that was measured",
                    fix="ask for a narrower layer, or make a table of the wider network",
                )
        i, j = rounded(c_in, self.layer.c_in, self.in_step), rounded(c_out, self.layer.c_out, self.out_step)
        whole = self.points[self.layer.c_in, self.layer.c_out]
        along_in = _joined(self._in_edge, i)
        if self.layer.one_count:
            return along_in
        along_out = _joined(self._out_edge, j)
        return along_in * along_out / whole * math.exp(self._correction(i, j))

    @property
    def in_step(self) -> int:
        """The step of input counts: that of the table, and whole channels for every group."""
        return math.lcm(self.step, 1 if self.layer.one_count else self.layer.groups)

    @property
    def out_step(self) -> int:
        """The step of output counts."""
        return self.in_step

    @property
    def error(self) -> float | None:
        """Largest relative error at the checks; None without any."""
        return max((abs(self.ms(*point) / ms - 1) for point, ms in self.checks.items()), default=None)

    @cached_property
    def _in_edge(self) -> list[tuple[int, float]]:
        narrow, c_out = self.layer.one_count, self.layer.c_out
        return sorted((i, ms) for (i, j), ms in self.points.items() if narrow or j == c_out)

    @cached_property
    def _out_edge(self) -> list[tuple[int, float]]:
        return sorted((j, ms) for (i, j), ms in self.points.items() if i == self.layer.c_in)

    @cached_property
    def _grid(self) -> tuple[list[int], list[int], list[list[float]]]:
        """Counts and the logarithm of measured over product; zero along the edges, where the product is exact."""
        rows, columns = [*self.rows, self.layer.c_in], [*self.columns, self.layer.c_out]
        whole = self.points[self.layer.c_in, self.layer.c_out]

        def log(i: int, j: int) -> float:
            product = _joined(self._in_edge, i) * _joined(self._out_edge, j) / whole
            return math.log(self.points[i, j] / product) if (i, j) in self.points else 0.0

        inside = [[0.0 if self.layer.c_in == i or self.layer.c_out == j else log(i, j) for j in columns] for i in rows]
        return rows, columns, inside

    def _correction(self, i: int, j: int) -> float:
        if not (self.rows and self.columns):
            return 0.0
        rows, columns, values = self._grid
        (above, below, up), (left, right, along) = _between(rows, i), _between(columns, j)
        top = values[above][left] * (1 - along) + values[above][right] * along
        bottom = values[below][left] * (1 - along) + values[below][right] * along
        return top * (1 - up) + bottom * up


def rounded(count: int, most: int, step: int) -> int:
    """The count at the end of its step: the next multiple, or the dense count where that comes first."""
    return min(-(-count // step) * step, most)


def ends(most: int, step: int) -> tuple[int, ...]:
    """All counts at the ends of steps, the dense one last."""
    return (*range(step, most, step), most)


def nearest(counts: Sequence[int], wanted: float) -> int:
    """The count closest to ``wanted``, the smaller one of two."""
    return min(counts, key=lambda count: (abs(count - wanted), count))


def _joined(edge: Sequence[tuple[int, float]], count: int) -> float:
    """By straight lines between measured counts; that of the smallest one below it."""
    place = bisect_left(edge, (count, -math.inf))
    if edge[min(place, len(edge) - 1)][0] == count or place == 0:
        return edge[place][1]
    (low, start), (high, end) = edge[place - 1], edge[place]
    return start + (end - start) * (count - low) / (high - low)


def _between(counts: Sequence[int], count: int) -> tuple[int, int, float]:
    """Positions of the neighbours of a count and how far it is from the first to the second, in logarithms."""
    place = bisect_left(counts, count)
    if place == 0 or counts[min(place, len(counts) - 1)] == count:
        return place, place, 0.0
    low, high = counts[place - 1], counts[place]
    return place - 1, place, math.log(count / low) / math.log(high / low)
