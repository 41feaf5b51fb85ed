"""A GPU of host memory, and the libraries that would reach it: cuda-python, pycuda, torch and TensorRT.

Written against the real signatures: ``cuda.bindings.runtime`` 13.5, pycuda 2026.1, torch 2.14, TensorRT 11.4. Work in
a stream is done at once, in a capture at each launch. What has no place on a real GPU is an AssertionError: memory
freed twice or touched after, contexts used by two threads, a capture that copies.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, IntEnum
from itertools import count
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from deploy_sparse.engine import _trt_session
from deploy_sparse.engine._cuda_bindings import BindingsCuda
from deploy_sparse.engine._cuda_pycuda import PycudaCuda
from deploy_sparse.engine._cuda_torch import TorchCuda
from deploy_sparse.engine._trt_session import TrtSession

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


def fake_torch(gpu: FakeGpu) -> ModuleType:
    """The parts of ``torch`` and ``torch.cuda`` that manage memory and streams; tensors are real ones on the CPU."""
    import torch

    module = ModuleType("torch")
    module.uint8, module.from_numpy, module.Tensor = torch.uint8, torch.from_numpy, torch.Tensor
    module.float32 = torch.float32
    current = [SimpleNamespace(cuda_stream=0)]
    gpu.streams.add(0)

    def checked(name: str, *arguments: object) -> None:
        if (problem := gpu.fails(name, *arguments)) is not None:
            raise problem

    def empty(shape, dtype, device):
        assert device.startswith("cuda")
        checked("empty", shape)
        tensor = torch.empty(shape, dtype=dtype)
        nbytes = tensor.numel() * tensor.element_size()
        address = own(gpu.foreign, nbytes)
        return torch.from_numpy(gpu.foreign[address]).view(dtype).reshape(shape)

    class Stream:
        def __init__(self) -> None:
            checked("Stream")
            self.cuda_stream = gpu.number()
            gpu.streams.add(self.cuda_stream)

        def synchronize(self) -> None:
            checked("synchronize")

        def wait_stream(self, other) -> None:
            checked("wait_stream", self.cuda_stream, other.cuda_stream)

        def __del__(self) -> None:
            gpu.streams.discard(self.__dict__.get("cuda_stream"))

    class ExternalStream(Stream):
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

        def __del__(self) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream) -> None:
            checked("record")

        def synchronize(self) -> None: ...

        def elapsed_time(self, other) -> float:
            return 0.25

    class CUDAGraph:
        def replay(self) -> None:
            checked("replay")
            assert current[-1] is self.stream, "a graph replayed in another stream"
            gpu.launches += 1
            for work in self.work:
                work()

    @contextmanager
    def graph(made, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        gpu.capturing[stream.cuda_stream], made.stream = [], stream
        try:
            yield
            checked("capture_end")
        finally:
            made.work = gpu.capturing.pop(stream.cuda_stream)

    @contextmanager
    def stream(new):
        checked("on", new.cuda_stream)
        current.append(new)
        try:
            yield
        finally:
            current.pop()

    module.empty = empty
    module.cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        device=lambda index: nullcontext(),
        current_stream=lambda: current[-1],
        OutOfMemoryError=type("OutOfMemoryError", (RuntimeError,), {}),
        Stream=Stream,
        ExternalStream=ExternalStream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=graph,
        stream=stream,
    )
    current[0] = ExternalStream(0)
    return module


class Types(Enum):
    FLOAT, HALF, BF16, INT64, BOOL, FP8, INT32 = range(7)


NUMPY = {"FLOAT": "float32", "HALF": "float16", "BF16": "uint16", "INT64": "int64", "BOOL": "bool", "INT32": "int32"}


class FakeEngine:
    """An engine that computes: each output from all inputs, in host code.

    Args:
        outputs: name to (type, shape with -1 for the batch, function of the inputs).
        largest: of the batch; depends: shapes of outputs depend on values; contexts: how many can be made.
    """

    def __init__(
        self, gpu: FakeGpu, inputs, outputs, *, largest: int = 64, depends=False, contexts=99, host=()
    ) -> None:
        self.gpu, self.inputs, self.outputs, self.largest = gpu, inputs, outputs, largest
        self.depends, self.contexts, self.host = depends, contexts, host
        self.names = [*inputs, *outputs]
        self.num_io_tensors = len(self.names)
        self.made: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Enum:
        return Modes.INPUT if name in self.inputs else Modes.OUTPUT

    def get_tensor_location(self, name: str) -> Enum:
        return Locations.HOST if name in self.host else Locations.DEVICE

    def get_tensor_dtype(self, name: str) -> Types:
        return {**self.inputs, **self.outputs}[name][0]

    def create_execution_context(self) -> FakeContext | None:
        if len(self.made) >= self.contexts:
            return None
        self.made.append(FakeContext(self))
        return self.made[-1]


class Modes(Enum):
    INPUT, OUTPUT = range(2)


class Locations(Enum):
    DEVICE, HOST = range(2)


class FakeContext:
    """An execution context; ``told`` counts what it was told."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.told: list[str] = []
        self.busy = threading.Lock()
        self.works = True
        self.seconds = 0.0

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.told.append("shape")
        self.shapes[name] = tuple(shape)
        wanted = self.engine.inputs[name][1]
        return len(shape) == len(wanted) and all(
            (1 <= s <= self.engine.largest) if w < 0 else s == w for s, w in zip(shape, wanted, strict=True)
        )

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        return tuple(
            -1 if e < 0 and self.engine.depends else batch if e < 0 else e for e in self.engine.outputs[name][1]
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.told.append("address")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        if not self.works:
            return False
        assert self.busy.acquire(blocking=False), "two threads on one execution context"
        try:
            time.sleep(self.seconds)
            self.engine.gpu.submit(handle, self._work(dict(self.shapes), dict(self.addresses)))
        finally:
            self.busy.release()
        return True

    def _work(self, shapes, addresses) -> Work:
        outputs = {name: self.get_tensor_shape(name) for name in self.engine.outputs}

        def view(name: str, shape) -> np.ndarray:
            dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name).name])
            return self.engine.gpu.at(addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

        def work() -> None:
            arrays = [view(name, shape) for name, shape in shapes.items()]
            for name, shape in outputs.items():
                view(name, shape)[...] = self.engine.outputs[name][2](*arrays)

        return work


def fake_tensorrt(engine: FakeEngine, name: str = "tensorrt", version: str = "11.4.0.106") -> ModuleType:
    """The runtime part of ``tensorrt``; it opens any plan but ``b"broken"`` as the one engine."""
    module = ModuleType(name)
    module.__version__, module.TensorIOMode, module.TensorLocation = version, Modes, Locations

    class ILogger:
        def __init__(self) -> None: ...

    class Runtime:
        engine_host_code_allowed = None

        def __init__(self, logger: object) -> None: ...

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            return None if plan == b"broken" else engine

    module.ILogger, module.Runtime = ILogger, Runtime
    return module


def scores(x: np.ndarray) -> np.ndarray:
    """What the fake engine of the tests computes: [n, …] to [n, 10]."""
    return x.reshape(len(x), -1).sum(axis=1, keepdims=True) * 2 + np.arange(10, dtype=np.float32)


def image_engine(gpu: FakeGpu, **options) -> FakeEngine:
    """``input`` float32 [batch, 1, 8, 8] to ``output`` float32 [batch, 10], like the engines of the other tests."""
    return FakeEngine(
        gpu, {"input": (Types.FLOAT, (-1, 1, 8, 8))}, {"output": (Types.FLOAT, (-1, 10), scores)}, **options
    )


class Foreign:
    """Another library's array on the GPU, by ``__cuda_array_interface__``."""

    def __init__(self, gpu: FakeGpu, array: np.ndarray, stream: int | None = None, **changes: object) -> None:
        self._address = gpu.place(np.ascontiguousarray(array))
        self._interface = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (self._address, False), "strides": None,
            "stream": stream, "version": 3, **changes,
        }  # fmt: skip
        self._gpu, self._dtype, self._shape, self._nbytes = gpu, array.dtype, array.shape, array.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return self._interface

    def numpy(self) -> np.ndarray:
        return self._gpu.at(self._address, self._nbytes).view(self._dtype).reshape(self._shape).copy()


