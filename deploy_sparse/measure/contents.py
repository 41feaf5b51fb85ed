"""What a report says of its records, as sentences and tables of text; how it looks is :mod:`.report`'s concern.

Everything is derived from the records and comparisons given, in their order: equal input gives equal text. What got
slower is in :mod:`.slower`, under what conditions the numbers hold in :mod:`.report_conditions`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .compare import REOPENING, Comparison, Verdict
from .record import NOT_BUILT, LatencyRecord
from .report_data import Group, way_of
from .report_data import Report as Report
from .table import UNKNOWN, Cell, Table, count, percent, ratio_and_interval, significant, times

APART = 1.1  # factor between the ratios of wall and processor times from which both are told
MOST_SENTENCES = 8  # verdicts that are read one by one; of more, a summary comes first
READING = (
    "The speed-up is the median over paired blocks of baseline time / subject time; above 1× is faster. "
    f"Nothing within {100 * REOPENING:g} % of 1× counts as faster or slower. The interval speaks for this run: "
    "another run, or a rebuilt engine, may differ by a few percent."
)
"""How to read a table of results."""
_SHORT = (  # the columns for a terminal, in their order
    *("subject", "network", "target", "timed with", "run", "batch", "precision", "test accuracy", "parameters", "MACs"),
    *("p50 ms", "p90 ms", "speed-up (95 % interval)", "predicted by MACs"),
)
_MIB = 2**20


@dataclass(frozen=True)
class Sentence:
    """One verdict; ``kind`` is the comparison's verdict, ``"not timed"``, or ``"mixed"`` for a summary of several."""

    kind: Verdict | str
    text: str


def verdicts(report: Report) -> tuple[Sentence, ...]:
    """One sentence per comparison, and one for each target and batch where nothing was compared."""
    return tuple(dict.fromkeys(sentence for group in report.groups for sentence in _group_verdicts(report, group)))


def subject_verdicts(report: Report) -> tuple[Sentence, ...]:
    """One sentence for each subject, baseline and target over all batch sizes, then one for what was not compared.

    Runs that measured the same have sentences of their own.
    """
    together: dict[tuple[str, str, str, str, str], list[Comparison]] = {}
    for group in report.groups:
        for record in group:
            if (comparison := report.comparison_of(record)) is not None:
                run = f"run {record.run_id}" if report.repeated else ""
                place = record.target, way_of(record), run, record.subject, record.baseline
                together.setdefault(place, []).append(comparison)
    alone = tuple(sentence for sentence in verdicts(report) if sentence.kind == "not timed")
    return (*(_over_batches(place[:3], found) for place, found in together.items()), *alone)


def headlines(report: Report) -> tuple[Sentence, ...]:
    """One sentence for each network and target: how many comparisons came out how, and the fastest subject.

    What was not compared is in :func:`verdicts` alone.
    """
    return tuple(_headline(chapter, target) for chapter in report.chapters for target in _targets(chapter))


@dataclass(frozen=True)
class _Row:
    """One timed record and what it is compared with."""

    report: Report
    record: LatencyRecord
    group: Group

    @property
    def comparison(self) -> Comparison | None:
        return self.report.comparison_of(self.record)

    @property
    def points(self) -> str:
        """The change of the accuracy in percentage points."""
        record = self.record
        dense = next((other.accuracy for other in self.group if other.subject == record.baseline), None)
        if record.subject == record.baseline or dense is None or record.accuracy is None:
            return UNKNOWN
        return f"{100 * (record.accuracy - dense):+.2f}"

    @property
    def samples_per_second(self) -> float | None:
        stats = self.record.stats
        return None if stats is None else 1000 * self.record.batch / stats.mean

    @property
    def speed_up(self) -> str:
        comparison = self.comparison
        if comparison is None:
            return "baseline" if self.record.subject == self.record.baseline else UNKNOWN
        ratio, bounds = ratio_and_bounds(comparison)
        doubt = ", cannot tell" if comparison.verdict == "cannot tell" else ""
        return f"{ratio} ({bounds.removeprefix('95 % interval ')}){doubt}"  # the column's name says what it is

    @property
    def device_speed_up(self) -> str:
        """The speed-up of the GPU's own time, without what the host adds."""
        c = self.comparison
        if c is None or c.device_ratio is None:
            return UNKNOWN
        if c.device_low is None or c.device_high is None:
            return times(c.device_ratio)
        return "{} ({})".format(*ratio_and_interval(c.device_ratio, c.device_low, c.device_high))


