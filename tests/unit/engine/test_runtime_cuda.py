"""GPU memory and streams from each of three libraries: one contract, every failure explained, everything freed once."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from cuda_fakes import CudaError, FakeDriver, FakeGpu, fake_bindings, fake_pycuda
from torch_cuda_fakes import fake_torch

from deploy_sparse.engine.cuda import gpu
from deploy_sparse.engine.cuda import runtime as _cuda
from deploy_sparse.engine.cuda.gpu import Gpu, local_gpu
from deploy_sparse.engine.cuda.runtime import Cuda, cuda_library
from deploy_sparse.engine.cuda.with_bindings import BindingsCuda
from deploy_sparse.engine.cuda.with_pycuda import PycudaCuda
from deploy_sparse.engine.cuda.with_torch import TorchCuda
from deploy_sparse.errors import EngineError, MissingDependencyError

MAKERS: dict[str, tuple[Callable[[FakeGpu], ModuleType], Callable[[ModuleType], Cuda]]] = {
    "cuda-python": (fake_bindings, BindingsCuda),
    "pycuda": (fake_pycuda, PycudaCuda),
    "torch": (fake_torch, TorchCuda),
}


@pytest.fixture
def fake() -> FakeGpu:
    return FakeGpu()


@pytest.fixture(params=MAKERS)
def cuda(request: pytest.FixtureRequest, fake: FakeGpu) -> Cuda:
    library, maker = MAKERS[request.param]
    return maker(library(fake))


def out_of_memory(cuda: Cuda, fake: FakeGpu) -> None:
    """The next allocations fail as each library reports it."""
    library = getattr(cuda, "_library", None) or getattr(cuda, "_torch", None)
    if cuda.name == "cuda-python":
        fake.failing["cudaMalloc"] = CudaError.cudaErrorMemoryAllocation
    elif cuda.name == "pycuda":
        fake.failing["mem_alloc"] = library.MemoryError("cuMemAlloc failed: out of memory")
    else:
        fake.failing["empty"] = library.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.array(3, np.int64),
        np.array([True, False]),
        np.zeros((0, 3), np.float16),
    ],
    ids=["floats", "scalar", "booleans", "empty"],
)
def test_arrays_come_back_as_they_went(cuda: Cuda, fake: FakeGpu, array: np.ndarray) -> None:
    assert cuda.name in MAKERS
    array.flags.writeable = False
    back = np.full_like(array, 1)
    with cuda.active():
        stream = cuda.stream()
        buffer = cuda.alloc(array.nbytes, stream)
        assert buffer.nbytes == array.nbytes
        assert buffer.pointer % 256 == 0
        cuda.copy_in(buffer, array, stream)
        cuda.copy_out(back, buffer, stream)
        stream.synchronize()
        np.testing.assert_array_equal(back, array)
        for _ in range(2):  # twice is fine, and on the GPU it happens once
            buffer.free()
            stream.close()
    assert buffer.pointer == 0
    assert not fake.live
    assert fake.streams <= {0}
    assert not fake.events


def test_work_is_timed_on_the_gpu(cuda: Cuda, fake: FakeGpu) -> None:
    done: list[int] = []
    with cuda.active():
        stream = cuda.stream()
        assert stream.time(lambda: done.append(1)) == 0.25
        with pytest.raises(ZeroDivisionError):
            stream.time(lambda: 1 / 0)
        stream.close()
    assert done == [1]
    assert not fake.events


@pytest.mark.parametrize("name", ["cuda-python", "torch"])
def test_a_graph_replays_what_was_captured(name: str, fake: FakeGpu) -> None:
    library, maker = MAKERS[name]
    cuda, done = maker(library(fake)), []
    with cuda.active():
        stream = cuda.stream()
        graph = stream.capture(lambda: fake.submit(stream.handle, lambda: done.append(1)))
        assert done == []
        graph.launch()
        graph.launch()
        assert done == [1, 1]
        graph.free()
        graph.free()
        with pytest.raises(ZeroDivisionError):
            stream.capture(lambda: 1 / 0)
        assert not fake.capturing  # the stream works on
        stream.close()
    assert not fake.graphs


def test_pycuda_captures_nothing(fake: FakeGpu) -> None:
    cuda = PycudaCuda(fake_pycuda(fake))
    with cuda.active():
        stream = cuda.stream()
        with pytest.raises(EngineError, match=r"captures no CUDA graphs(.|\n)*pip install cuda-python"):
            stream.capture(lambda: None)
        stream.close()


def test_no_memory(cuda: Cuda, fake: FakeGpu) -> None:
    with cuda.active():
        stream = cuda.stream()
        out_of_memory(cuda, fake)
        with pytest.raises(EngineError, match=r"out of memory while allocating 3\.0 MiB(.|\n)*fewer contexts"):
            cuda.alloc(3 << 20, stream)
        stream.close()


def test_every_code_of_cuda_python_is_checked(fake: FakeGpu) -> None:
    """Each call that a whole run makes fails once; what was made before is freed in spite of it."""

    def everything() -> None:
        cuda = BindingsCuda(fake_bindings(fake))
        array = np.zeros(4, np.float32)
        with cuda.active():
            stream = cuda.stream()
            try:
                buffer = cuda.alloc(array.nbytes, stream)
                try:
                    cuda.copy_in(buffer, array, stream)
                    cuda.copy_out(array, buffer, stream)
                    stream.wait_for(1)
                    stream.hold(1)
                    stream.time(lambda: None)
                    graph = stream.capture(lambda: None)
                    try:
                        graph.launch()
                    finally:
                        graph.free()
                    stream.synchronize()
                finally:
                    buffer.free()
            finally:
                stream.close()

    everything()
    assert fake.is_clean()
    names = {str(call[0]) for call in fake.calls}
    assert len(names) == 20
    for name in sorted(names):
        fake.failing = {name: CudaError.cudaErrorIllegalAddress}
        with pytest.raises(EngineError, match=rf"CUDA failed in {name}: cudaErrorIllegalAddress: as it was told to"):
            everything()
        fake.failing = {}
        left = {"cudaFree": fake.live, "cudaStreamDestroy": fake.streams, "cudaEventDestroy": fake.events}
        left |= {"cudaGraphDestroy": fake.graphs, "cudaGraphExecDestroy": fake.graphs, "cudaStreamBeginCapture": {}}
        for kind in (fake.live, fake.streams, fake.events, fake.graphs):
            if kind is not left.get(name):
                assert not kind, name
            kind.clear()
        fake.capturing.clear()


@pytest.mark.parametrize(
    "call", ["retain_primary_context", "push", "Stream", "mem_alloc", "memcpy_htod_async", "memcpy_dtoh_async", "free"]
)
def test_every_exception_of_pycuda_is_explained(call: str, fake: FakeGpu) -> None:
    library = fake_pycuda(fake)
    fake.failing[call] = library.LogicError("cuThat failed: invalid argument")

    def everything() -> None:
        cuda = PycudaCuda(library)
        with cuda.active():
            stream = cuda.stream()
            try:
                buffer = cuda.alloc(4, stream)
                cuda.copy_in(buffer, np.zeros(1, np.float32), stream)
                cuda.copy_out(np.zeros(1, np.float32), buffer, stream)
                buffer.free()
            finally:
                stream.close()

    with pytest.raises(EngineError, match=r"CUDA failed in .*: cuThat failed: invalid argument"):
        everything()


@pytest.mark.parametrize("call", ["Stream", "synchronize", "wait_stream", "record", "replay", "capture_end"])
def test_every_exception_of_torch_is_explained(call: str, fake: FakeGpu) -> None:
    cuda = TorchCuda(fake_torch(fake))
    fake.failing[call] = RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors might be …")

    def everything() -> None:
        stream = cuda.stream()
        stream.synchronize()
        stream.wait_for(7)
        stream.time(lambda: None)
        stream.capture(lambda: None).launch()

    with pytest.raises(EngineError, match=r"CUDA failed in .*: CUDA error: an illegal memory access\n"):
        everything()


def test_a_thread_on_another_gpu_gets_it_back(fake: FakeGpu) -> None:
    library = fake_bindings(fake)
    cuda = BindingsCuda(library)
    library.cudaSetDevice(5)
    with cuda.active():
        assert library.cudaGetDevice()[1] == 0
    with pytest.raises(ZeroDivisionError), cuda.active():
        _ = 1 / 0
    assert library.cudaGetDevice()[1] == 5


def test_orders_of_streams(fake: FakeGpu) -> None:
    """Ours waits for another and another for ours, with an event of the one that is waited for."""
    bindings = BindingsCuda(fake_bindings(fake)).stream()
    bindings.wait_for(7)
    bindings.hold(9)
    (first, second), (third, fourth) = fake.named("cudaEventRecord"), fake.named("cudaStreamWaitEvent")
    assert (first[1], third[0]) == (7, bindings.handle)
    assert (second[1], fourth[0]) == (bindings.handle, 9)
    assert first[0] == third[1] == second[0] == fourth[1]
    torch = TorchCuda(fake_torch(fake)).stream()
    torch.wait_for(0)
    torch.hold(9)
    assert fake.named("wait_stream") == [(torch.handle, 0), (9, torch.handle)]
    cuda = PycudaCuda(fake_pycuda(fake))
    with cuda.active():
        pycuda = cuda.stream()
        pycuda.wait_for(7)  # it wraps no streams of others, so all of them are waited for
        pycuda.hold(9)
        pycuda.close()
    assert fake.calls[-3:-1] == [("Context.synchronize",), ("Stream.synchronize",)]


def test_torch_allocates_and_copies_in_the_stream_that_works(fake: FakeGpu) -> None:
    cuda, array = TorchCuda(fake_torch(fake)), np.zeros(3, np.float32)
    stream = cuda.stream()
    buffer = cuda.alloc(12, stream)
    cuda.copy_in(buffer, array, stream)
    cuda.copy_out(array, buffer, stream)
    assert fake.named("on") == [(stream.handle,)] * 3


# Which library


def importing(monkeypatch: pytest.MonkeyPatch, modules: dict[str, object], imported: bool = False) -> None:
    def import_module(name: str) -> object:
        found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(_cuda, "import_module", import_module)
    if imported:
        monkeypatch.setitem(_cuda.sys.modules, "torch", modules.get("torch", ModuleType("torch")))
    else:
        monkeypatch.delitem(_cuda.sys.modules, "torch", raising=False)


def test_torch_comes_first_only_where_it_is_imported(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "cuda.bindings.runtime": fake_bindings(fake),
        "pycuda.driver": fake_pycuda(fake),
        "torch": fake_torch(fake),
    }
    for imported, without, name in (
        (True, [], "torch"),
        (False, [], "cuda-python"),
        (False, ["cuda.bindings.runtime"], "pycuda"),
        (False, ["cuda.bindings.runtime", "pycuda.driver"], "torch"),
    ):
        with monkeypatch.context() as patch:
            importing(patch, {key: value for key, value in modules.items() if key not in without}, imported)
            assert cuda_library().name == name


def test_a_torch_without_a_gpu_is_passed_over(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(fake)
    torch.cuda.is_available = lambda: False
    importing(monkeypatch, {"cuda.bindings.runtime": fake_bindings(fake), "torch": torch}, imported=True)
    assert cuda_library().name == "cuda-python"
    broken = ImportError("libcudart.so.13: cannot open shared object file")
    importing(monkeypatch, {"pycuda.driver": broken, "torch": torch}, imported=True)
    with pytest.raises(MissingDependencyError) as caught:
        cuda_library()
    for words in (
        "torch sees no GPU",
        "cuda.bindings.runtime is not installed",
        "pycuda.driver does not load (libcudart.so.13",
    ):
        assert caught.value.given.count(words) == 1
    assert caught.value.fix == "pip install cuda-python"


def test_pycuda_keeps_one_context_for_the_process(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, {"pycuda.driver": fake_pycuda(fake)})
    assert cuda_library() is cuda_library()
    assert len(fake.named("retain_primary_context")) == 1


def test_the_real_cuda_python_has_these_functions_with_as_many_arguments() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    fake = vars(fake_bindings(FakeGpu()))
    checked = {name: value.wants for name, value in fake.items() if hasattr(value, "wants")}
    assert len(checked) == 21
    for name, wants in checked.items():
        (arguments,) = re.findall(rf"^{name}\((.*)\)", getattr(real, name).__doc__.splitlines()[0])
        assert len([word for word in arguments.split(",") if word]) == wants, name
    assert (real.cudaStreamNonBlocking, real.cudaEventDisableTiming) == (1, 2)
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert {member.name for member in fake[kind]} <= {*getattr(real, kind).__members__}
    assert {code.name: code.value for code in CudaError}.items() <= {
        name: int(code) for name, code in real.cudaError_t.__members__.items()
    }.items()


@pytest.mark.skipif(local_gpu() is not None, reason="there is a GPU")
def test_the_real_cuda_python_without_a_driver() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    with pytest.raises(EngineError, match=r"CUDA failed in cudaFree: cudaError\w+: .+\n(.|\n)*a driver as new as"):
        BindingsCuda(real)


# The GPU of this machine


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gpu.sys.modules, "torch", raising=False)


@pytest.mark.parametrize(("capability", "text"), [((8, 9), "SM89"), ((12, 0), "SM120")])
def test_the_driver_tells_the_gpu_without_any_library(no_torch, monkeypatch, capability, text: str) -> None:
    monkeypatch.setattr(gpu, "_driver", lambda: FakeDriver(name=b"RTX", capability=capability))
    assert local_gpu() == Gpu("RTX", text)


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_is_no_gpu(no_torch, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(gpu, "_driver", lambda: FakeDriver(failing=call))
    assert local_gpu() is None


def test_without_a_driver_there_is_no_gpu(no_torch, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        assert name == "libcuda.so.1"
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", absent)
    assert local_gpu() is None


@pytest.mark.parametrize(("built_for", "found"), [("13.0", Gpu("Torch's", "SM90")), (None, Gpu("RTX", "SM89"))])
def test_an_imported_torch_with_cuda_is_asked_first(monkeypatch: pytest.MonkeyPatch, built_for, found: Gpu) -> None:
    torch = ModuleType("torch")
    torch.version, torch.cuda = ModuleType("version"), ModuleType("cuda")
    torch.version.cuda = built_for
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda index: (9, 0)
    torch.cuda.get_device_name = lambda index: "Torch's"
    monkeypatch.setitem(gpu.sys.modules, "torch", torch)
    monkeypatch.setattr(gpu, "_driver", lambda: FakeDriver(name=b"RTX"))
    assert local_gpu() == found
    torch.cuda.is_available = lambda: False
    assert local_gpu() == (None if built_for else found)
