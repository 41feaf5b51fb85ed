"""Dense against subject under identical conditions: a ratio, its interval, and no more than the interval bears.

The ratio is the median over paired blocks of (baseline's block median / subject's block median): above 1, the
subject is faster. Pairs cancel drift that both share. A verdict needs an interval clear of 1 by the margin that
opening the same engine again makes. The interval is a bootstrap over the pairs (Efron and Tibshirani 1993, section
13.3, the percentile interval), seeded, so that equal records give equal reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, Literal

import numpy as np

from ..config import differences
from ..errors import ConfigError
from .gpu_state import SLOWED_BY
from .record import Blocks, LatencyRecord

Verdict = Literal["faster", "slower", "cannot tell"]

MIN_PAIRS = 8  # fewer pairs give an interval that covers the truth much less often than it says
# The interval knows the spread within one run, not that of opening an engine again (memory lands elsewhere): in 24
# profiles of one engine against itself on a CPU, 15 intervals left 1 out, and the ratio was up to 1.1 % off.
REOPENING = 0.01
ON_PROCESSOR = 0.9  # share of the wall time below which a subject waited, for other programs for example
BUSY = 0.8  # … that a GPU works, below which it is worth saying what the rest is
UNSTEADY = 0.01  # variation of a GPU's times from which trtexec, too, calls them unstable
RESAMPLES = 4000
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """Subject against baseline at one target and batch of one run.

    ``ratio`` is baseline time over subject time, ``low`` and ``high`` its 95 % interval, None with fewer than
    ``MIN_PAIRS`` pairs. ``mac_ratio`` is what the multiply-accumulates alone would predict, None where they are
    unknown. ``doubt`` is why the verdict is "cannot tell", else None; ``reasons`` is what is known besides.
    ``device_ratio``, ``device_low`` and ``device_high`` are the same of the device's own clock, where both were timed
    with it; the verdict is the host's, as that is what a user waits for. ``processor_ratio`` is the same of the mean
    processor times, where a subject waited for a tenth of its time or more, on a CPU.
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
    device_ratio: float | None = None
    device_low: float | None = None
    device_high: float | None = None
    processor_ratio: float | None = None


