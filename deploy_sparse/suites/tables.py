"""What a suite's report says besides its records: how its subjects were made, its goals, and the papers' headlines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..measure.compare import Comparison, compare, compare_all
from ..measure.record import LatencyRecord
from ..measure.table import Table, percent, times
from .config import Goal, Headline, Suite
from .layers import LayerFacts
from .state import SubjectFacts

REACHED = 0.95  # of the MAC-predicted speed-up: an engine that reaches this has nothing of its own to explain
WHOLE = 0.02  # share of the MACs in layers that lost nothing, from which it is worth telling

Key = tuple[str, str, str]  # network, subject, target


@dataclass(frozen=True)
class Measured:
    """The records of a suite with what is compared, found by network, subject, target and batch; the last counts."""

    suite: Suite
    records: tuple[LatencyRecord, ...]
    described: Mapping[Key, SubjectFacts]
    layers: Mapping[Key, LayerFacts] = field(default_factory=dict)

    def places(self, network: str, forms: Sequence[str]) -> list[tuple[str, int]]:
        """Targets and batches at which one of the network's forms was timed, in the order of the records."""
        found = [(r.target, r.batch) for r in self.records if r.timed and r.network == network and r.subject in forms]
        return sorted(dict.fromkeys(found), key=lambda place: ([t for t, _ in found].index(place[0]), place[1]))

    def record(self, network: str, subject: str, target: str, batch: int) -> LatencyRecord | None:
        """The latest timed record."""
        wanted = (network, subject, target, batch)
        return next(
            (r for r in reversed(self.records) if r.timed and (r.network, r.subject, r.target, r.batch) == wanted), None
        )

    def comparison(self, network: str, subject: str, target: str, batch: int) -> Comparison | None:
        """With the dense network of the same run."""
        record = self.record(network, subject, target, batch)
        if record is None:
            return None
        beside = [r for r in self.records if r.run_id == record.run_id and r.batch == batch and r.target == target]
        return next((c for c in compare_all(beside) if c.subject == subject), None)


def tables(measured: Measured) -> tuple[Table, ...]:
    """All that have a row; the layers' last."""
    made = (goal_table(measured), headline_table(measured), subject_table(measured))
    return (*(table for table in made if table.rows), *(facts.table for facts in measured.layers.values()))


def subject_table(measured: Measured) -> Table:
    """How every subject was made, and how closely it follows the network it stands for."""
    rows = []
    for facts in measured.described.values():
        left = facts.macs / facts.dense_macs if facts.macs is not None and facts.dense_macs else None
        rows.append(
            (facts.network, facts.subject, facts.target, facts.how, percent(left), facts.parity or "nothing was cut")
        )
    note = (
        f"One-shot on random weights: the structure is as stated, the weights are noise (seed {measured.suite.seed}); "
        "times do not depend on them, and they say nothing about accuracy. What was cut was compared with the masked "
        "network it comes from before it was timed."
    )
    columns = ("network", "subject", "target", "made from", "MACs left", "equal to the masked network")
    return Table("What was measured", columns, tuple(rows), note)


def goal_table(measured: Measured) -> Table:
    """Whether the suite's goals were reached, one row for each network, target and batch."""
    rows = tuple(row for goal in measured.suite.goals for row in _goal_rows(measured, goal))
    columns = ("goal", "network", "form", "target", "batch", "goal is", "reached", "met")
    note = (
        "Reached: measured over MAC-predicted speed-up; or the time of one form over another's, in one run; with the "
        "95 % interval. A goal is met where all of the interval reaches it, and missed where none of it does."
    )
    yes, no = (sum(row[-1] == word for row in rows) for word in ("yes", "no"))
    told = f"Of {len(rows)} goals {yes} are met, {no} are missed, and of {len(rows) - yes - no} nobody can tell."
    return Table("Goals", columns, rows, f"{told} {note}", first=True)


def _goal_rows(measured: Measured, goal: Goal) -> Iterator[tuple[str | int, ...]]:
    for network in measured.suite.networks:
        for form in goal.forms:
            for target, batch in measured.places(network.name, [form]):
                place = (network.name, form, target, batch)
                if goal.of_predicted is not None:
                    found = measured.comparison(*place)
                    if found is not None and found.mac_ratio:
                        met = _met(found, goal.of_predicted * found.mac_ratio)
                        yield ("of MAC-predicted", *place, f"{goal.of_predicted:.2f}", _reached(found), met)
                elif goal.over is not None and goal.times is not None:
                    both = _over(measured, network.name, form, goal.over, target, batch)
                    if both is not None:
                        told = times(goal.times), _over_text(both), _met(both, goal.times)
                        yield (f"over {goal.over}", *place, *told)


def _met(found: Comparison, ratio: float) -> str:
    """Whether the whole interval reaches a ratio."""
    if found.low is None or found.high is None or found.low < ratio <= found.high:
        return "cannot tell"
    return "yes" if found.low >= ratio else "no"


def _over(measured: Measured, network: str, form: str, other: str, target: str, batch: int) -> Comparison | None:
    """One form against another that was timed in the same run."""
    record = measured.record(network, form, target, batch)
    rival = measured.record(network, other, target, batch)
    if record is None or rival is None:
        return None
    try:
        return compare(rival, record)
    except ConfigError:  # not measured alike, as in another run
        return None


