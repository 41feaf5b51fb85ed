"""A GPU's state, asked of stand-ins with the names and units of nvidia-ml-py and of CUDA's driver."""

import builtins
import ctypes
import sys
from types import ModuleType

import pytest

from deploy_sparse.measure import clocks, gpu_state
from deploy_sparse.measure.clocks import Watch
from deploy_sparse.measure.gpu_state import gpu_monitor
from deploy_sparse.measure.record_conditions import GpuConditions, GpuState


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """``pynvml`` for a GPU at 0000:65:00.0, the second of two by NVML's order."""

    NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self):
        super().__init__("pynvml")
        self.open = 0
        self.count = 2
        self.clocks = [1980]
        self.reasons = [0x1]
        self.unsupported = set()
        self.buses = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("nvml") and name in self.unsupported:
            raise AttributeError(name)
        return found

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"by index {index}"

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId):
        self.buses.append(pciBusId)
        return "handle"

    def nvmlDeviceGetName(self, handle):
        assert handle
        return "NVIDIA H200"

    def nvmlDeviceGetMaxClockInfo(self, handle, type):
        return {1: 1980, 2: 3201}[type]

    def nvmlDeviceGetClockInfo(self, handle, type):
        if type == self.NVML_CLOCK_MEM:
            return 3201
        return self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000  # mW

    def nvmlDeviceGetPowerUsage(self, handle):
        return 412_345  # mW

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetTemperatureV(self, handle, sensor, version=0x1000010):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 62

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x8


class FakeDriver:
    """``libcuda``: writes through its pointers, returns 0."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 7
        return 0

    def cuDeviceGetPCIBusId(self, pciBusId, len, dev):
        assert (len, dev.value) == (32, 7)
        ctypes.memmove(pciBusId, b"0000:65:00.0\0", 13)
        return 0


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_state, "_driver", FakeDriver)
    return fake


def test_state_of_the_gpu_that_cuda_calls_the_first(nvml):
    nvml.reasons = [0x4 | 0x20]
    with gpu_monitor() as monitor:
        assert (monitor.name, monitor.driver) == ("NVIDIA H200", "580.65.06")
        assert (monitor.power_limit_w, monitor.sm_max_mhz) == (700.0, 1980)
        assert monitor.state() == GpuState(
            sm_mhz=1980,
            memory_mhz=3201,
            power_w=412.345,
            temperature_c=62,
            held_by=("power cap", "temperature, by software"),
        )
        assert nvml.open == 1
    assert nvml.open == 0
    assert nvml.buses == ["0000:65:00.0"]


@pytest.mark.parametrize(
    ("bits", "held"),
    [
        (0x0, ()),
        (0x1, ()),  # idle
        (0x2, ("clocks set by the user",)),
        (0x8 | 0x40 | 0x80, ("hardware slowdown", "temperature, by hardware", "power brake")),
        (0x10 | 0x100, ("sync boost", "display clocks")),
    ],
)
def test_what_holds_the_clocks_down_is_named(nvml, bits, held):
    nvml.reasons = [bits]
    with gpu_monitor() as monitor:
        assert monitor.clock() == (1980, held)


def test_what_is_not_supported_is_none(nvml, monkeypatch):
    def refuse(*_):
        raise NVMLError("Not Supported")

    for name in (
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetEnforcedPowerLimit",
        "nvmlDeviceGetTemperature",
        "nvmlDeviceGetTemperatureV",
    ):
        monkeypatch.setattr(nvml, name, refuse)
    with gpu_monitor() as monitor:
        assert monitor.power_limit_w is None
        assert monitor.state() == GpuState(sm_mhz=1980, memory_mhz=3201)


def test_older_library_and_older_driver_know_the_former_names(nvml, monkeypatch):
    nvml.unsupported = {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperatureV"}
    with gpu_monitor() as monitor:
        assert monitor.clock() == (1980, ("hardware slowdown",))
        assert monitor.state().temperature_c == 61

    def not_in_this_driver(handle):
        raise NVMLError("Function Not Found")

    nvml.unsupported = set()
    monkeypatch.setattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", not_in_this_driver)
    with gpu_monitor() as monitor:
        assert monitor.clock()[1] == ("hardware slowdown",)


def test_without_the_driver_the_only_gpu_is_taken_and_of_several_none(nvml, monkeypatch):
    monkeypatch.setattr(gpu_state, "_driver", lambda: None)
    assert gpu_monitor() is None
    assert nvml.open == 0
    nvml.count = 1
    with gpu_monitor() as monitor:
        assert monitor._handle == "by index 0"
    assert nvml.open == 0


def test_without_library_driver_or_gpu_there_is_nothing(nvml, monkeypatch):
    def refuse(*_):
        raise NVMLError("Not Found")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByPciBusId", refuse)
    assert gpu_monitor() is None
    assert nvml.open == 0
    monkeypatch.setattr(nvml, "nvmlInit", refuse)
    assert gpu_monitor() is None
    monkeypatch.delitem(sys.modules, "pynvml")
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "pynvml":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert gpu_monitor() is None


def test_driver_that_finds_no_gpu_names_none(monkeypatch):
    class Without(FakeDriver):
        def cuInit(self, flags):
            return 100

    monkeypatch.setattr(gpu_state, "_driver", Without)
    assert gpu_state._bus_of_first_gpu() is None


def test_watch_keeps_what_it_saw_between_blocks(nvml, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("cpu MHz\t\t: 2596.120\ncpu MHz\t\t: 3100.5\n")
    monkeypatch.setattr(clocks, "CPUINFO", cpuinfo)
    nvml.clocks, nvml.reasons = [345, 345, 1980, 1755, 1905], [0x1, 0x1, 0x0, 0x4, 0x2]
    with gpu_monitor() as monitor:
        watch = Watch(monitor)
        watch.start()
        for _ in range(3):  # before the warm-up, and before each of two blocks
            watch.look()
        cpuinfo.write_text("cpu MHz\t\t: 2000.0\n")
        seen = watch.stop()
    assert seen["processor_mhz"] == (3100.5, 2000.0)
    found = seen["gpu"]
    assert isinstance(found, GpuConditions)
    assert (found.before.sm_mhz, found.after.sm_mhz) == (345, 1905)
    assert found.sm_mhz == (1755, 1980)  # not the clock of before it was warmed up
    assert found.held_by == ("power cap", "clocks set by the user")
    assert (found.name, found.driver, found.power_limit_w) == ("NVIDIA H200", "580.65.06", 700.0)


def test_watch_without_gpu_or_clock_knows_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(clocks, "CPUINFO", tmp_path / "none")
    watch = Watch()
    watch.start()
    watch.look()
    assert watch.stop() == {"processor_mhz": None, "gpu": None}
