"""Stand-ins for the CUDA libraries that Python code may use without torch: a GPU whose memory is NumPy's."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from enum import Enum, IntEnum
from itertools import count
from types import ModuleType

import numpy as np

Work = Callable[[], None]


class FakeGpu:
    """Memory, streams and graphs.

    Attributes:
        live: addresses and sizes of what is allocated; streams, events, graphs: handles of what exists.
        failing: call name to what it fails with, from the call of that number on (0: the next).
    """

    def __init__(self) -> None:
        self.live: dict[int, np.ndarray] = {}
        self.foreign: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self.graphs: set[int] = set()
        self.calls: list[tuple[object, ...]] = []
        self.failing: dict[str, object] = {}
        self.capturing: dict[int, list[Work]] = {}
        self.launches = 0
        self._numbers = count(0x1000)

    def number(self) -> int:
        return next(self._numbers)

    def fails(self, name: str, *arguments: object) -> object:
        """Note the call; what it fails with, else None."""
        self.calls.append((name, *arguments))
        return self.failing.get(name)

    def named(self, name: str) -> list[tuple[object, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def alloc(self, nbytes: int) -> int:
        address = own(self.live, nbytes)
        return address

    def free(self, address: int) -> None:
        assert address in self.live, f"{address:#x} is not allocated, or was freed before"
        del self.live[address]

    def place(self, array: np.ndarray) -> int:
        """Somebody else's array on the GPU; its address."""
        address = own(self.foreign, array.nbytes)
        self.at(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        return address

    def at(self, address: int, nbytes: int) -> np.ndarray:
        for memory in (self.live, self.foreign):
            for start, held in list(memory.items()):
                if start <= address and address + nbytes <= start + held.nbytes:
                    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        raise AssertionError(f"illegal address {address:#x}")

    def submit(self, handle: int, work: Work) -> None:
        assert handle in self.streams, f"no stream {handle:#x}"
        if handle in self.capturing:
            self.capturing[handle].append(work)
        else:
            work()

    def is_clean(self) -> bool:
        return not (self.live or self.streams or self.events or self.graphs)


def own(memory: dict[int, np.ndarray], nbytes: int) -> int:
    """New memory at an address aligned to 256 bytes."""
    raw = np.zeros(nbytes + 256, np.uint8)
    address = raw.ctypes.data + -raw.ctypes.data % 256
    memory[address] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
    _KEPT.append(raw)
    return address


_KEPT: list[np.ndarray] = []  # views of addresses keep nothing alive


class CudaError(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


def fake_bindings(gpu: FakeGpu) -> ModuleType:
    """``cuda.bindings.runtime``: every function returns a tuple that begins with an error code."""
    module = ModuleType("cuda.bindings.runtime")
    module.cudaError_t = CudaError
    module.cudaMemcpyKind = Enum("cudaMemcpyKind", "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost")
    module.cudaStreamCaptureMode = Enum("cudaStreamCaptureMode", "cudaStreamCaptureModeThreadLocal")
    module.cudaStreamNonBlocking, module.cudaEventDisableTiming = 1, 2
    device = threading.local()

    def call(function):
        def checked(*arguments):
            if (code := gpu.fails(function.__name__, *arguments)) is not None:
                if function.__name__ == "cudaStreamEndCapture":
                    gpu.capturing.pop(arguments[0])  # whatever it answers, the stream works on
                return (code, None) if function.__name__ in _RETURNING else (code,)
            found = function(*arguments)
            return (CudaError.cudaSuccess,) if found is None else (CudaError.cudaSuccess, found)

        checked.wants = function.__code__.co_argcount
        setattr(module, function.__name__, checked)

    @call
    def cudaGetDevice():
        return getattr(device, "index", 0)

    @call
    def cudaSetDevice(index):
        device.index = index

    @call
    def cudaMalloc(size):
        return gpu.alloc(size)

    @call
    def cudaFree(devPtr):
        if devPtr:
            gpu.free(devPtr)

    @call
    def cudaMemcpyAsync(dst, src, count, kind, stream):
        assert stream not in gpu.capturing, "copies are no part of a captured run"
        inwards = kind.name == "cudaMemcpyHostToDevice"
        assert len(gpu.at(dst if inwards else src, count)) == count
        gpu.submit(stream, lambda: ctypes.memmove(dst, src, count) and None)

    @call
    def cudaStreamCreateWithFlags(flags):
        assert flags == 1
        gpu.streams.add(handle := gpu.number())
        return handle

    @call
    def cudaStreamDestroy(stream):
        gpu.streams.remove(stream)

    @call
    def cudaStreamSynchronize(stream):
        assert stream in gpu.streams

    @call
    def cudaStreamWaitEvent(stream, event, flags):
        assert event in gpu.events

    @call
    def cudaEventCreate():
        gpu.events.add(event := gpu.number())
        return event

    @call
    def cudaEventCreateWithFlags(flags):
        gpu.events.add(event := gpu.number())
        return event

    @call
    def cudaEventRecord(event, stream):
        assert event in gpu.events

    @call
    def cudaEventSynchronize(event):
        assert event in gpu.events

    @call
    def cudaEventElapsedTime(start, end):
        return 0.25

    @call
    def cudaEventDestroy(event):
        gpu.events.remove(event)

    @call
    def cudaStreamBeginCapture(stream, mode):
        gpu.capturing[stream] = []

    @call
    def cudaStreamEndCapture(stream):
        gpu.graphs.add(graph := Handle(gpu.number(), gpu.capturing.pop(stream)))
        return graph

    @call
    def cudaGraphInstantiate(graph, flags):
        gpu.graphs.add(made := Handle(gpu.number(), graph.work))
        return made

    @call
    def cudaGraphLaunch(graphExec, stream):
        assert graphExec in gpu.graphs
        gpu.launches += 1
        for work in graphExec.work:
            gpu.submit(stream, work)

    @call
    def cudaGraphDestroy(graph):
        gpu.graphs.remove(graph)

    @call
    def cudaGraphExecDestroy(graphExec):
        gpu.graphs.remove(graphExec)

    module.cudaGetErrorName = lambda error: (CudaError.cudaSuccess, CudaError(error).name.encode())
    module.cudaGetErrorString = lambda error: (CudaError.cudaSuccess, b"as it was told to")
    return module


_RETURNING = {
    "cudaGetDevice", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreateWithFlags",
    "cudaEventElapsedTime", "cudaStreamEndCapture", "cudaGraphInstantiate",
}  # fmt: skip


class Handle(int):
    """A graph; an integer, as handles are, that knows its work."""

    def __new__(cls, number: int, work: list[Work]) -> Handle:
        self = super().__new__(cls, number)
        self.work = work
        return self


def fake_pycuda(gpu: FakeGpu) -> ModuleType:
    """``pycuda.driver``: failures are exceptions, handles are objects, and a context has to be pushed."""
    module = ModuleType("pycuda.driver")
    module.Error = type("Error", (Exception,), {})
    module.MemoryError = type("MemoryError", (module.Error,), {})
    module.LogicError = type("LogicError", (module.Error,), {})
    stack = threading.local()
    depth = lambda: getattr(stack, "depth", 0)  # noqa: E731

    def checked(name: str, *arguments: object) -> None:
        if (problem := gpu.fails(name, *arguments)) is not None:
            raise problem
        assert name in ("init", "push", "retain_primary_context") or depth() > 0, f"{name} without a context"

    class Context:
        def push(self) -> None:
            checked("push")
            stack.depth = depth() + 1

        @staticmethod
        def pop() -> None:
            checked("pop")
            stack.depth = depth() - 1

        @staticmethod
        def synchronize() -> None:
            checked("Context.synchronize")

    class Device:
        def __init__(self, number: int) -> None:
            assert number == 0

        def retain_primary_context(self) -> Context:
            checked("retain_primary_context")
            return Context()

    class DeviceAllocation:
        def __init__(self, nbytes: int) -> None:
            self.address = gpu.alloc(nbytes)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            checked("free")
            gpu.free(self.address)

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            checked("Stream", flags)
            self.handle = gpu.number()
            gpu.streams.add(self.handle)

        def synchronize(self) -> None:
            checked("Stream.synchronize")

        def __del__(self) -> None:
            if hasattr(self, "handle"):
                assert depth() > 0, "destroyed without a context: pycuda leaks it"
                gpu.streams.discard(self.handle)

    class Event:
        def __init__(self) -> None:
            checked("Event")

        def record(self, stream: Stream) -> Event:
            checked("record")
            return self

        def synchronize(self) -> Event:
            checked("Event.synchronize")
            return self

        def time_till(self, other: Event) -> float:
            return 0.25

    def mem_alloc(nbytes: int) -> DeviceAllocation:
        checked("mem_alloc", nbytes)
        return DeviceAllocation(nbytes)

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream) -> None:
        del stream  # a traceback would keep it, and frames of C keep nothing
        checked("memcpy_htod_async")
        gpu.at(dest, src.nbytes)[:] = src

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream) -> None:
        del stream  # a traceback would keep it, and frames of C keep nothing
        checked("memcpy_dtoh_async")
        dest[:] = gpu.at(src, dest.nbytes)

    module.init = lambda: checked("init")
    module.Device, module.Stream, module.Event = Device, Stream, Event
    module.mem_alloc, module.memcpy_htod_async, module.memcpy_dtoh_async = (
        mem_alloc,
        memcpy_htod_async,
        memcpy_dtoh_async,
    )
    return module


def on_cuda(capsule: object) -> object:
    """A DLPack capsule of the CPU that says that its memory is CUDA's."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ctypes.c_int32.from_address(address(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = 2
    return capsule


class FakeDriver:
    """``libcuda.so.1`` with one RTX 4090, or ``failing`` in a call."""

    def __init__(self, failing: str = "", name: bytes = b"NVIDIA GeForce RTX 4090", capability=(8, 9)) -> None:
        self._failing, self._name, self._capability = failing, name, capability
        self.owners: dict[int, int] = {}  # which GPU an address is on

    def _answer(self, call: str) -> int:
        return 100 if call == self._failing else 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._answer("cuInit")

    def cuDeviceGet(self, device, ordinal: int) -> int:
        device._obj.value = 3
        return self._answer("cuDeviceGet")

    def cuDeviceGetName(self, name, length: int, device) -> int:
        assert device.value == 3
        name.value = self._name[: length - 1]
        return self._answer("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value, attribute: int, device) -> int:
        assert device.value == 3
        value._obj.value = self._capability[{75: 0, 76: 1}[attribute]]
        return self._answer("cuDeviceGetAttribute")

    def cuPointerGetAttribute(self, data, attribute: int, address) -> int:
        assert attribute == 9
        data._obj.value = self.owners.get(address.value, 0)
        return 0 if address.value in self.owners else 1


# Sessions on it
