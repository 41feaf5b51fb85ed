"""Where the lines of a plot stand. Only geometry, like :mod:`.figures`: the template draws it, and escapes every text.

Series differ in colour, dashes and markers, so that they are told apart on paper and by any eye. Where a plot has
predictions, dashes are theirs: a prediction ends in its series' marker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .figures import BOTTOM, LEFT, RIGHT, TOP, Tick, nice_ticks, scale, shortened, told_apart
from .line_plot import LinePlot, Series, place, predicted_lines
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
MOST_PLACES = 8  # ticks of an axis that has them at its points
APART = 7.0  # between points at one place of different series, where they stand side by side
CAP = 3.5  # half the width of a whisker's end
LEGEND, ROW = 266, 18  # the first row of the legend, and the height of one
LONGEST_NAME = 54  # characters that fit across the figure

Places = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """One series: ``path``, ``markers``, ``whiskers`` are SVG paths, ``colour`` and ``dash`` numbers of styles.

    ``y`` is the height of its row in the legend, ``sample`` the path of the marker there.
    """

    label: str
    colour: int
    dash: int
    path: str
    markers: str
    whiskers: str
    y: float
    sample: str


@dataclass(frozen=True)
class Prediction:
    """A dashed line and the marker at its end; ``colour`` is its series', None for one that all series share."""

    colour: int | None
    path: str
    marker: str


@dataclass(frozen=True)
class LineFigure:
    """A plot and its legend; ``summary`` says in words what it shows. Without a known value there is no line.

    ``predicted`` is the legend of the dashed lines at height ``predicted_y``; ``reference`` a height to mark.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float
    note: str
    predictions: tuple[Prediction, ...] = ()
    predicted: str = ""
    predicted_y: float = 0
    reference: float | None = None


@dataclass(frozen=True)
class _Frame:
    """From values to places in the figure."""

    x: Callable[[float], float]
    y: Callable[[float], float]


def line_figure(plot: LinePlot) -> LineFigure:
    """The plot's geometry."""
    known = [point for series in plot.series for point in series.known]
    names = shortened(plot.x_label, LONGEST_NAME), shortened(plot.y_label, LONGEST_NAME)
    if not known:
        return LineFigure(plot.title, "", *names, (), (), (), 0, plot.note)
    places = sorted({x for x, _ in known})
    doubling = plot.doubling and places[0] > 0
    along = math.log2 if doubling else float
    across = _widened(along(places[0]), along(places[-1]))
    if doubling:
        across = across[0] - 0.06 * (across[1] - across[0]), across[1] + 0.06 * (across[1] - across[0])
    up = _upright(*_range(plot))
    frame = _Frame(lambda x: scale(along(x), *across, LEFT, RIGHT), lambda y: scale(y, *up, BOTTOM, TOP))
    predictions = predicted_lines(plot)
    labels = told_apart((_label(series) for series in plot.series), LONGEST_NAME)
    lines = tuple(
        _line(number, plot, frame, bool(predictions), labels[_label(series)])
        for number, series in enumerate(plot.series)
    )
    y_ticks = nice_ticks(*up, wanted=6)
    rows = len(lines) + bool(predictions)
    return LineFigure(
        plot.title,
        f"{plot.title}: {plot.y_label} against {plot.x_label}. {'; '.join(map(_in_words, plot.series))}.",
        *names,
        lines,
        _x_ticks(places, across, frame, doubling),
        tuple(Tick(frame.y(y), text) for y, text in zip(y_ticks, _labels(y_ticks), strict=True)),
        LEGEND + ROW * rows - 6,
        plot.note,
        tuple(_prediction(number, points, plot, frame) for number, points in predictions),
        shortened(plot.predicted, LONGEST_NAME),
        LEGEND + ROW * len(lines),
        None if plot.reference is None else frame.y(plot.reference),
    )


def _range(plot: LinePlot) -> tuple[float, float]:
    """The lowest and the highest value that is drawn."""
    values = [y for series in plot.series for _, y in (*series.known, *series.expected)]
    values += [bound for series in plot.series for bounds in series.whiskers.values() for bound in bounds]
    values += [] if plot.reference is None else [plot.reference]
    return min(values), max(values)


def _x_ticks(places: list[float], across: tuple[float, float], frame: _Frame, doubling: bool) -> tuple[Tick, ...]:
    if doubling:
        step = math.ceil(len(places) / MOST_PLACES)
        return tuple(Tick(frame.x(x), place(x)) for x in places[::step])
    whole = all(float(x).is_integer() for x in places)
    ticks = tuple(x for x in nice_ticks(*across) if x.is_integer() or not whole)
    return tuple(Tick(frame.x(x), text) for x, text in zip(ticks, _labels(ticks), strict=True))


def _label(series: Series) -> str:
    return series.label if series.known else f"{shortened(series.label, 40)} (not known)"


def _line(number: int, plot: LinePlot, frame: _Frame, predicted: bool, label: str) -> Line:
    series, total = plot.series[number], len(plot.series)
    aside = APART * (number - (total - 1) / 2) if plot.doubling else 0.0
    places = [None if y is None else (round(frame.x(x) + aside, 1), frame.y(y)) for x, y in series.points]
    before, after = [None, *places], [*places[1:], None]
    path = "".join(
        f"{'L' if earlier else 'M'}{here[0]} {here[1]}"
        for earlier, here in zip(before, places, strict=False)
        if here is not None
    )
    drawn = [index for index, here in enumerate(places) if here is not None]
    step = 1 if series.intervals else max(1, math.ceil(len(drawn) / MOST_MARKERS))
    marked = set(drawn[number * step // total % step :: step])  # lines that run together show their markers in turn
    marked |= {index for index in drawn if before[index] is after[index] is None}  # no line leads to or from these
    shape, y = MARKERS[number % len(MARKERS)], LEGEND + ROW * number
    marks = [here for index in sorted(marked) if (here := places[index]) is not None]
    return Line(
        label=label,
        colour=number % COLOURS,
        dash=0 if predicted else number % DASHES,
        path=path,
        markers="".join(f"M{x} {y}{shape}" for x, y in marks),
        whiskers="".join(_whisker(round(frame.x(x) + aside, 1), *map(frame.y, b)) for x, b in series.whiskers.items()),
        y=y,
        sample=f"M30 {y - 4}{shape}",
    )


def _whisker(x: float, low: float, high: float) -> str:
    cap = f"h{2 * CAP}"
    return f"M{x} {low}V{high}M{round(x - CAP, 1)} {low}{cap}M{round(x - CAP, 1)} {high}{cap}"


def _prediction(number: int | None, points: Places, plot: LinePlot, frame: _Frame) -> Prediction:
    """A line that belongs to one series ends in that series' marker."""
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    path = "".join(f"{'L' if index else 'M'}{x} {y}" for index, (x, y) in enumerate(places))
    if number is None:
        return Prediction(None, path, "")
    x, y = places[-1]
    return Prediction(number % COLOURS, path, f"M{x} {y}{MARKERS[number % len(MARKERS)]}")


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