def place_columns(report: Report) -> dict[str, Callable[[LatencyRecord], Cell]]:
    """The columns that say which record a row is of; several networks, ways of timing and runs have one each."""
    columns: dict[str, Callable[[LatencyRecord], Cell]] = {"subject": lambda record: record.subject}
    if len(report.networks) > 1:
        columns["network"] = report.network_of
    columns["target"] = lambda record: record.target
    if any(map(way_of, report.records)):
        columns["timed with"] = way_of
    if report.repeated:
        columns["run"] = lambda record: record.run_id
    columns["batch"] = lambda record: record.batch
    return columns


def main_table(report: Report) -> Table:
    """Every timed record with its accuracy, cost, times and speed-up; what no record here knows of has no column."""
    rows = [_Row(report, record, group) for group in report.groups for record in group if record.timed]
    columns = {name: tuple(of(row.record) for row in rows) for name, of in place_columns(report).items()}

    def column(name: str, value: Callable[[_Row], Cell], always: bool = True) -> None:
        cells = tuple(map(value, rows))
        if always or any(cell not in (None, UNKNOWN, "") for cell in cells):
            columns[name] = cells

    accuracy = not rows or any(record.accuracy is not None for record in report.records)
    precisions = {row.record.precision for row in rows}
    size, unit = _size_unit(row.record.engine_bytes for row in rows)
    column("speed-up (95 % interval)", lambda row: row.speed_up)
    column("on the GPU's clock", lambda row: row.device_speed_up, False)
    column("predicted by MACs", lambda row: times(row.comparison.mac_ratio) if row.comparison else UNKNOWN)
    for name in ("p50", "p90", "p95", "p99"):
        column(f"{name} ms", partial(_statistic, name))
    column("GPU p50 ms", lambda row: row.record.device_stats.p50 if row.record.device_stats else None, False)
    column("samples/s", lambda row: count(row.samples_per_second))
    column("test accuracy", lambda row: percent(row.record.accuracy), accuracy)
    column("change, points", lambda row: row.points, accuracy)
    column("parameters", lambda row: count(row.record.parameters))
    column("MACs", lambda row: count(row.record.macs))
    column(f"engine {unit}", lambda row: _in_units(row.record.engine_bytes, size))
    column("peak memory MiB", lambda row: _in_units(row.record.peak_memory_bytes, _MIB), False)
    column("form", lambda row: row.record.form, False)
    column("sparsity", lambda row: _share(row.record.sparsity), False)
    column("precision", lambda row: row.record.precision if len(precisions) > 1 else None, False)
    note = READING
    if not accuracy:
        note = f"No accuracy is known of these subjects: they stand here for their times. {note}"
    table = tuple(zip(*columns.values(), strict=True))
    return Table("Results", tuple(columns), table, note if rows else "Nothing was timed here.")


def final_table(report: Report) -> Table:
    """The short table for a terminal: the main table's most important columns; :func:`untimed_table` has the rest."""
    full = main_table(report)
    shown = [full.columns.index(name) for name in _SHORT if name in full.columns]
    rows = tuple(tuple(row[i] for i in shown) for row in full.rows)
    return Table("Timed", tuple(full.columns[i] for i in shown), rows, "" if rows else full.note)


def spread_table(report: Report) -> Table:
    """How the times of every timed record spread."""
    places = place_columns(report)
    rows = tuple(
        (
            *(of(record) for of in places.values()),
            record.stats.count,
            len(record.samples_ms),
            record.stats.min,
            record.stats.p50,
            record.stats.max,
            f"{100 * record.stats.cv:.1f} %",
            UNKNOWN if record.cpu_ms is None else significant(record.cpu_ms),
        )
        for group in report.groups
        for record in group
        if record.stats is not None
    )
    columns = (*places, "calls", "blocks", "min ms", "p50 ms", "max ms", "variation", "CPU ms")
    note = "Variation is the standard deviation over the mean; CPU ms is the mean process CPU time of a call."
    return Table("Spread of the times", columns, rows, note if rows else "")


def untimed_table(report: Report) -> Table:
    """Engines that were compiled but not timed, with size and build time, and what was not built; never a latency."""
    several = len(report.networks) > 1
    rows = {
        (report.network_of(record), record.subject, record.target): (
            record.subject,
            *([report.network_of(record)] if several else []),
            record.target,
            f"{record.status}: {record.reason}",
            UNKNOWN if record.engine_bytes is None else significant(record.engine_bytes / 1024),
            UNKNOWN if record.build_seconds is None else significant(record.build_seconds, 3),
        )
        for record in report.records
        if not record.timed
    }
    columns = ("subject", *(["network"] if several else []), "target", "status", "engine KiB", "build s")
    missing = any(record.status == NOT_BUILT for record in report.records)
    return Table(
        "Not built or not timed here" if missing else "Compiled, not timed here", columns, tuple(rows.values())
    )


