"""What a report must not hide: what got slower, what cannot be told, and what stayed behind its multiply-accumulates.

All three are in every report, and say so where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from .compare import Comparison
from .contents import Report, place_columns, ratio_and_bounds
from .record import NOT_BUILT, NOT_TIMED
from .report_data import way_of
from .table import Cell, Table, times

# The share of the MAC-predicted speed-up that an aligned network is expected to reach on a CPU; below it, why is asked.
REACHED = 0.95


def slower(report: Report) -> tuple[str, ...]:
    """A sentence with the reasons for every subject that got slower; without one, a sentence that says so."""
    if not report.comparisons:
        return ("Nothing was compared, so nothing is known to be slower.",)
    found = tuple(_speed(report, c) for c in report.comparisons if c.verdict == "slower")
    unclear = sum(c.verdict == "cannot tell" for c in report.comparisons)
    doubt = f" For {unclear} of {len(report.comparisons)} comparisons the data cannot tell." if unclear else ""
    return found or (f"Nothing: no subject was measured slower than its baseline.{doubt}",)


def unclear(report: Report) -> tuple[str, ...]:
    """A sentence for everything of which it cannot be told whether it is faster; without any, one that says so."""
    return tuple(_unclear(report)) or ("Everything that was measured here could be told.",)


def missed(report: Report) -> Table:
    """What should be faster by its multiply-accumulates and reaches less than ``REACHED`` of it, furthest behind first.

    A comparison whose interval holds the share of ``REACHED`` counts as reached: it cannot be told from it.
    """
    known = [c for c in report.comparisons if c.mac_ratio is not None and c.mac_ratio > 1]
    behind = sorted((c for c in known if _behind(c)), key=lambda c: round(_reached(c), 2))
    by_layer = any(table.columns[:1] == ("layer",) and "why" in table.columns for table in report.tables)
    unknown = "see the tables of layers" if by_layer else "not known from these records"
    places = place_columns(report)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            *(of(report.record_of(c)) for of in places.values()),
            _measured(c),
            times(c.mac_ratio),
            f"{100 * _reached(c):.0f} %",
            "; ".join(_reasons(c)) or unknown,
        )
        for c in behind
    )
    columns = (*places, "speed-up", "predicted by MACs", "reached", "why")
    return Table("What missed its MAC-predicted speed-up", columns, rows, _note(len(known), len(behind)))


def _note(known: int, behind: int) -> str:
    if not known:
        return "Nothing was compared that has fewer multiply-accumulates than its baseline, as far as they are known."
    if not behind:
        return (
            f"Nothing: the intervals of all {known} comparisons hold {100 * REACHED:g} % of what their "
            "multiply-accumulates predict, or lie above it."
        )
    return (
        f"{behind} of {known} comparisons reach less than {100 * REACHED:g} % of what their multiply-accumulates "
        "predict. That is what to expect only where arithmetic takes all the time; layers that wait for memory, or are "
        "too small to fill the machine, gain less."
    )


def _reached(c: Comparison) -> float:
    """The share of the predicted speed-up that was measured."""
    return c.ratio / (c.mac_ratio or 1)


def _behind(c: Comparison) -> bool:
    best = c.ratio if c.high is None else c.high
    return c.mac_ratio is not None and best < REACHED * c.mac_ratio


def _measured(c: Comparison) -> str:
    ratio, bounds = ratio_and_bounds(c)
    return f"{ratio} ({bounds.removeprefix('95 % interval ')})"


def _reasons(c: Comparison) -> tuple[str, ...]:
    """What is known besides the share that was reached, which has a column of its own."""
    return tuple(reason for reason in c.reasons if "of the MAC-predicted speed-up" not in reason)


def _unclear(report: Report) -> Iterator[str]:
    for c in report.comparisons:
        if c.verdict == "cannot tell":
            yield _speed(report, c)
    for group in report.groups:
        alone = [r.subject for r in group if r.timed and r.subject != r.baseline and not report.comparison_of(r)]
        if alone:
            yield f"{', '.join(alone)} on {report.place_of(group)}: {group[0].baseline} was not timed beside it."
    for status, what in (
        (NOT_TIMED, "compiled for {} and not timed here; no latency is guessed"),
        (NOT_BUILT, "not built for {}; the reasons are in the table of what was not timed"),
    ):
        found = {(report.network_of(r), r.subject, r.target) for r in report.records if r.status == status}
        if found:
            listed = ", ".join(dict.fromkeys(r.target for r in report.records if r.status == status))
            were = "engine was" if len(found) == 1 else "engines were"
            yield f"{len(found)} {were} {what.format(listed)}."


def _speed(report: Report, c: Comparison) -> str:
    ratio, bounds = ratio_and_bounds(c)
    doubt = f"cannot tell, as {c.doubt}: " if c.doubt else ""
    facts = "; ".join((f"{ratio} the speed of {c.baseline} ({bounds})", *c.reasons))
    network = f"{report.network_of(report.record_of(c))}, " if len(report.networks) > 1 else ""
    way = f", {words}" if (words := way_of(report.record_of(c))) else ""
    run = f" in run {c.run_id}" if report.repeated else ""
    return f"{network}{c.subject} on {c.target} at batch {c.batch}{way}{run}: {doubt}{facts}."
