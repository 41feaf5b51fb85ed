"""Which processors a measurement may run on: pinned for its time, and read back as actually in force."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_TASKS = Path("/proc/self/task")


def allowed_cpus() -> tuple[int, ...] | None:
    """The processors that the calling thread may run on, in order; None where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return tuple(sorted(os.sched_getaffinity(0)))


def cpu_list(cpus: Iterable[int]) -> str:
    """``"0-3,8"`` for 0, 1, 2, 3 and 8, as Linux writes it."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def cpus_in(text: str) -> tuple[int, ...]:
    """The processors in a list such as ``"0-3,8"``."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def check_threads(cpus: Sequence[int] | None, threads: int | None) -> None:
    """Raise a :class:`ConfigError` where an engine has more threads than processors are asked for."""
    if cpus is not None and threads is not None and isinstance(cpus, Sequence) and threads > len(cpus) > 0:
        raise ConfigError(
            f"{threads} threads on {len(cpus)} processors, where they would wait for one another",
            expected=f"{threads} processors or more, as the target says threads = {threads}",
            fix="name more processors, or build for a target with fewer threads",
        )


@contextlib.contextmanager
def pinned(cpus: Sequence[int] | None) -> Iterator[None]:
    """All threads of this process on these processors, also those that start meanwhile; afterwards as they were.

    Args:
        cpus: numbers of processors; None leaves everything as it is.

    Raises:
        ConfigError: no processor, one that this process may not use, or a system that cannot pin.
    """
    if cpus is None:
        yield
        return
    wanted = _checked(cpus)
    before = {thread: own for thread in _threads() if (own := _cpus_of(thread))}
    others = os.sched_getaffinity(0)
    try:
        for thread in before:
            _set(thread, wanted)
        if (found := os.sched_getaffinity(0)) != wanted:  # Linux leaves out what the container may not use
            raise _unusable(wanted, cpu_list(found))
        yield
    finally:
        for thread in _threads():
            _set(thread, before.get(thread, others))


def _checked(cpus: Any) -> set[int]:
    several = isinstance(cpus, Iterable) and not isinstance(cpus, str)
    given = tuple(cpus) if several else (cpus,)
    whole = several and all(isinstance(cpu, int) and not isinstance(cpu, bool) and cpu >= 0 for cpu in given)
    if not given or not whole or len(set(given)) != len(given):
        raise ConfigError(
            f"the processors are {', '.join(map(repr, given)) or 'none'}",
            expected="numbers of processors, each a whole number from 0 on, none twice",
            fix="give for example 0 1, or leave it out for all",
        )
    if not hasattr(os, "sched_setaffinity") or not _TASKS.is_dir():
        raise ConfigError(
            "this system does not let a process choose its processors",
            expected="Linux",
            fix="leave the processors out",
        )
    return set(given)


def _threads() -> tuple[int, ...]:
    return tuple(int(entry.name) for entry in _TASKS.iterdir())


def _cpus_of(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None  # it ended meanwhile


def _set(thread: int, cpus: set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cpus)
    except ProcessLookupError:
        return  # it ended meanwhile
    except OSError as problem:  # none of these processors is there, or is this process's to use
        raise _unusable(cpus, cpu_list(os.sched_getaffinity(0))) from problem


def _unusable(cpus: set[int], usable: str) -> ConfigError:
    return ConfigError(
        f"this process may not use all of the processors {cpu_list(cpus)}",
        expected=f"processors of this machine and container: it may run on {usable}",
        fix="choose among those",
    )
