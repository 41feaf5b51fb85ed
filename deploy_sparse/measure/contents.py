"""What a report says, as sentences and tables of text; how it looks is :mod:`.report`'s concern.

Everything is derived from the records and comparisons given, in their order: equal input gives equal text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ConfigError
from .compare import REOPENING, Comparison, Verdict
from .line_plot import LinePlot
from .record import LatencyRecord
from .table import UNKNOWN, Code, Table, count, percent, ratio_and_interval, significant, times

Key = tuple[str, str, int, str]  # run, target, batch, subject

_FINER = ("change, points", "engine KiB", "p99 ms", "samples/s")


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    ``provenance`` are the lines under the title, ``plots`` and ``tables`` any extra ones, ``conditions`` further
    (label, text) pairs; the text with the label ``command`` is shown as code, to be copied.

    Raises:
        ConfigError: a comparison whose record is not among ``records``.
    """

    title: str
    records: tuple[LatencyRecord, ...]
    comparisons: tuple[Comparison, ...]
    provenance: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    plots: tuple[LinePlot, ...] = ()

    def __post_init__(self) -> None:
        timed = {_key(record) for record in self.records if record.timed}
        for comparison in self.comparisons:
            if _comparison_key(comparison) not in timed:
                raise ConfigError(
                    f"{comparison.subject!r} at batch {comparison.batch} is compared but has no timed record here",
                    expected="the record of every compared subject",
                    fix="make the comparisons from these records: compare_all(records)",
                )

    @property
    def groups(self) -> tuple[tuple[LatencyRecord, ...], ...]:
        """The records by target, batch and run, targets and runs in order of appearance, the baseline first."""
        targets = list(dict.fromkeys(record.target for record in self.records))
        runs = list(dict.fromkeys(record.run_id for record in self.records))
        groups: dict[tuple[int, int, int], list[LatencyRecord]] = {}
        for record in self.records:
            place = (targets.index(record.target), record.batch, runs.index(record.run_id))
            groups.setdefault(place, []).append(record)
        return tuple(
            tuple(sorted(group, key=lambda record: record.subject != record.baseline))
            for _, group in sorted(groups.items())
        )

    def place_of(self, group: tuple[LatencyRecord, ...]) -> str:
        """``"cpu, batch 1"``, with the run where several runs measured that."""
        first = group[0]
        same = [other for other in self.groups if (other[0].target, other[0].batch) == (first.target, first.batch)]
        return f"{first.target}, batch {first.batch}" + (f", run {first.run_id}" if len(same) > 1 else "")

    def comparison_of(self, record: LatencyRecord) -> Comparison | None:
        """The comparison of this record with its baseline, if there is one."""
        return next((c for c in self.comparisons if _comparison_key(c) == _key(record)), None)


@dataclass(frozen=True)
class Sentence:
    """One verdict; ``kind`` is the comparison's verdict, or ``"not timed"``."""

    kind: Verdict | str
    text: str


def verdicts(report: Report) -> tuple[Sentence, ...]:
    """One sentence per comparison, and one for each target and batch where nothing was compared."""
    return tuple(sentence for group in report.groups for sentence in _group_verdicts(report, group))


def main_table(report: Report) -> Table:
    """Every timed record with its accuracy, cost, times and speed-up."""
    rows = []
    for group in report.groups:
        for record in group:
            if record.stats is None:
                continue
            comparison = report.comparison_of(record)
            rows.append(
                (
                    record.subject,
                    record.target,
                    record.batch,
                    percent(record.accuracy),
                    _points(record, group),
                    count(record.parameters),
                    count(record.macs),
                    UNKNOWN if record.engine_bytes is None else significant(record.engine_bytes / 1024),
                    record.stats.p50,
                    record.stats.p90,
                    record.stats.p99,
                    count(1000 * record.batch / record.stats.mean),
                    _speed_up(record, comparison),
                    times(comparison.mac_ratio) if comparison else UNKNOWN,
                )
            )
    columns = (
        *("subject", "target", "batch", "test accuracy", "change, points", "parameters", "MACs", "engine KiB"),
        *("p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up (95 % interval)", "predicted by MACs"),
    )
    note = (
        "The speed-up is the median over paired blocks of baseline time / subject time; above 1× is faster. "
        f"Nothing within {100 * REOPENING:g} % of 1× counts as faster or slower. The interval speaks for this run: "
        "another run, or a rebuilt engine, may differ by a few percent."
    )
    return Table("Results", columns, tuple(rows), note if rows else "Nothing was timed here.")


