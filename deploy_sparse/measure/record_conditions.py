"""What a measurement was made under, as records keep it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..config import Config

Transfers = Literal["excluded", "included"]
Cache = Literal["warm", "cold"]

SINCE_VERSION_2 = frozenset({"transfers", "cuda_graph", "cache", "evicted_bytes", "cpus", "gpu"})
"""Conditions that records of schema version 1 do not state."""


class GpuState(Config):
    """A GPU at one moment; None for what it does not tell.

    Clocks in MHz, power in W, temperature in °C. ``held_by`` names what keeps its clocks down, such as ``"power cap"``.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    held_by: tuple[str, ...] = ()


class GpuConditions(Config):
    """A GPU while it was timed: before and after, and between blocks.

    ``sm_mhz`` is the lowest and highest clock seen once it was warmed up, ``held_by`` all that was seen to keep clocks
    down then.
    """

    name: str
    driver: str | None = None
    power_limit_w: float | None = None
    sm_max_mhz: int | None = None
    before: GpuState
    after: GpuState
    sm_mhz: tuple[int, int] | None = None
    held_by: tuple[str, ...] = ()


class Conditions(Config):
    """How a subject was timed. Times in ms and s as named; None for what is not known, or was not stated then.

    Attributes:
        threads: within one operator of the engine.
        interleaved_with: the other subjects of the run.
        processor_mhz: the fastest core's clock before and after.
        transfers: ``"excluded"``: inputs and outputs were in place beforehand (``prepare``, on a GPU in its memory);
            ``"included"``: each call took NumPy arrays and gave NumPy arrays (``run``).
        cuda_graph: whether calls replayed a CUDA graph.
        cache: ``"cold"``: the processor's caches were evicted before each call.
        evicted_bytes: read to evict them, before each call.
        cpus: the processors that calls might run on, as Linux lists them: ``"0-3,8"``.
        gpu: the GPU's clocks, power and temperature.
    """

    threads: int | None = None
    warmup_ms: float
    duration_s: float
    min_iterations: int
    block_ms: float
    interleaved_with: tuple[str, ...] = ()
    processor_mhz: tuple[float, float] | None = None
    transfers: Transfers | None = None
    cuda_graph: bool | None = None
    cache: Cache | None = None
    evicted_bytes: Annotated[int, Field(gt=0)] | None = None
    cpus: str | None = None
    gpu: GpuConditions | None = None