def compare(baseline: LatencyRecord, subject: LatencyRecord) -> Comparison:
    """Compare two records of one run.

    Raises:
        ConfigError: a record without times, or conditions that differ; every differing field is named.
    """
    _check(baseline, subject)
    ratio, low, high = _ratio(baseline.samples_ms, subject.samples_ms)
    pairs = len(baseline.samples_ms)
    verdict, doubt = _verdict(low, high, pairs)
    device: tuple[float | None, float | None, float | None] = (None, None, None)
    if baseline.device_samples_ms and subject.device_samples_ms:
        device = _ratio(baseline.device_samples_ms, subject.device_samples_ms)
    mac_ratio = baseline.macs / subject.macs if baseline.macs and subject.macs else None
    processor_ratio = _processor_ratio(baseline, subject)
    return Comparison(
        run_id=subject.run_id,
        target=subject.target,
        batch=subject.batch,
        baseline=baseline.subject,
        subject=subject.subject,
        ratio=ratio,
        low=low,
        high=high,
        pairs=pairs,
        mac_ratio=mac_ratio,
        verdict=verdict,
        doubt=doubt,
        reasons=tuple(_reasons(baseline, subject, ratio, mac_ratio, processor_ratio, verdict)),
        device_ratio=device[0],
        device_low=device[1],
        device_high=device[2],
        processor_ratio=processor_ratio,
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


def _ratio(baseline: Blocks, subject: Blocks) -> tuple[float, float | None, float | None]:
    """Baseline time over subject time and its interval, where there are enough pairs for one."""
    pair_ratios = _block_medians(baseline) / _block_medians(subject)  # [pairs]
    low, high = _interval(pair_ratios) if len(pair_ratios) >= MIN_PAIRS else (None, None)
    return float(np.median(pair_ratios)), low, high


def _block_medians(blocks: Blocks) -> np.ndarray:
    return np.array([median(block) for block in blocks])  # [blocks], ms


def _interval(pair_ratios: np.ndarray) -> tuple[float, float]:
    drawn = pair_ratios[_drawn(len(pair_ratios))]  # [RESAMPLES, pairs]
    drawn.sort(axis=1)  # np.median takes ten times as long
    upper, lower = len(pair_ratios) // 2, (len(pair_ratios) - 1) // 2
    low, high = np.quantile((drawn[:, lower] + drawn[:, upper]) / 2, (0.025, 0.975))
    return float(low), float(high)


@lru_cache(maxsize=8)
def _drawn(count: int) -> np.ndarray:
    """Which of ``count`` pairs each resample holds, [RESAMPLES, count]."""
    drawn = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
    return drawn.astype(np.min_scalar_type(count))  # kept, so as small as it goes


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
    for what in ("network", "precision"):  # that not all records state
        here, there = getattr(baseline, what), getattr(subject, what)
        if here and there and here != there:
            found.append(f"{what}: {here} -> {there}")
    for one, other in ((baseline, subject), (subject, baseline)):
        names = {*other.conditions.interleaved_with, other.subject}
        if one.subject not in names:
            found.append(f"interleaved with: {one.subject} is not among {', '.join(sorted(names))}")
    if found:
        raise ConfigError(
            f"{baseline.subject!r} and {subject.subject!r} were not measured alike: {'; '.join(found)}",
            expected="records of one run and network, with one target, batch, precision, environment and way of timing",
            fix="measure both in one run: deploy-sparse profile dense=ENGINE ticket=ENGINE",
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


def _processor_ratio(baseline: LatencyRecord, subject: LatencyRecord) -> float | None:
    shares = _share(baseline), _share(subject)
    if not (baseline.cpu_ms and subject.cpu_ms) or all(share is None or share >= ON_PROCESSOR for share in shares):
        return None
    return baseline.cpu_ms / subject.cpu_ms


def _share(record: LatencyRecord) -> float | None:
    """Processor time over wall time; none for a GPU, where the processor waits or polls as the library likes."""
    if record.stats is None or record.cpu_ms is None or record.on_gpu:
        return None
    return record.cpu_ms / record.stats.mean


def _reasons(
    baseline: LatencyRecord,
    subject: LatencyRecord,
    ratio: float,
    mac_ratio: float | None,
    processor_ratio: float | None,
    verdict: Verdict,
) -> list[str]:
    reasons = []
    if mac_ratio is not None:
        reasons.append(f"reaches {ratio / mac_ratio:.2f} of the MAC-predicted speed-up of {mac_ratio:.2f}×")
        if verdict == "slower" and mac_ratio > 1:
            reasons.append(
                f"does {1 / mac_ratio:.2f} of the baseline's multiply-accumulates, "
                f"yet takes {1 / ratio:.2f} times as long"
            )
    reasons += [reason for record in (baseline, subject) for reason in _waits(record)]
    if processor_ratio is not None:
        reasons.append(f"in processor time the ratio is {processor_ratio:.2f}×")
    gpu = subject.conditions.gpu
    if slowed := [word for word in SLOWED_BY if gpu is not None and word in gpu.held_by]:
        reasons.append(f"the GPU's clocks were held down meanwhile: {', '.join(slowed)}")
    return reasons


def _waits(record: LatencyRecord) -> list[str]:
    """What a call spent its time on besides work, and how steady the device's clock was."""
    if record.stats is None:
        return []
    if (device := record.device_stats) is not None:
        found = []
        if (busy := device.p50 / record.stats.p50) < BUSY:
            rest = (
                "transfers, launches and waiting"
                if record.conditions.transfers == "included"
                else "launches and waiting"
            )
            found.append(f"{record.subject} kept the GPU at work for {busy:.2f} of its wall time; the rest is {rest}")
        if device.cv > UNSTEADY:
            lock = "steady ones need locked clocks: nvidia-smi -lgc"
            found.append(f"{record.subject}'s times on the GPU vary by {device.cv:.1%}; {lock}")
        return found
    share = _share(record)
    if share is None or share >= ON_PROCESSOR:
        return []
    return [f"{record.subject} was on the processor for {share:.2f} of its wall time; the rest it waited"]
