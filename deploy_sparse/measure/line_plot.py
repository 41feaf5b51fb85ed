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

    ``points`` are (x, y), x ascending; y is None where it is unknown, which leaves a gap. ``intervals`` has the (low,
    high) of each point, drawn as whiskers, and ``predicted`` the y that was expected there, drawn dashed; both are
    empty, or have an entry for each point, None where it is unknown.

    Raises:
        ConfigError: a number that is not finite, x that does not ascend, too few or too many intervals or predictions.
    """

    label: str
    points: tuple[tuple[float, float | None], ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()
    predicted: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        rows = (*self.points, *(bounds for bounds in self.intervals if bounds), self.predicted)
        if not all(math.isfinite(number) for row in rows for number in row if number is not None):
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
        for what, values in (("intervals", self.intervals), ("predictions", self.predicted)):
            if len(values) not in (0, len(self.points)):
                raise ConfigError(
                    f"the series {self.label!r} has {len(self.points)} points and {len(values)} {what}",
                    expected="one for each point, or none at all",
                    fix="give None where there is none",
                )

    @property
    def known(self) -> tuple[tuple[float, float], ...]:
        """The points whose y is known."""
        return tuple((x, y) for x, y in self.points if y is not None)

    @property
    def whiskers(self) -> dict[float, tuple[float, float]]:
        """The (low, high) of every x that has one."""
        found = zip(self.points, self.intervals, strict=False)
        return {x: bounds for (x, y), bounds in found if bounds is not None and y is not None}

    @property
    def expected(self) -> tuple[tuple[float, float], ...]:
        """The points of the prediction that are known."""
        return tuple((x, y) for (x, _), y in zip(self.points, self.predicted, strict=False) if y is not None)


@dataclass(frozen=True)
class LinePlot:
    """Several series along one axis; the axes' labels name what is counted, with its unit.

    ``predicted`` says what the predictions are by, ``reference`` is a y that is marked across the plot, as 1× is for
    speed-ups. With ``doubling`` the x axis is logarithmic and has its ticks at the points, as batch sizes need it.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    predicted: str = ""
    reference: float | None = None
    doubling: bool = False


def values_table(plot: LinePlot) -> Table:
    """At most ``MOST_ROWS`` of the plot's points, first and last among them; nothing is interpolated.

    The rows stand where every series has a point, or at points of any where they share fewer than two. An interval
    stands behind its value; predictions have a column for each series, or one where all series share them.
    """
    values = [dict(series.points) for series in plot.series]
    everywhere = sorted({x for found in values for x in found})
    shared = [x for x in everywhere if all(x in found for found in values)]
    places = list(_evenly(shared if len(shared) > 1 else everywhere))
    predictions = predicted_lines(plot)
    rows = tuple(
        (
            place(x),
            *(_value(found.get(x), series.whiskers.get(x)) for found, series in zip(values, plot.series, strict=True)),
            *(_number(dict(line).get(x)) for _, line in predictions),
        )
        for x in places
    )
    left_out = f"{len(places)} of {len(everywhere)} points." if len(places) < len(everywhere) else ""
    bounds = "In brackets: the 95 % interval." if any(series.whiskers for series in plot.series) else ""
    note = " ".join(text for text in (f"Shown: {plot.y_label}.", bounds, plot.note, left_out) if text)
    names = [plot.predicted if number is None else f"{plot.series[number].label}, {plot.predicted}"
             for number, _ in predictions]  # fmt: skip
    return Table(plot.title, (plot.x_label, *(series.label for series in plot.series), *names), rows, note)


def predicted_lines(plot: LinePlot) -> tuple[tuple[int | None, tuple[tuple[float, float], ...]], ...]:
    """The (number of the series, points) of every prediction; the number is None for one line that all series share.

    They share it where one of them has all the points of the others: a line through points of several series would
    claim values between them that nobody predicted.
    """
    lines = [(number, series.expected) for number, series in enumerate(plot.series) if series.expected]
    if len(lines) < 2:
        return tuple(lines)
    longest = max((points for _, points in lines), key=len)
    known = dict(longest)
    alike = all(x in known and math.isclose(known[x], y, rel_tol=1e-6) for _, points in lines for x, y in points)
    return ((None, longest),) if alike else tuple(lines)


def _evenly(places: list[float]) -> Iterable[float]:
    if len(places) <= MOST_ROWS:
        return places
    return (places[round(row * (len(places) - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS))


def place(x: float) -> str:
    """A place on the axis as text; whole numbers, as of steps, with all their digits."""
    return str(int(x)) if float(x).is_integer() else significant(x)


def _value(y: float | None, bounds: tuple[float, float] | None) -> Cell:
    if y is None or bounds is None:
        return _number(y)
    return "{} ({} to {})".format(*map(significant, (y, *bounds)))


def _number(y: float | None) -> Cell:
    return None if y is None else float(y)
