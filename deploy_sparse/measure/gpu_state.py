"""A GPU's clocks, power, temperature and what holds its clocks down, asked of NVML. Owns nvidia-ml-py.

Everything is optional: without the library (extra ``nvml``), a driver or a GPU there is nothing to tell, and what a
GPU does not support is None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from .record_conditions import GpuState

_HELD_BY = {  # NVML's nvmlClocksEventReasons…, whose values are part of its ABI; idle is no reason to complain
    0x0002: "clocks set by the user",
    0x0004: "power cap",
    0x0008: "hardware slowdown",
    0x0010: "sync boost",
    0x0020: "temperature, by software",
    0x0040: "temperature, by hardware",
    0x0080: "power brake",
    0x0100: "display clocks",
}
# Names that changed: the second of each is deprecated, the first not in older libraries or drivers.
_REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
_TEMPERATURE = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
SLOWED_BY = ("power cap", "hardware slowdown", "temperature, by software", "temperature, by hardware", "power brake")
"""Of these reasons those that come of load or heat, and so change while something is timed."""


class GpuMonitor:
    """NVML's view of one GPU. Use as a context manager, or call :meth:`close`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name = _text(self._asked("nvmlDeviceGetName")) or "an NVIDIA GPU"
        self.driver = _text(self._told(nvml.nvmlSystemGetDriverVersion))
        self.power_limit_w = _watts(self._asked("nvmlDeviceGetEnforcedPowerLimit"))
        self.sm_max_mhz: int | None = self._asked("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)

    def state(self) -> GpuState:
        """How it is right now."""
        clock, held = self.clock()
        return GpuState(
            sm_mhz=clock,
            memory_mhz=self._asked("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            power_w=_watts(self._asked("nvmlDeviceGetPowerUsage")),
            temperature_c=self._first(_TEMPERATURE, self._nvml.NVML_TEMPERATURE_GPU),
            held_by=held,
        )

    def clock(self) -> tuple[int | None, tuple[str, ...]]:
        """The clock of its multiprocessors in MHz, and what holds it down: quick enough to ask between blocks."""
        reasons = self._first(_REASONS)
        held = tuple(word for bit, word in _HELD_BY.items() if (reasons or 0) & bit)
        return self._asked("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM), held

    def close(self) -> None:
        """Let go of NVML."""
        self._told(self._nvml.nvmlShutdown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _first(self, functions: tuple[str, ...], *arguments: Any) -> Any:
        """What the first of these functions says that library and driver both have."""
        found = (self._asked(function, *arguments) for function in functions)
        return next((value for value in found if value is not None), None)

    def _asked(self, function: str, *arguments: Any) -> Any:
        found = getattr(self._nvml, function, None)
        return None if found is None else self._told(found, self._handle, *arguments)

    def _told(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:  # not supported by this GPU or driver, or not allowed here
            return None


def gpu_monitor() -> GpuMonitor | None:
    """NVML's view of the GPU that CUDA calls the first; None without nvidia-ml-py, a driver or a GPU."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        bus = _bus_of_first_gpu()
        if bus is not None:
            handle = nvml.nvmlDeviceGetHandleByPciBusId(bus)
        elif nvml.nvmlDeviceGetCount() == 1:
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
        else:  # it counts in another order than CUDA, and knows nothing of CUDA_VISIBLE_DEVICES
            nvml.nvmlShutdown()
            return None
    except nvml.NVMLError:
        nvml.nvmlShutdown()
        return None
    return GpuMonitor(nvml, handle)


def _bus_of_first_gpu() -> str | None:
    """Where CUDA's first GPU sits, such as ``"0000:65:00.0"``; CUDA's environment variables count."""
    driver = _driver()
    device, bus = ctypes.c_int(), ctypes.create_string_buffer(32)
    found = (
        driver is not None
        and driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetPCIBusId(bus, len(bus), device) == 0
    )
    return bus.value.decode() if found else None


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _text(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
