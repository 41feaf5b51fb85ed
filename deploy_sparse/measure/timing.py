"""A clock for one call, and what is said about many calls.

All times are milliseconds. Wall time is what a user waits for; process CPU time beside it shows whether the call
worked or waited.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError


@dataclass(frozen=True)
class Clock:
    """Two monotonic counters in nanoseconds: wall time, and CPU time of this process over all its threads."""

    wall_ns: Callable[[], int] = time.perf_counter_ns
    cpu_ns: Callable[[], int] = time.process_time_ns


HOST_CLOCK = Clock()


class Timing(NamedTuple):
    """One timed call, in ms."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Stats:
    """Summary of timed calls. Times in ms; ``cv`` is the population standard deviation over the mean.

    ``p95`` is not a number only while a record that did not state it is being read.
    """

    count: int
    mean: float
    std: float
    cv: float
    min: float
    p50: float
    p90: float
    p95: float = field(default=math.nan, kw_only=True)
    p99: float
    max: float


def time_call(call: Callable[[], object], clock: Clock = HOST_CLOCK) -> Timing:
    """Call once. The CPU counter is read outside the wall interval, so reading it costs the sample nothing."""
    cpu = clock.cpu_ns()
    start = clock.wall_ns()
    call()
    stop = clock.wall_ns()
    return Timing((stop - start) / 1e6, (clock.cpu_ns() - cpu) / 1e6)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest sample that at least ``percent`` % of the samples do not exceed: trtexec's rule, no interpolation.

    Args:
        ordered: samples in rising order, at least one.
        percent: 0 to 100.
    """
    # Whole-number arithmetic: 1 - 90/100 is not 1/10 in binary, and would pick the next sample up.
    index = len(ordered) - 1 - (100 - percent) * len(ordered) // 100
    return ordered[max(index, 0)]


def summarise(samples_ms: Sequence[float]) -> Stats:
    """Statistics of the samples.

    Raises:
        ConfigError: there is no sample.
    """
    if not len(samples_ms):
        raise ConfigError("no samples to summarise", expected="at least one timed call", fix="time the subject first")
    ordered = sorted(float(sample) for sample in samples_ms)
    mean, std = float(np.mean(ordered)), float(np.std(ordered))
    return Stats(
        count=len(ordered),
        mean=mean,
        std=std,
        cv=std / mean if mean else 0.0,
        min=ordered[0],
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )
