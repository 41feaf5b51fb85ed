"""Cold caches: before each call every processor reads through more memory than its caches hold.

A network in a benchmark finds its weights in the cache, where its own last call left them. In an application that does
other work between two calls it may not. Reading, not writing, evicts them: lines that were written would have to be
written back within the call that follows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..errors import ConfigError
from .pinning import cpus_in

SYSFS = Path("/sys/devices/system/cpu")
_TIMES = 2  # as much is read as the caches hold, this often: replacement is not strictly oldest first
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One data cache: its level, its size in bytes, and the processors that share it."""

    level: int
    size: int
    shared: tuple[int, ...]


def caches_of(cpu: int, sysfs: Path = SYSFS) -> tuple[Cache, ...]:
    """The caches for data of a processor, as Linux lists them; none where it does not."""
    found = []
    for folder in sorted((sysfs / f"cpu{cpu}" / "cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):  # virtual machines leave some of these files out
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            level, size = int((folder / "level").read_text()), _bytes((folder / "size").read_text())
            found.append(Cache(level, size, cpus_in((folder / "shared_cpu_list").read_text())))
    return tuple(found)


def bytes_to_read(cpus: Sequence[int], sysfs: Path = SYSFS) -> dict[int, int]:
    """How much each of these processors has to read so that together they have replaced all that their caches hold.

    Those that share a cache divide it among them.

    Raises:
        ConfigError: the sizes of a processor's caches are not known.
    """
    found = {}
    for cpu in cpus:
        shares = [-(-cache.size // len({*cache.shared} & {*cpus} or {cpu})) for cache in caches_of(cpu, sysfs)]
        found[cpu] = _TIMES * max(shares, default=0)
    if not found or not all(found.values()):
        raise ConfigError(
            "the sizes of this machine's caches are not known, so they cannot be evicted",
            expected=f"Linux, with {sysfs}/cpu0/cache",
            fix="measure with warm caches",
        )
    return found


class Evictor:
    """Calling it replaces what the caches of these processors hold; has a thread for each, so close it.

    Attributes:
        bytes: read by a call, over all processors.

    Raises:
        ConfigError: the sizes of their caches are not known.
    """

    def __init__(self, cpus: Sequence[int], sysfs: Path = SYSFS) -> None:
        sizes = bytes_to_read(cpus, sysfs)
        self.bytes = sum(sizes.values())
        # Written once: pages that were never written are all one page of zeros, which fits any cache.
        self._buffers = [np.ones(-(-size // 8), np.int64) for size in sizes.values()]  # [n], 8 bytes each
        self._threads = [ThreadPoolExecutor(1, f"evict-{cpu}", os.sched_setaffinity, (0, {cpu})) for cpu in sizes]

    def __call__(self) -> None:
        pairs = zip(self._threads, self._buffers, strict=True)
        for done in wait([thread.submit(buffer.sum) for thread, buffer in pairs]).done:
            done.result()

    def close(self) -> None:
        """End the threads and free the memory."""
        for thread in self._threads:
            thread.shutdown()
        self._buffers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes(text: str) -> int:
    """``32768K`` in bytes."""
    number, unit = text.strip()[:-1], text.strip()[-1:]
    return int(number) * _UNITS[unit] if unit in _UNITS else int(text)