def final_table(report: Report) -> Table:
    """The short table for a terminal: the main table without its finer columns; :func:`untimed_table` has the rest."""
    full = main_table(report)
    shown = [i for i, name in enumerate(full.columns) if name not in _FINER]
    rows = tuple(tuple(row[i] for i in shown) for row in full.rows)
    return Table("Timed", tuple(full.columns[i] for i in shown), rows, "" if rows else full.note)


def spread_table(report: Report) -> Table:
    """How the times of every timed record spread."""
    rows = tuple(
        (
            record.subject,
            record.target,
            record.batch,
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
    columns = ("subject", "target", "batch", "calls", "blocks", "min ms", "p50 ms", "max ms", "variation", "CPU ms")
    note = "Variation is the standard deviation over the mean; CPU ms is the mean process CPU time of a call."
    return Table("Spread of the times", columns, rows, note)


def untimed_table(report: Report) -> Table:
    """Engines that were compiled but not timed: size and build time, and never a latency."""
    rows = {
        (record.subject, record.target): (
            record.subject,
            record.target,
            f"{record.status}: {record.reason}",
            UNKNOWN if record.engine_bytes is None else significant(record.engine_bytes / 1024),
            UNKNOWN if record.build_seconds is None else significant(record.build_seconds, 3),
        )
        for record in report.records
        if not record.timed
    }
    columns = ("subject", "target", "status", "engine KiB", "build s")
    return Table("Compiled, not timed here", columns, tuple(rows.values()))


def slower(report: Report) -> tuple[str, ...]:
    """A sentence with the reasons for every subject that got slower, or that cannot be told from its baseline.

    Where none got slower, the first sentence says so.
    """
    found = tuple(_speed(c) for c in report.comparisons if c.verdict == "slower")
    unclear = tuple(_speed(c) for c in report.comparisons if c.verdict == "cannot tell")
    if not report.comparisons:
        return ("Nothing was compared, so nothing is known to be slower.",)
    if found:
        return found + unclear
    doubt = f" For {len(unclear)} of {len(report.comparisons)} comparisons the data cannot tell." if unclear else ""
    return (f"Nothing: no subject was measured slower than its baseline.{doubt}", *unclear)


def conditions_table(report: Report) -> Table:
    """Under what conditions the numbers hold; values that differ between records stand side by side."""
    rows = ((label, Code(value) if label == "command" else value) for label, value in _conditions(report))
    return Table("Conditions", ("condition", "value"), tuple(rows))


def hashes_table(report: Report) -> Table:
    """What every subject was made from; the first 12 digits of each hash."""
    kinds = ("engine", "onnx", "ticket", "target")
    rows = {
        (record.subject, record.target, *(record.hashes.get(kind, UNKNOWN)[:12] for kind in kinds)): None
        for record in report.records
        if record.hashes
    }
    return Table("Made from", ("subject", "target", *kinds), tuple(rows), "SHA-256; the records hold all 64 digits.")


def _group_verdicts(report: Report, group: tuple[LatencyRecord, ...]) -> Iterator[Sentence]:
    place = report.place_of(group)
    comparisons = [c for record in group if (c := report.comparison_of(record)) is not None]
    for c in comparisons:
        yield Sentence(c.verdict, f"{place}: {_verdict(c)}")
    if not comparisons:
        timed = [record.subject for record in group if record.timed]
        reasons = dict.fromkeys(f"{record.status}: {record.reason}" for record in group if not record.timed)
        text = "; ".join([*([f"{', '.join(timed)} timed, with nothing to compare"] if timed else []), *reasons])
        yield Sentence("not timed", f"{place if timed else group[0].target}: {text}.")


def _speed(c: Comparison) -> str:
    ratio, bounds = _ratio_and_bounds(c)
    doubt = f"cannot tell, as {c.doubt}: " if c.doubt else ""
    facts = "; ".join((f"{ratio} the speed of {c.baseline} ({bounds})", *c.reasons))
    return f"{c.subject} on {c.target} at batch {c.batch}: {doubt}{facts}."


def _verdict(c: Comparison) -> str:
    ratio, bounds = _ratio_and_bounds(c)
    rest = f"({bounds})" + (f"; its MACs predict {times(c.mac_ratio)}" if c.mac_ratio else "")
    if c.verdict == "faster":
        return f"{c.subject} is {ratio} as fast as {c.baseline} {rest}."
    if c.verdict == "slower":
        return f"{c.subject} is slower than {c.baseline}, at {ratio} its speed {rest}."
    return f"cannot tell {c.subject} from {c.baseline}, at {ratio} its speed {rest}: {c.doubt}."


def _ratio_and_bounds(c: Comparison) -> tuple[str, str]:
    """``("1.84×", "95 % interval 1.79 to 1.90")``; no interval where too few blocks were timed for one."""
    if c.low is None or c.high is None:
        return times(c.ratio), "too few blocks for an interval"
    ratio, interval = ratio_and_interval(c.ratio, c.low, c.high)
    return ratio, f"95 % interval {interval}"


def _speed_up(record: LatencyRecord, comparison: Comparison | None) -> str:
    if comparison is None:
        return "baseline" if record.subject == record.baseline else UNKNOWN
    ratio, bounds = _ratio_and_bounds(comparison)
    doubt = ", cannot tell" if comparison.verdict == "cannot tell" else ""
    return f"{ratio} ({bounds.removeprefix('95 % interval ')}){doubt}"  # the column's name says what it is


def _points(record: LatencyRecord, group: tuple[LatencyRecord, ...]) -> str:
    dense = next((other.accuracy for other in group if other.subject == record.baseline), None)
    if record.subject == record.baseline or dense is None or record.accuracy is None:
        return UNKNOWN
    return f"{100 * (record.accuracy - dense):+.2f}"


def _conditions(report: Report) -> Iterator[tuple[str, str]]:
    records = report.records
    yield "baseline", _values(record.baseline for record in records)
    yield "targets", _values(f"{record.target} ({record.runtime})" for record in records)
    for key in dict.fromkeys(key for record in records for key in record.environment):
        yield key, _values(record.environment.get(key, "absent") for record in records)
    conditions = [record.conditions for record in records if record.timed]
    if conditions:
        yield "threads", _values("not stated" if c.threads is None else str(c.threads) for c in conditions)
        yield (
            "timing",
            _values(
                f"warm-up {c.warmup_ms:g} ms, then blocks of {c.block_ms:g} ms in turns, for at "
                f"least {c.duration_s:g} s and {c.min_iterations} calls a subject"
                for c in conditions
            ),
        )
        yield (
            "interleaved",
            _values(
                ", ".join(sorted({r.subject, *r.conditions.interleaved_with}))
                if r.conditions.interleaved_with
                else "no"
                for r in records
                if r.timed
            ),
        )
        clocks = [mhz for c in conditions for mhz in c.processor_mhz or ()]
        yield "processor clock", f"{min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else "not known"
    dates = sorted(record.date for record in records)
    if dates:
        first, last = (f"{date:%Y-%m-%d %H:%M} UTC" for date in (dates[0], dates[-1]))
        yield "date", first if first == last else f"{first} to {last}"
        yield "run", _values(record.run_id for record in records)
    yield from report.conditions


def _values(texts: Iterator[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _key(record: LatencyRecord) -> Key:
    return record.run_id, record.target, record.batch, record.subject


def _comparison_key(comparison: Comparison) -> Key:
    return comparison.run_id, comparison.target, comparison.batch, comparison.subject
