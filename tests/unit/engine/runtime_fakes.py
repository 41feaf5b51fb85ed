"""A GPU of host memory, and the libraries that would reach it: cuda-python, pycuda, torch and TensorRT.

Written against the real signatures: ``cuda.bindings.runtime`` 13.5, pycuda 2026.1, torch 2.14, TensorRT 11.4. Work in
a stream is done at once, in a capture at each launch. What has no place on a real GPU is an AssertionError: memory
freed twice or touched after, contexts used by two threads, a capture that copies.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from types import ModuleType

import numpy as np
import pytest
from cuda_fakes import FakeDriver, FakeGpu, Work, fake_bindings, fake_pycuda
from torch_cuda_fakes import fake_torch

from deploy_sparse.engine.cuda.with_bindings import BindingsCuda
from deploy_sparse.engine.cuda.with_pycuda import PycudaCuda
from deploy_sparse.engine.cuda.with_torch import TorchCuda
from deploy_sparse.engine.trt import session as trt_session
from deploy_sparse.engine.trt.session import TrtSession


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
    from deploy_sparse.engine.cuda import gpu as module

    sys.modules[runtime.replace("-", "_")] = fake_tensorrt(engine, runtime.replace("-", "_"), version)
    sys.modules["cuda"], sys.modules["cuda.bindings"] = ModuleType("cuda"), ModuleType("cuda.bindings")
    sys.modules["cuda.bindings.runtime"] = fake_bindings(gpu)
    module._driver = lambda: FakeDriver()


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
        monkeypatch.setattr(trt_session, "library", lambda runtime: library)
        monkeypatch.setattr(trt_session, "process_logger", lambda runtime: "logger")
        monkeypatch.setattr(trt_session, "cuda_library", lambda: CUDA[cuda](gpu))
        return TrtSession(plan, "tensorrt", "deploy-sparse build …", **options)

    return load


def images(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Feeds of :func:`image_engine`."""
    return {"input": np.random.default_rng(seed).standard_normal((batch, 1, 8, 8)).astype(np.float32)}


def expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What it computes of them."""
    return scores(feeds["input"])
