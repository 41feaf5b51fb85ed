"""TensorRT's progress monitor. Takes the library as an argument, and imports none."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..watch import Watch


def progress_monitor(trt: Any, watch: Watch) -> Any:
    """A monitor for a builder's configuration: it tells ``watch`` of each step, and stops the build if that says so."""
    return _monitor(trt)(watch)


@cache
def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, watch: Watch) -> None:
            trt.IProgressMonitor.__init__(self)
            self.watch = watch

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.watch.begin(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.watch.end(phase_name)

    return Monitor
