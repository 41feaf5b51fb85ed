"""Which channel counts of a layer to time next: more where straight lines miss what was measured.

Everything follows from the points measured so far, so a stopped table asks for the same points when it goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...artifact import digest_of
from .shapes import LayerShape
from .surface import Point, Surface, ends, nearest

CHECKS = 2  # points of a layer that are measured to see how good its surface is
STAGES = 3  # a failing check becomes part of the grid this often


@dataclass(frozen=True)
class Sampler:
    """The points of one layer.

    Attributes:
        layer: at its dense counts.
        step: counts are multiples of it, or the dense ones.
        tolerance: relative difference between a line and a measured point from which on the line is divided.
        floor_ms: differences below this do not matter to the network.
        check: relative error at a check from which on the grid is refined.
    """

    layer: LayerShape
    step: int
    tolerance: float = 0.03
    floor_ms: float = 0.0
    check: float = 0.05

    def base(self) -> list[Point]:
        """What a surface cannot do without: the ends and two places of both edges."""
        points = [self._in(i) for i in self._start(self._ends_in)]
        if not self.layer.one_count:
            points += [(self.layer.c_in, j) for j in self._start(self._ends_out)]
        return list(dict.fromkeys(points))

    def wanted(self, points: Mapping[Point, float]) -> list[Point]:
        """The points to measure next, given those measured; none once the surface is good enough."""
        if missing := [point for point in self.base() if point not in points]:
            return missing
        if missing := [point for point in self._edges(points) if point not in points]:
            return missing
        for rows, columns, checks in self._stages(points):
            grid = [(i, j) for i in rows for j in columns]
            if missing := [point for point in (*grid, *checks) if point not in points]:
                return missing
        return []

    def surface(self, points: Mapping[Point, float]) -> Surface:
        """The best surface that these points give; they hold those of :meth:`base`."""
        rows: tuple[int, ...] = ()
        columns: tuple[int, ...] = ()
        checks: tuple[Point, ...] = ()
        used = {point: points[point] for point in (*self.base(), *self._edges(points)) if point in points}
        for more_rows, more_columns, more_checks in self._stages(points):
            grid = [(i, j) for i in more_rows for j in more_columns]
            if any(point not in points for point in grid):
                break
            rows, columns, checks = more_rows, more_columns, more_checks
            used |= {point: points[point] for point in grid}
        held = {point: points[point] for point in checks if point in points and point not in used}
        return Surface(self.layer, self.step, used, rows, columns, held, settled=not self.wanted(points))

    def _stages(
        self, points: Mapping[Point, float]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[Point, ...]]]:
        """Rows, columns and checks of the grid, stage by stage, for as long as checks fail."""
        inner_in, inner_out = self._ends_in[:-1], self._ends_out[:-1]
        if self.layer.one_count or not inner_in or not inner_out:
            return
        rows, columns = self._coarse(inner_in), self._coarse(inner_out)
        edges = {point: points[point] for point in (*self.base(), *self._edges(points)) if point in points}
        for stage in range(STAGES):
            taken = {(i, j) for i in rows for j in columns}
            checks = self._drawn(inner_in, inner_out, taken, stage)
            yield rows, columns, checks
            if any(point not in points for point in (*taken, *checks)):
                return
            surface = Surface(self.layer, self.step, edges | {p: points[p] for p in taken}, rows, columns)
            misses = {p: abs(surface.ms(*p) - points[p]) for p in checks}
            worst = max(misses, key=lambda p: misses[p] / points[p], default=None)
            if worst is None or not self._matters(misses[worst], points[worst], self.check):
                return
            rows, columns = _with(rows, worst[0]), _with(columns, worst[1])

    def _edges(self, points: Mapping[Point, float]) -> list[Point]:
        """The points of both edges, so far as those measured tell."""
        found: list[Point] = []
        for along in ("in", "out")[: 1 if self.layer.one_count else 2]:
            counts = self._ends_in if along == "in" else self._ends_out
            start = self._start(counts)
            for low, high in pairwise(start):
                found += self._divided(points, along, counts, low, high)
        return found

    def _divided(
        self, points: Mapping[Point, float], along: str, counts: Sequence[int], low: int, high: int
    ) -> Iterator[Point]:
        between = [count for count in counts if low < count < high]
        if not between:
            return
        odd = [count for place, count in enumerate(counts, 1) if low < count < high and place % 2]
        middle = nearest(odd or between, (low + high) / 2)  # even places would hide steps of two or four
        first, point, last = (self._on(along, count) for count in (low, middle, high))
        yield point
        if any(p not in points for p in (first, point, last)):
            return
        line = points[first] + (points[last] - points[first]) * (middle - low) / (high - low)
        if self._matters(abs(line - points[point]), points[point], self.tolerance):
            yield from self._divided(points, along, counts, low, middle)
            yield from self._divided(points, along, counts, middle, high)

    def _matters(self, miss: float, ms: float, tolerance: float) -> bool:
        return miss > tolerance * ms and miss > self.floor_ms

    def _on(self, along: str, count: int) -> Point:
        return self._in(count) if along == "in" else (self.layer.c_in, count)

    def _in(self, count: int) -> Point:
        narrowed = self.layer.with_counts(count, self.layer.c_out)
        return count, narrowed.c_out

    @property
    def _ends_in(self) -> tuple[int, ...]:
        return ends(self.layer.c_in, Surface(self.layer, self.step, {}).in_step)

    @property
    def _ends_out(self) -> tuple[int, ...]:
        return ends(self.layer.c_out, Surface(self.layer, self.step, {}).out_step)

    def _start(self, counts: Sequence[int]) -> list[int]:
        most = counts[-1]
        return sorted({counts[0], nearest(counts, most / 4), nearest(counts, most / 2), most})

    def _coarse(self, inner: Sequence[int]) -> tuple[int, ...]:
        most = inner[-1] + inner[0]
        return tuple(sorted({nearest(inner, most / 8), nearest(inner, most / 2)}))

    def _drawn(
        self, inner_in: Sequence[int], inner_out: Sequence[int], taken: set[Point], stage: int
    ) -> tuple[Point, ...]:
        """Checks by lot, others in each stage and the same ones in every run."""
        lot = random.Random(digest_of([self.layer.as_json(), self.step, stage]))
        free = len(inner_in) * len(inner_out) - len(taken)
        drawn: list[Point] = []
        while len(drawn) < min(CHECKS, free):
            point = lot.choice(inner_in), lot.choice(inner_out)
            if point not in taken and point not in drawn:
                drawn.append(point)
        return tuple(drawn)


def _with(counts: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(sorted({*counts, count}))