def install(gpu: FakeGpu, engine: FakeEngine, runtime: str, version: str) -> None:
    """Put TensorRT, cuda-python and the driver of a SM89 GPU into this process, for good; for programs of tests."""
    from deploy_sparse.engine import gpu as module

    sys.modules[runtime.replace("-", "_")] = fake_tensorrt(engine, runtime.replace("-", "_"), version)
    sys.modules["cuda"], sys.modules["cuda.bindings"] = ModuleType("cuda"), ModuleType("cuda.bindings")
    sys.modules["cuda.bindings.runtime"] = fake_bindings(gpu)
    module._driver = lambda: FakeDriver()


class FakeDriver:
    """``libcuda.so.1`` with one RTX 4090, or ``failing`` in a call."""

    def __init__(self, failing: str = "", name: bytes = b"NVIDIA GeForce RTX 4090", capability=(8, 9)) -> None:
        self._failing, self._name, self._capability = failing, name, capability

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


# Sessions on it

CUDA: dict[str, Callable[[FakeGpu], object]] = {
    "cuda-python": lambda gpu: BindingsCuda(fake_bindings(gpu)),
    "pycuda": lambda gpu: PycudaCuda(fake_pycuda(gpu)),
    "torch": lambda gpu: TorchCuda(fake_torch(gpu)),
}

Load = Callable[..., TrtSession]


def loader(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A function that opens a fake engine, by default :func:`image_engine`, on ``gpu`` by one of ``CUDA``."""

    def load(engine: FakeEngine | None = None, *, cuda: str = "cuda-python", plan: bytes = b"plan", **options: object):
        library = fake_tensorrt(engine or image_engine(gpu))
        monkeypatch.setattr(_trt_session, "library", lambda runtime: library)
        monkeypatch.setattr(_trt_session, "process_logger", lambda runtime: "logger")
        monkeypatch.setattr(_trt_session, "cuda_library", lambda: CUDA[cuda](gpu))
        return TrtSession(plan, "tensorrt", "deploy-sparse build …", **options)

    return load


def images(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Feeds of :func:`image_engine`."""
    return {"input": np.random.default_rng(seed).standard_normal((batch, 1, 8, 8)).astype(np.float32)}


def expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What it computes of them."""
    return scores(feeds["input"])
