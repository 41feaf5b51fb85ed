"""Whole networks timed on a target against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.build import build_engine
from ..engine.entry import Engine
from ..engine.target import Target
from ..measure.interleave import BLOCK_MS
from ..measure.profile import profile
from ..surgery.compact import Compact
from .choice import BatchTime, NetworkTime

_BLOCKS = 16  # in the timed duration: those of slower calls are fewer, and still enough for an interval


@dataclass(frozen=True)
class NetworkBench:
    """Builds each network once and times it as often as asked.

    Attributes:
        target: where.
        batches: samples of a timed call; the first is the one that counts.
        duration_s: timed seconds for each network and batch.
        scratch: folder for the engines.
        poll: called between blocks; what it raises ends the timing.
    """

    target: Target
    batches: tuple[int, ...]
    duration_s: float
    scratch: Path
    poll: Callable[[], None]
    engines: dict[str, Engine] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, network: Compact) -> None:
        """Build a network's engine; the first is to be ``"dense"``.

        Raises:
            ExportError, BuildError: it does not export or compile.
        """
        self.poll()
        self.engines[name] = build_engine(network, self.target, out=self.scratch, name=f"network{len(self.engines)}")
        self.macs[name] = network.plan.cost_after.macs

    def times(self, names: Sequence[str]) -> tuple[NetworkTime, ...]:
        """Dense time over each network's, side by side in alternating blocks."""
        block_ms = min(BLOCK_MS, 1e3 * self.duration_s / _BLOCKS)
        engines = {name: self.engines[name] for name in ("dense", *names)}
        made = profile(
            engines, "dense", batches=self.batches, duration_s=self.duration_s, block_ms=block_ms, poll=self.poll
        )
        found = {(c.subject, c.batch): BatchTime(c.batch, c.ratio, c.low, c.high) for c in made.comparisons}
        times = []
        for name in names:
            first, *others = (found[name, batch] for batch in self.batches)
            times.append(NetworkTime(name, self.macs[name], first.ratio, first.low, first.high, tuple(others)))
        return tuple(times)
