"""Several subjects timed side by side: short blocks A B, B A, A B, … so that a drifting machine drifts for all.

Block *i* of every subject was taken within the same moment, so the blocks are pairs; :mod:`.compare` resamples them.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from .timing import HOST_CLOCK, Clock, Timing, time_call

# With these, two engines at two batch sizes take about 6 s: 2 x 2 x (0.2 + 1.25).
WARMUP_MS = 200.0
DURATION_S = 1.25
MIN_ITERATIONS = 10
BLOCK_MS = 50.0  # 25 pairs in DURATION_S, and long against the few calls that re-warm the caches


@dataclass(frozen=True)
class Samples:
    """Every timed call of one subject.

    ``blocks_ms[i][j]`` is the wall time in ms of call *j* in block *i*; ``cpu_ms`` is the mean process CPU time of a
    call in ms.
    """

    blocks_ms: tuple[tuple[float, ...], ...]
    cpu_ms: float


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    *,
    warmup_ms: float = WARMUP_MS,
    duration_s: float = DURATION_S,
    min_iterations: int = MIN_ITERATIONS,
    block_ms: float = BLOCK_MS,
    poll: Callable[[], None] | None = None,
    clock: Clock = HOST_CLOCK,
) -> dict[str, Samples]:
    """Time every subject in alternating blocks, the order reversed every other round.

    The garbage collector rests during blocks. All subjects get the same number of blocks.

    Args:
        subjects: name to a call without arguments that returns when its work is done.
        warmup_ms: each subject runs untimed for this long, and at least once.
        duration_s: each subject is timed for at least this long, counting only the calls …
        min_iterations: … and at least this often.
        block_ms: a block ends with the first call that reaches this length.
        poll: called before each block; what it raises ends the measurement.
        clock: replaced in tests.

    Raises:
        ConfigError: no subject, or a duration or count out of range.
    """
    _check(subjects, warmup_ms, duration_s, min_iterations, block_ms)
    poll = poll or _no_poll
    for call in subjects.values():
        poll()
        _block(call, warmup_ms, clock)
    order = list(subjects)
    blocks: dict[str, list[list[Timing]]] = {name: [] for name in order}
    timed_ms, calls = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0)
    gc.collect()
    while any(timed_ms[name] < duration_s * 1e3 or calls[name] < min_iterations for name in order):
        for name in order:
            poll()
            with _gc_resting():
                block = _block(subjects[name], block_ms, clock)
            blocks[name].append(block)
            timed_ms[name] += sum(timing.wall_ms for timing in block)
            calls[name] += len(block)
        order.reverse()
    return {name: _samples(blocks[name]) for name in subjects}


def _block(call: Callable[[], object], length_ms: float, clock: Clock) -> list[Timing]:
    timings = []
    end = clock.wall_ns() + length_ms * 1e6
    while True:
        timings.append(time_call(call, clock))
        if clock.wall_ns() >= end:
            return timings


def _samples(blocks: list[list[Timing]]) -> Samples:
    cpu = [timing.cpu_ms for block in blocks for timing in block]
    return Samples(tuple(tuple(timing.wall_ms for timing in block) for block in blocks), sum(cpu) / len(cpu))


@contextlib.contextmanager
def _gc_resting() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _no_poll() -> None:
    return None


def _check(
    subjects: Mapping[str, Callable[[], object]],
    warmup_ms: float,
    duration_s: float,
    min_iterations: int,
    block_ms: float,
) -> None:
    if not subjects:
        raise ConfigError("no subject to time", expected="at least one name with a callable", fix="name a subject")
    milliseconds, seconds = "a finite number of milliseconds", "a finite number of seconds"
    rules: tuple[tuple[str, float, str, Callable[[float], bool], str], ...] = (
        ("the warm-up", warmup_ms, " ms", lambda value: value >= 0, f"{milliseconds}, 0 or more"),
        ("the timed duration", duration_s, " s", lambda value: value > 0, f"{seconds} above 0"),
        ("the least number of calls", min_iterations, "", lambda n: n >= 1 and n == int(n), "a whole number from 1 on"),
        ("the length of a block", block_ms, " ms", lambda value: value > 0, f"{milliseconds} above 0"),
    )
    for what, value, unit, holds, expected in rules:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            shown = f"{value}{unit}" if number else repr(value)
            raise ConfigError(f"{what} is {shown}", expected=expected, fix="choose another value for it")
