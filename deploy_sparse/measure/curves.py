"""Speed-up over batch and over sparsity, as plots with intervals and what the multiply-accumulates predict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from .compare import Comparison
from .contents import Report
from .line_plot import LinePlot, Series
from .record import LatencyRecord
from .report_data import way_of

MOST_LINES = 4  # in one plot over batch, each with its prediction; of more subjects each form has a plot
MOST_OF_A_FORM = 6
_SPEED_UP = "speed-up over the baseline, times"
_PREDICTED = "predicted by MACs"

Found = tuple[LatencyRecord, Comparison]


def speed_up_plots(report: Report) -> tuple[LinePlot, ...]:
    """The plots for the records of one network: over batch, then over sparsity; none where there is nothing to draw."""
    compared = [(r, c) for group in report.groups for r in group if (c := report.comparison_of(r)) is not None]
    by_place: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for record, comparison in compared:
        run = record.run_id if report.repeated else ""
        by_place[record.target, way_of(record), run].append((record, comparison))
    several = len(by_place) > 1 or len({record.target for record in report.records if record.timed}) > 1
    places = [(_words(place) if several else "", found) for place, found in by_place.items()]
    return (
        *(plot for place, found in places for plot in _over_batch(place, found)),
        *(plot for place, found in places for plot in _over_sparsity(place, found)),
    )


def _over_batch(place: str, found: Sequence[Found]) -> Iterator[LinePlot]:
    """Of the subjects that were timed at several batch sizes."""
    subjects: dict[str, list[Found]] = defaultdict(list)
    for record, comparison in found:
        subjects[record.subject].append((record, comparison))
    several = {name: own for name, own in subjects.items() if len(own) > 1}
    forms: dict[str, list[Series]] = defaultdict(list)
    for name, own in several.items():
        form = (own[0][0].form or "") if len(several) > MOST_LINES else ""
        forms[form].append(_series(name, [(record.batch, comparison) for record, comparison in own]))
    for form, lines in forms.items():
        title = f"Speed-up over batch{place}" + (f": {form}" if form else "")
        parts = [lines[start : start + MOST_OF_A_FORM] for start in range(0, len(lines), MOST_OF_A_FORM)]
        for number, part in enumerate(parts, start=1):
            which = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            yield _plot(f"{title}{which}", "batch size", part, doubling=True)


def _over_sparsity(place: str, found: Sequence[Found]) -> Iterator[LinePlot]:
    """A line for each batch; of several forms, a plot for each batch with a line for each form."""
    known = [(record, comparison) for record, comparison in found if record.sparsity is not None]
    precise = len({record.precision for record, _ in known}) > 1
    forms = dict.fromkeys(_form(record, precise) for record, _ in known)
    batches = dict.fromkeys(record.batch for record, _ in known)
    lines = {
        (form, batch): [(100 * (r.sparsity or 0), c) for r, c in known if (_form(r, precise), r.batch) == (form, batch)]
        for batch in batches
        for form in forms
    }
    drawn = {key: points for key, points in lines.items() if len({x for x, _ in points}) > 1}
    crowded = any(len({x for x, _ in points}) < len(points) for points in drawn.values())
    note = "Of several subjects of one sparsity the first is drawn; the table has all." if crowded else ""
    if len(forms) > 1:
        for batch in batches:
            part = [_series(form or "other", points) for (form, at), points in drawn.items() if at == batch]
            if part:
                yield _plot(f"Speed-up over sparsity, batch {batch}{place}", "sparsity, %", part, note)
    elif drawn:
        part = [_series(f"batch {batch}", points) for (_, batch), points in drawn.items()]
        yield _plot(f"Speed-up over sparsity{place}", "sparsity, %", part, note)


def _form(record: LatencyRecord, precise: bool) -> str:
    """What is drawn as one line: how the subject was made, and its precision where there are several."""
    return ", ".join(filter(None, (record.form, record.precision if precise else None)))


def _series(label: str, points: Sequence[tuple[float, Comparison]]) -> Series:
    """A line has one value at one place: of several subjects there the first."""
    ordered = sorted(dict(reversed(points)).items(), key=lambda point: point[0])
    return Series(
        label,
        tuple((x, c.ratio) for x, c in ordered),
        tuple(None if c.low is None or c.high is None else (c.low, c.high) for _, c in ordered),
        tuple(c.mac_ratio for _, c in ordered) if any(c.mac_ratio for _, c in ordered) else (),
    )


def _plot(title: str, x_label: str, series: Sequence[Series], note: str = "", doubling: bool = False) -> LinePlot:
    return LinePlot(
        title,
        x_label,
        _SPEED_UP,
        tuple(series),
        note,
        _PREDICTED if any(line.expected for line in series) else "",
        reference=1.0,
        doubling=doubling,
    )


def _words(place: tuple[str, str, str]) -> str:
    return "".join(f", {word}" for word in place if word)