def headline_table(measured: Measured) -> Table:
    """The papers' figures beside ours: the running time that the whole network saves here, at every batch."""
    found = [row for headline in measured.suite.headlines for row in _headline_rows(measured, headline)]
    batches = sorted({batch for _, savings, _ in found for batch in savings})
    rows = tuple((*left, *(savings.get(batch) for batch in batches), *right) for left, savings, right in found)
    columns = (
        *("headline", "network", "form", "paper saves"),
        *(f"ours saves at batch {batch}" for batch in batches),
        *("verdict", "MACs predict", "what the paper timed", "target"),
    )
    note = (
        "Ours: the share of the dense network's running time that the whole network saves, at its real shapes, against "
        "the dense network built and timed the same way beside it; in brackets the 95 % interval. MACs predict: the "
        "share of multiply-accumulates that is gone. The structure is the stated one, on random weights."
    )
    told = " ".join(filter(None, (note, measured.suite.headlines_note)))
    return Table("The papers' headlines", columns, rows, told, first=True)


def _headline_rows(
    measured: Measured, headline: Headline
) -> Iterator[tuple[tuple[str, ...], dict[int, str], tuple[str, ...]]]:
    """The cells before those of batches, these by batch, and those behind."""
    paper = "not given" if headline.saving is None else percent(headline.saving)
    claim = f"{headline.source}: {headline.claim}"
    for form in headline.forms:
        places = measured.places(headline.network, [form])
        for target in dict.fromkeys(target for target, _ in places):
            key = (headline.network, form, target)
            compared = {batch: measured.comparison(*key, batch) for at, batch in places if at == target}
            found = {batch: comparison for batch, comparison in compared.items() if comparison is not None}
            if found:
                predicted = next((1 - 1 / c.mac_ratio for c in found.values() if c.mac_ratio), None)
                told = verdict(headline, found, measured.described.get(key), measured.layers.get(key))
                savings = {batch: _saving(comparison) for batch, comparison in found.items()}
                right = told, percent(predicted), headline.timed, target
                yield (claim, headline.network, form, paper), savings, right


def verdict(
    headline: Headline,
    found: Mapping[int, Comparison],
    facts: SubjectFacts | None = None,
    layers: LayerFacts | None = None,
) -> str:
    """Whether the paper's figure is reached at each batch, and why not where it is not.

    The reasons come from what was measured and counted: how many MACs are left, how many lie in layers that lost
    nothing (Amdahl's law), how much of the MAC-predicted speed-up the engine reaches, and what its layers lose it to.
    """
    outcomes = {batch: _outcome(headline.saving, comparison) for batch, comparison in found.items()}
    several = len({*outcomes.values()}) > 1
    told = (
        [f"at batch {batch} {outcome}" for batch, outcome in outcomes.items()] if several else [*outcomes.values()][:1]
    )
    short = {batch: found[batch] for batch, outcome in outcomes.items() if outcome in (_SHORT, _NONE)}
    if short:
        told += _reasons(headline.saving, short, facts, layers)
    left = next((1 / c.mac_ratio for c in found.values() if c.mac_ratio), None)
    if headline.macs_left is not None and left is not None:
        told.append(f"the paper's network has {percent(headline.macs_left)} of the MACs left, ours {percent(left)}")
    return "; ".join(told)


_SHORT, _NONE = "falls short", "nothing to compare with"


def _outcome(saving: float | None, found: Comparison) -> str:
    if saving is None:
        return _NONE
    words = {"yes": "reached", "no": _SHORT, "cannot tell": "cannot tell, as the interval includes the figure"}
    return words[_met(found, 1 / (1 - saving))] if found.low is not None else "cannot tell, with too few blocks"


def _reasons(
    saving: float | None, short: Mapping[int, Comparison], facts: SubjectFacts | None, layers: LayerFacts | None
) -> list[str]:
    """Why the batches at which it falls short do."""
    ratios = {batch: (c.ratio, c.mac_ratio) for batch, c in short.items() if c.mac_ratio is not None}
    if not ratios:
        return []
    reasons = []
    predicted = 1 - 1 / next(iter(ratios.values()))[1]
    if saving is not None and predicted < saving:
        reasons.append(f"the MACs permit {percent(predicted)} at most")
        if facts is not None and facts.whole_macs and facts.dense_macs and facts.whole_macs / facts.dense_macs >= WHOLE:
            reasons.append(
                f"{percent(facts.whole_macs / facts.dense_macs)} of the MACs are in layers that lose nothing"
            )
    reached = {batch: ratio / by_macs for batch, (ratio, by_macs) in ratios.items() if ratio / by_macs < REACHED}
    if reached:
        shares = ", ".join(f"{share:.2f} at batch {batch}" for batch, share in reached.items())
        reasons.append(f"the engine reaches {shares} of the MAC-predicted speed-up")
        if layers is not None and (causes := layers.causes()):
            reasons.append(f"of its layers' time at batch {layers.batch}, beyond their MACs: {causes}")
    return reasons


def _saving(found: Comparison) -> str:
    ours = percent(1 - 1 / found.ratio)
    if found.low is None or found.high is None:
        return f"{ours} (too few blocks for an interval)"
    return f"{ours} ({100 * (1 - 1 / found.low):.2f} to {100 * (1 - 1 / found.high):.2f})"


def _reached(found: Comparison) -> str:
    """The share of the MAC-predicted speed-up."""
    by_macs = found.mac_ratio or 1.0
    if found.low is None or found.high is None:
        return f"{found.ratio / by_macs:.3f} (too few blocks for an interval)"
    return f"{found.ratio / by_macs:.3f} ({found.low / by_macs:.3f} to {found.high / by_macs:.3f})"


def _over_text(found: Comparison) -> str:
    """One form's time over another's, and how their MACs compare: rounded widths cost some."""
    macs = f", with {1 / found.mac_ratio:.2f}× the MACs" if found.mac_ratio else ""
    if found.low is None or found.high is None:
        return f"{times(found.ratio)} (too few blocks for an interval){macs}"
    return f"{times(found.ratio)} ({found.low:.2f} to {found.high:.2f}){macs}"
