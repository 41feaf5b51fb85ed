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
    call in ms. ``device_blocks_ms`` are calls by the device's own clock, others than those on the host's; none where
    it has none.
    """

    blocks_ms: tuple[tuple[float, ...], ...]
    cpu_ms: float
    device_blocks_ms: tuple[tuple[float, ...], ...] = ()


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    *,
    device: Mapping[str, Callable[[], float]] | None = None,
    before_each: Callable[[], object] | None = None,
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
        device: for some of them, a call that does the same work once and returns its ms on the device's own clock.
            Each block on the host's clock is then followed by one of these, as long, in the same turn: reading the
            device's clock takes time that calls on the host's clock are spared.
        before_each: called before each timed call, outside of its interval, to leave the caches cold.
        warmup_ms: each subject runs untimed for this long, and at least once.
        duration_s: each subject is timed for at least this long, counting only the calls (with ``before_each`` that
            too, which may take a thousand times as long) …
        min_iterations: … and at least this often.
        block_ms: a block ends with the first call that reaches this length.
        poll: called before each block; what it raises ends the measurement.
        clock: replaced in tests.

    Raises:
        ConfigError: no subject, or a duration or count out of range.
    """
    _check(subjects, warmup_ms, duration_s, min_iterations, block_ms)
    poll, device = poll or _no_poll, device or {}
    for name, call in subjects.items():
        poll()
        _block(call, warmup_ms, clock)
        if name in device:
            device[name]()
    order = list(subjects)
    blocks: dict[str, list[list[Timing]]] = {name: [] for name in order}
    on_device: dict[str, list[tuple[float, ...]]] = {name: [] for name in order}
    timed_ms, calls = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0)
    gc.collect()
    while any(timed_ms[name] < duration_s * 1e3 or calls[name] < min_iterations for name in order):
        for name in order:
            poll()
            start = clock.wall_ns()
            with _gc_resting():
                block = _block(subjects[name], block_ms, clock, before_each)
            whole_ms = (clock.wall_ns() - start) / 1e6
            blocks[name].append(block)
            timed_ms[name] += whole_ms if before_each else sum(timing.wall_ms for timing in block)
            calls[name] += len(block)
            if name in device:
                with _gc_resting():
                    on_device[name].append(_device_block(device[name], block_ms, clock))
        order.reverse()
    return {name: _samples(blocks[name], on_device[name]) for name in subjects}


def _block(
    call: Callable[[], object], length_ms: float, clock: Clock, before_each: Callable[[], object] | None = None
) -> list[Timing]:
    timings = []
    end = clock.wall_ns() + length_ms * 1e6
    while True:
        if before_each is not None:
            before_each()
        timings.append(time_call(call, clock))
        if clock.wall_ns() >= end:
            return timings


def _device_block(call: Callable[[], float], length_ms: float, clock: Clock) -> tuple[float, ...]:
    times = []
    end = clock.wall_ns() + length_ms * 1e6
    while True:
        times.append(call())
        if clock.wall_ns() >= end:
            return tuple(times)


def _samples(blocks: list[list[Timing]], on_device: list[tuple[float, ...]]) -> Samples:
    cpu = [timing.cpu_ms for block in blocks for timing in block]
    walls = tuple(tuple(timing.wall_ms for timing in block) for block in blocks)
    return Samples(walls, sum(cpu) / len(cpu), tuple(on_device))


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
