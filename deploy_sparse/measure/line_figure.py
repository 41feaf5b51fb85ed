"""Where the lines of a plot stand. Only geometry, like :mod:`.figures`: the template draws it, and escapes every text.

Series differ in colour, dashes and markers, so that they are told apart on paper and by any eye.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .figures import BOTTOM, LEFT, RIGHT, TOP, Tick, nice_ticks, scale, shortened
from .line_plot import LinePlot, Series, place
from .table import count, significant

COLOURS, DASHES = 6, 5  # how many the template has
MARKERS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # circle
    "m-3.5 -3.5h7v7h-7z",  # square
    "m0 -4.8l4.6 8h-9.2z",  # triangle
    "m0 -5l5 5l-5 5l-5 -5z",  # diamond
    "m-3.5 -3.5l7 7m0 -7l-7 7",  # cross
    "m0 4.8l4.6 -8h-9.2z",  # triangle on its tip
)
MOST_MARKERS = 6  # on a line
LEGEND, ROW = 262, 18  # the first row of the legend, and the height of one
LONGEST_NAME = 54  # characters that fit across the figure


@dataclass(frozen=True)
class Line:
    """One series: ``path`` and ``markers`` are SVG paths, ``colour`` and ``dash`` numbers of styles.

    ``y`` is the height of its row in the legend, ``sample`` the path of the marker there.
    """

    label: str
    colour: int
    dash: int
    path: str
    markers: str
    y: float
    sample: str


@dataclass(frozen=True)
class LineFigure:
    """A plot and its legend; ``summary`` says in words what it shows. Without a known value there is no line."""

    title: str
    summary: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float
    note: str


def line_figure(plot: LinePlot) -> LineFigure:
    """The plot's geometry."""
    known = [point for series in plot.series for point in series.known]
    names = shortened(plot.x_label, LONGEST_NAME), shortened(plot.y_label, LONGEST_NAME)
    if not known:
        return LineFigure(plot.title, "", *names, (), (), (), 0, plot.note)
    across = _widened(min(x for x, _ in known), max(x for x, _ in known))
    up = _upright(min(y for _, y in known), max(y for _, y in known))
    lines = tuple(_line(number, series, across, up, len(plot.series)) for number, series in enumerate(plot.series))
    whole = all(float(x).is_integer() for x, _ in known)
    x_ticks = tuple(x for x in nice_ticks(*across) if x.is_integer() or not whole)
    y_ticks = nice_ticks(*up, wanted=6)
    return LineFigure(
        plot.title,
        f"{plot.title}: {plot.y_label} against {plot.x_label}. {'; '.join(map(_in_words, plot.series))}.",
        *names,
        lines,
        tuple(Tick(scale(x, *across, LEFT, RIGHT), text) for x, text in zip(x_ticks, _labels(x_ticks), strict=True)),
        tuple(Tick(scale(y, *up, BOTTOM, TOP), text) for y, text in zip(y_ticks, _labels(y_ticks), strict=True)),
        LEGEND + ROW * len(lines) - 6,
        plot.note,
    )


def _line(number: int, series: Series, across: tuple[float, float], up: tuple[float, float], count: int) -> Line:
    places = [
        None if y is None else f"{scale(x, *across, LEFT, RIGHT)} {scale(y, *up, BOTTOM, TOP)}"
        for x, y in series.points
    ]
    before, after = [None, *places], [*places[1:], None]
    path = "".join(
        f"{'L' if earlier else 'M'}{here}" for earlier, here in zip(before, places, strict=False) if here is not None
    )
    drawn = [index for index, here in enumerate(places) if here is not None]
    step = max(1, math.ceil(len(drawn) / MOST_MARKERS))
    marked = set(drawn[number * step // count % step :: step])  # lines that run together show their markers in turn
    marked |= {index for index in drawn if before[index] is after[index] is None}  # no line leads to or from these
    shape, y = MARKERS[number % len(MARKERS)], LEGEND + ROW * number
    return Line(
        label=shortened(series.label, LONGEST_NAME) if drawn else f"{shortened(series.label, 40)} (not known)",
        colour=number % COLOURS,
        dash=number % DASHES,
        path=path,
        markers="".join(f"M{places[index]}{shape}" for index in sorted(marked)),
        y=y,
        sample=f"M30 {y - 4}{shape}",
    )


def _in_words(series: Series) -> str:
    if not series.known:
        return f"{series.label} unknown"
    (first, start), (last, end) = series.known[0], series.known[-1]
    return f"{series.label} from {significant(start)} at {place(first)} to {significant(end)} at {place(last)}"


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low - 0.5, high + 0.5) if _alike(low, high) else (low, high)


def _upright(low: float, high: float) -> tuple[float, float]:
    """The vertical range: from 0 where that costs no more than half the height, else with a margin."""
    margin = 0.05 * (high - low)
    if _alike(low, high):
        margin = 0.1 * abs(low) if abs(low) > 1e-9 else 1.0
    if 0 <= low <= high / 2:
        return 0.0, high + margin
    return low - margin, high + margin


def _alike(low: float, high: float) -> bool:
    """Whether the difference is one of rounding, which no axis is to blow up."""
    return high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-11)


def _labels(values: tuple[float, ...]) -> list[str]:
    """Round numbers, one step apart, with as many decimals as the step needs."""
    if max(map(abs, values)) >= 10_000:
        return [count(value) for value in values]
    step = values[1] - values[0] if len(values) > 1 else values[0] or 1.0
    decimals = max(0, -math.floor(math.log10(abs(step)) + 1e-9))
    return [f"{value:.{decimals}f}" if decimals < 5 else f"{value:g}" for value in values]
