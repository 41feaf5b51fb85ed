"""Where the marks of the plots of records stand. Only geometry: the template draws it, and escapes every text.

Lengths are SVG user units; a figure is ``WIDTH`` wide, which stays readable at the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .contents import Report
from .record import LatencyRecord
from .table import significant
from .timing import percentile

WIDTH = 420
LEFT, RIGHT = 54, 404  # the plotting area from left to right; the strip has no y axis and starts at STRIP_LEFT
TOP, BOTTOM = 30, 206
STRIP_LEFT, ROW = 16, 46
LABEL_GAP = 15
LONGEST_LABEL = 28  # characters that fit beside a point wherever it stands
LONGEST_STRIP = 24  # … before the numbers above a strip
CHARACTER = 6.6  # mean width of a label's character
MOST_NAMED = 6  # points with their names beside them; of more, numbers with a legend
LEGEND, LEGEND_ROW = 266, 17  # the first row of that legend, and the height of one


@dataclass(frozen=True)
class Tick:
    """A mark on an axis at ``at`` with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """One subject in the accuracy plot; the label stands at (``label_x``, ``label_y``)."""

    x: float
    y: float
    label: str
    label_x: float
    label_y: float
    anchor: str
    baseline: bool


@dataclass(frozen=True)
class Named:
    """A row of a legend: the number of a point and its subject's name, at (``x``, ``y``)."""

    x: float
    y: float
    number: str
    name: str


@dataclass(frozen=True)
class AccuracyPlot:
    """Accuracy (up) against median latency (right) for one target and batch; ``summary`` says it in words."""

    title: str
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left_out: tuple[str, ...]  # subjects without a known accuracy
    legend: tuple[Named, ...]
    height: float
    summary: str


@dataclass(frozen=True)
class Strip:
    """One subject's samples: a thin line at each percentile 1 … 99 (``marks`` is an SVG path), a bold one at p50."""

    label: str
    numbers: str
    y: float
    p50: float
    marks: str
    baseline: bool


@dataclass(frozen=True)
class StripPlot:
    """How the times of all subjects of one target and batch spread; the axis starts at 0 ms."""

    title: str
    strips: tuple[Strip, ...]
    x_ticks: tuple[Tick, ...]
    height: float
    summary: str


def accuracy_plots(report: Report) -> tuple[AccuracyPlot, ...]:
    """One plot for each target and batch with at least one timed subject of known accuracy."""
    groups = [(group, [r for r in group if r.timed and r.accuracy is not None]) for group in report.groups]
    return tuple(_accuracy_plot(report.place_of(group), group, known) for group, known in groups if known)


def strip_plots(report: Report) -> tuple[StripPlot, ...]:
    """One plot for each target and batch with at least one timed subject."""
    groups = [(report.place_of(group), [record for record in group if record.timed]) for group in report.groups]
    return tuple(_strip_plot(place, timed) for place, timed in groups if timed)


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, within ``low`` to ``high``."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _accuracy_plot(title: str, group: tuple[LatencyRecord, ...], known: list[LatencyRecord]) -> AccuracyPlot:
    p50 = {record.subject: record.stats.p50 for record in known if record.stats is not None}
    accuracy = {record.subject: 100 * (record.accuracy or 0.0) for record in known}
    slowest = 1.1 * max(p50.values())
    margin = max(0.25 * (max(accuracy.values()) - min(accuracy.values())), 0.25)
    low, high = min(accuracy.values()) - margin, max(accuracy.values()) + margin
    points: list[Point] = []
    numbers = {record.subject: str(number) for number, record in enumerate(known, start=1)}
    named = len(known) <= MOST_NAMED
    labels = told_apart(p50, LONGEST_LABEL) if named else numbers
    for record in sorted(known, key=lambda r: -accuracy[r.subject]):
        x = scale(p50[record.subject], 0, slowest, LEFT, RIGHT)
        y = scale(accuracy[record.subject], low, high, BOTTOM, TOP)
        label = labels[record.subject]
        on_left = x + 10 + CHARACTER * len(label) > RIGHT
        label_x, anchor = (x - 10, "end") if on_left else (x + 10, "start")
        label_y = _free_height(y + 4, [point for point in points if abs(point.x - x) < (130 if named else 28)])
        points.append(Point(x, y, label, round(label_x, 1), label_y, anchor, record.subject == record.baseline))
    legend = () if named else tuple(_legend(numbers))
    return AccuracyPlot(
        title=title,
        points=tuple(points),
        x_ticks=_ticks(0, slowest, LEFT, RIGHT),
        y_ticks=_ticks(low, high, BOTTOM, TOP, nice_ticks(max(low, 0.0), min(high, 100.0))),
        left_out=tuple(r.subject for r in group if r.timed and r.accuracy is None),
        legend=legend,
        height=BOTTOM + 44 if named else LEGEND + LEGEND_ROW * ((len(legend) + 1) // 2) - 8,
        summary=_listed(f"{r.subject} {accuracy[r.subject]:.2f} % at {significant(p50[r.subject])} ms" for r in known),
    )


def _legend(numbers: dict[str, str]) -> Iterator[Named]:
    """In two columns, read downwards."""
    rows, labels = (len(numbers) + 1) // 2, told_apart(numbers, LONGEST_LABEL - 3)
    for place, (subject, number) in enumerate(numbers.items()):
        x = STRIP_LEFT + (RIGHT - STRIP_LEFT) / 2 * (place // rows)
        yield Named(x, LEGEND + LEGEND_ROW * (place % rows), number, labels[subject])


def _listed(parts: Iterable[str]) -> str:
    return f"{'; '.join(parts)}."


def _free_height(y: float, near: list[Point]) -> float:
    """The first height at or below ``y`` where a label does not run into those of the points near by."""
    for other in sorted(point.label_y for point in near):
        if abs(y - other) < LABEL_GAP:
            y = other + LABEL_GAP
    return round(y, 1)


def _strip_plot(title: str, group: list[LatencyRecord]) -> StripPlot:
    ordered = {r.subject: sorted(sample for block in r.samples_ms for sample in block) for r in group}
    slowest = 1.05 * max(percentile(samples, 99) for samples in ordered.values())
    strips, labels = [], told_apart(ordered, LONGEST_STRIP)
    for row, record in enumerate(group):
        samples = ordered[record.subject]
        y = 24.0 + row * ROW
        at = [scale(percentile(samples, p), 0, slowest, STRIP_LEFT, RIGHT) for p in range(1, 100)]
        p50, p99 = percentile(samples, 50), percentile(samples, 99)
        strips.append(
            Strip(
                label=labels[record.subject],
                numbers=f"p50 {significant(p50)} ms, p99 {significant(p99)} ms",
                y=y,
                p50=at[49],
                marks="".join(f"M{x} {y}v14" for x in at),
                baseline=record.subject == record.baseline,
            )
        )
    ticks = _ticks(0, slowest, STRIP_LEFT, RIGHT)
    words = _listed(f"{record.subject} {strip.numbers}" for record, strip in zip(group, strips, strict=True))
    return StripPlot(title, tuple(strips), ticks, 24.0 + len(group) * ROW + 34, words)


def shortened(name: str, longest: int) -> str:
    """``name`` with at most ``longest`` characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def told_apart(names: Iterable[str], longest: int) -> dict[str, str]:
    """Every name with at most ``longest`` characters, and no two alike.

    Where the starts are alike, what the long names share goes; where that is not enough they are numbered.
    """
    known = list(dict.fromkeys(names))
    alike = zip(*(name for name in known if len(name) > longest), strict=False)
    shared = sum(1 for _ in takewhile(lambda characters: len({*characters}) == 1, alike))
    ways: tuple[Callable[[int, str], str], ...] = (
        lambda number, name: shortened(name, longest),
        lambda number, name: shortened(name if len(name) <= longest else f"…{name[shared:]}", longest),
        lambda number, name: shortened(f"{number} {name}", longest),
    )
    for way in ways:
        found = {name: way(number, name) for number, name in enumerate(known, start=1)}
        if len({*found.values()}) == len(found):
            break
    return found


def _ticks(low: float, high: float, start: float, stop: float, values: Sequence[float] = ()) -> tuple[Tick, ...]:
    values = values or nice_ticks(low, high)
    decimals = max(len(f"{value:g}".partition(".")[2]) for value in values)
    return tuple(Tick(scale(value, low, high, start, stop), f"{value:.{decimals}f}") for value in values)


def scale(value: float, low: float, high: float, start: float, stop: float) -> float:
    """Where ``value`` stands when ``low`` is at ``start`` and ``high`` at ``stop``."""
    return round(start + (value - low) / (high - low) * (stop - start), 1)
