"""What the machine's own clocks did while something was timed: the processor's frequency and a GPU's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gpu_state import GpuMonitor
from .record_conditions import GpuConditions, GpuState

CPUINFO = Path("/proc/cpuinfo")


def processor_mhz() -> float | None:
    """The fastest core's clock in MHz right now, where the system tells."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    return max(clocks, default=0.0) or None


class Watch:
    """Looks at the clocks before a measurement, between its blocks, and after it."""

    def __init__(self, gpu: GpuMonitor | None = None) -> None:
        self._gpu = gpu
        self._mhz: float | None = None
        self._before: GpuState | None = None
        self._seen: list[tuple[int | None, tuple[str, ...]]] = []

    def start(self) -> None:
        """Before the first call."""
        self._mhz, self._seen = processor_mhz(), []
        self._before = None if self._gpu is None else self._gpu.state()

    def look(self) -> None:
        """Between two blocks."""
        if self._gpu is not None:
            self._seen.append(self._gpu.clock())

    def stop(self) -> dict[str, Any]:
        """After the last call: ``processor_mhz`` and ``gpu`` of :class:`.record_conditions.Conditions`."""
        after = processor_mhz()
        return {"processor_mhz": (self._mhz, after) if self._mhz and after else None, "gpu": self._gpu_conditions()}

    def _gpu_conditions(self) -> GpuConditions | None:
        if self._gpu is None or self._before is None:
            return None
        after = self._gpu.state()
        seen = [*self._seen[1:], (after.sm_mhz, after.held_by)]  # the first look is at a GPU that was not warmed up
        clocks = [clock for clock, _ in seen if clock is not None]
        return GpuConditions(
            name=self._gpu.name,
            driver=self._gpu.driver,
            power_limit_w=self._gpu.power_limit_w,
            sm_max_mhz=self._gpu.sm_max_mhz,
            before=self._before,
            after=after,
            sm_mhz=(min(clocks), max(clocks)) if clocks else None,
            held_by=tuple(dict.fromkeys(word for _, held in seen for word in held)),
        )
