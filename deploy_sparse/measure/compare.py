"""Dense against subject under identical conditions: a ratio, its interval, and no more than the interval bears.

The ratio is the median over paired blocks of (baseline's block median / subject's block median): above 1, the
subject is faster. Pairs cancel drift that both share. A verdict needs an interval clear of 1 by the margin that
opening the same engine again makes. The interval is a bootstrap over the pairs (Efron and Tibshirani 1993, section
13.3, the percentile interval), seeded, so that equal records give equal reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..config import differences
from ..errors import ConfigError
from .record import LatencyRecord

Verdict = Literal["faster", "slower", "cannot tell"]

MIN_PAIRS = 8  # fewer pairs give an interval that covers the truth much less often than it says
# The interval knows the spread within one run, not that of opening an engine again (memory lands elsewhere): in 24
# profiles of one engine against itself on a CPU, 15 intervals left 1 out, and the ratio was up to 1.1 % off.
REOPENING = 0.01
RESAMPLES = 4000
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """Subject against baseline at one target and batch of one run.

    ``ratio`` is baseline time over subject time, ``low`` and ``high`` its 95 % interval, None with fewer than
    ``MIN_PAIRS`` pairs. ``mac_ratio`` is what the multiply-accumulates alone would predict, None where they are
    unknown. ``doubt`` is why the verdict is "cannot tell", else None; ``reasons`` is what is known besides.
    """

    run_id: str
    target: str
    batch: int
    baseline: str
    subject: str
    ratio: float
    low: float | None
    high: float | None
    pairs: int
    mac_ratio: float | None
    verdict: Verdict
    doubt: str | None
    reasons: tuple[str, ...]


def compare(baseline: LatencyRecord, subject: LatencyRecord) -> Comparison:
    """Compare two records of one run.

    Raises:
        ConfigError: a record without times, or conditions that differ; every differing field is named.
    """
    _check(baseline, subject)
    pair_ratios = _block_medians(baseline) / _block_medians(subject)  # [pairs]
    ratio = float(np.median(pair_ratios))
    low, high = _interval(pair_ratios) if len(pair_ratios) >= MIN_PAIRS else (None, None)
    verdict, doubt = _verdict(low, high, len(pair_ratios))
    mac_ratio = baseline.macs / subject.macs if baseline.macs and subject.macs else None
    return Comparison(
        run_id=subject.run_id,
        target=subject.target,
        batch=subject.batch,
        baseline=baseline.subject,
        subject=subject.subject,
        ratio=ratio,
        low=low,
        high=high,
        pairs=len(pair_ratios),
        mac_ratio=mac_ratio,
        verdict=verdict,
        doubt=doubt,
        reasons=tuple(_reasons(baseline, subject, ratio, mac_ratio, verdict)),
    )


def compare_all(records: Sequence[LatencyRecord]) -> tuple[Comparison, ...]:
    """Every timed subject against the baseline of its own run, target and batch, in the order of the records."""
    timed = [record for record in records if record.timed]
    found = {(r.run_id, r.target, r.batch): r for r in timed if r.subject == r.baseline}
    return tuple(
        compare(found[key], record)
        for record in timed
        if record.subject != record.baseline and (key := (record.run_id, record.target, record.batch)) in found
    )


def _block_medians(record: LatencyRecord) -> np.ndarray:
    return np.array([np.median(block) for block in record.samples_ms])  # [blocks], ms


def _interval(pair_ratios: np.ndarray) -> tuple[float, float]:
    count = len(pair_ratios)
    chosen = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
    medians = np.median(pair_ratios[chosen], axis=1)  # [RESAMPLES, pairs] -> [RESAMPLES]
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def _verdict(low: float | None, high: float | None, pairs: int) -> tuple[Verdict, str | None]:
    """The verdict and, for "cannot tell", the reason."""
    if low is None or high is None:
        return "cannot tell", f"only {pairs} paired blocks were timed, fewer than the {MIN_PAIRS} an interval needs"
    if low > 1 + REOPENING:
        return "faster", None
    if high < 1 - REOPENING:
        return "slower", None
    if low <= 1 <= high:
        return "cannot tell", "the interval includes 1"
    doubt = (
        f"the interval comes within {REOPENING:.0%} of 1, and opening one engine twice already makes such a difference"
    )
    return "cannot tell", doubt


def _check(baseline: LatencyRecord, subject: LatencyRecord) -> None:
    for record in (baseline, subject):
        if not record.timed:
            raise ConfigError(
                f"{record.subject!r} at batch {record.batch} on {record.target} has no times: {record.reason}",
                expected="two timed records",
                fix="measure where both engines can run",
            )
    found = differences(_condition(baseline), _condition(subject))
    names = set(subject.conditions.interleaved_with) | {subject.subject}
    if baseline.subject not in names:
        found.append(f"interleaved with: {baseline.subject} is not among {', '.join(sorted(names))}")
    if found:
        raise ConfigError(
            f"{baseline.subject!r} and {subject.subject!r} were not measured alike: {'; '.join(found)}",
            expected="records of one run with the same target, batch, threads and environment",
            fix="measure both in one run",
        )


def _condition(record: LatencyRecord) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "target": record.target,
        "target hash": record.hashes.get("target"),
        "runtime": record.runtime,
        "batch": record.batch,
        "blocks": len(record.samples_ms),
        **record.conditions.model_dump(exclude={"interleaved_with"}),
        "environment": record.environment,
    }


def _reasons(
    baseline: LatencyRecord, subject: LatencyRecord, ratio: float, mac_ratio: float | None, verdict: Verdict
) -> list[str]:
    reasons = []
    if mac_ratio is not None:
        reasons.append(f"reaches {ratio / mac_ratio:.2f} of the MAC-predicted speed-up of {mac_ratio:.2f}×")
        if verdict == "slower" and mac_ratio > 1:
            reasons.append(
                f"does {1 / mac_ratio:.2f} of the baseline's multiply-accumulates, "
                f"yet takes {1 / ratio:.2f} times as long"
            )
    for record in (baseline, subject):
        share = _busy_share(record)
        if share is not None and share < 0.9:
            reasons.append(
                f"{record.subject} was on the processor for {share:.2f} of its wall time; the rest it waited"
            )
    return reasons


def _busy_share(record: LatencyRecord) -> float | None:
    if record.cpu_ms is None or record.stats is None:
        return None
    return record.cpu_ms / record.stats.mean
