"""Numbers that change along an axis, for a report: drawn in HTML, a short table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ConfigError
from .table import Cell, Table, significant

MOST_ROWS = 8  # of the table


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    ``points`` are (x, y), x ascending; y is None where it is unknown, which leaves a gap.

    Raises:
        ConfigError: a number that is not finite, or x that does not ascend.
    """

    label: str
    points: tuple[tuple[float, float | None], ...]

    def __post_init__(self) -> None:
        numbers = [number for point in self.points for number in point if number is not None]
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"the series {self.label!r} holds a number that is not finite",
                expected="finite numbers",
                fix="give None for a value that is unknown",
            )
        places = [x for x, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(places)):
            raise ConfigError(
                f"the series {self.label!r} does not ascend along its axis",
                expected="every x larger than the one before",
                fix="sort the points, and keep one for each x",
            )

    @property
    def known(self) -> tuple[tuple[float, float], ...]:
        """The points whose y is known."""
        return tuple((x, y) for x, y in self.points if y is not None)


@dataclass(frozen=True)
class LinePlot:
    """Several series along one axis; the axes' labels name what is counted, with its unit."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""


def values_table(plot: LinePlot) -> Table:
    """At most ``MOST_ROWS`` of the plot's points, first and last among them; nothing is interpolated.

    The rows stand where every series has a point, or at points of any where they share fewer than two.
    """
    values = [dict(series.points) for series in plot.series]
    everywhere = sorted({x for found in values for x in found})
    shared = [x for x in everywhere if all(x in found for found in values)]
    places = list(_evenly(shared if len(shared) > 1 else everywhere))
    rows = tuple((place(x), *(_number(found.get(x)) for found in values)) for x in places)
    left_out = f"{len(places)} of {len(everywhere)} points." if len(places) < len(everywhere) else ""
    note = " ".join(text for text in (f"Shown: {plot.y_label}.", plot.note, left_out) if text)
    return Table(plot.title, (plot.x_label, *(series.label for series in plot.series)), rows, note)


def _evenly(places: list[float]) -> Iterable[float]:
    if len(places) <= MOST_ROWS:
        return places
    return (places[round(row * (len(places) - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS))


def place(x: float) -> str:
    """A place on the axis as text; whole numbers, as of steps, with all their digits."""
    return str(int(x)) if float(x).is_integer() else significant(x)


def _number(y: float | None) -> Cell:
    return None if y is None else float(y)