def ratio_and_bounds(c: Comparison) -> tuple[str, str]:
    """``("1.84×", "95 % interval 1.79 to 1.90")``; no interval where too few blocks were timed for one.

    Where the ratio of processor times is another one, it follows.
    """
    other = c.processor_ratio
    apart = other is not None and abs(math.log(c.ratio / other)) > math.log(APART)
    rest = f"; {times(other)} in processor time" if apart else ""
    if c.low is None or c.high is None:
        return times(c.ratio), f"too few blocks for an interval{rest}"
    ratio, interval = ratio_and_interval(c.ratio, c.low, c.high)
    return ratio, f"95 % interval {interval}{rest}"


def _group_verdicts(report: Report, group: Group) -> Iterator[Sentence]:
    place = report.place_of(group)
    comparisons = [c for record in group if (c := report.comparison_of(record)) is not None]
    for c in comparisons:
        yield Sentence(c.verdict, f"{place}: {_verdict(c)}")
    if not comparisons:
        timed = [record.subject for record in group if record.timed]
        reasons = dict.fromkeys(f"{record.status}: {record.reason}" for record in group if not record.timed)
        text = "; ".join([*([f"{', '.join(timed)} timed, with nothing to compare"] if timed else []), *reasons])
        yield Sentence("not timed", f"{place if timed else report.target_of(group)}: {text}.")


def _headline(chapter: Report, target: str) -> Sentence:
    found = [c for c in chapter.comparisons if c.target == target]
    name = ", ".join(filter(None, (chapter.title if chapter.networks != ("",) else "", target)))
    if not found:
        return Sentence("not timed", f"{name}: nothing was compared.")
    kinds = Counter(c.verdict for c in found)
    kind: Verdict | str = found[0].verdict if len(kinds) == 1 else "mixed"
    told = ", ".join(f"{kinds[verdict]} {verdict}" for verdict in ("faster", "slower", "cannot tell") if kinds[verdict])
    best = max(found, key=lambda c: c.ratio if c.verdict == "faster" else 0.0)
    text = f"{name}: {len(found)} compared with {' and '.join(dict.fromkeys(c.baseline for c in found))}: {told}."
    if best.verdict != "faster":
        return Sentence(kind, f"{text} None is faster.")
    ratio, bounds = ratio_and_bounds(best)
    rest = f"; its MACs predict {times(best.mac_ratio)}" if best.mac_ratio else ""
    way = way_of(chapter.record_of(best))
    place = f"{best.subject} at batch {best.batch}" + (f", {way}" if way else "")
    ahead = f"Furthest ahead is {place}, {ratio} as fast ({bounds}){rest}."
    return Sentence(kind, f"{text} {ahead}")


def _over_batches(place: tuple[str, ...], found: list[Comparison]) -> Sentence:
    parts: dict[str, list[str]] = {}
    for c in found:
        ratio, bounds = ratio_and_bounds(c)
        words = f"{c.batch} ({ratio}, {bounds.removeprefix('95 % interval ')})"
        parts.setdefault(c.verdict, []).append(words)
    told = "; ".join(f"{verdict} at batch {', '.join(batches)}" for verdict, batches in parts.items())
    kind: Verdict | str = found[0].verdict if len(parts) == 1 else "mixed"
    predicted = ", ".join(dict.fromkeys(times(c.mac_ratio) for c in found if c.mac_ratio))
    rest = f"; its MACs predict {predicted}" if predicted else ""
    return Sentence(
        kind, f"{', '.join(filter(None, place))}: {found[0].subject} against {found[0].baseline}: {told}{rest}."
    )


def _targets(report: Report) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c.target for c in report.comparisons)) or ("",)


def _verdict(c: Comparison) -> str:
    ratio, bounds = ratio_and_bounds(c)
    rest = f"({bounds})" + (f"; its MACs predict {times(c.mac_ratio)}" if c.mac_ratio else "")
    if c.verdict == "faster":
        return f"{c.subject} is {ratio} as fast as {c.baseline} {rest}."
    if c.verdict == "slower":
        return f"{c.subject} is slower than {c.baseline}, at {ratio} its speed {rest}."
    return f"cannot tell {c.subject} from {c.baseline}, at {ratio} its speed {rest}: {c.doubt}."


def _statistic(name: str, row: _Row) -> float | None:
    """A percentile in ms."""
    value: float | None = getattr(row.record.stats, name)
    return value


def _share(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.4g} %"


def _size_unit(sizes: Iterator[int | None]) -> tuple[int, str]:
    """KiB, or MiB once that is 10 or more for an engine."""
    return (_MIB, "MiB") if max((size or 0 for size in sizes), default=0) >= 10 * _MIB else (1024, "KiB")


def _in_units(size: int | None, unit: int) -> str:
    return UNKNOWN if size is None else significant(size / unit)
