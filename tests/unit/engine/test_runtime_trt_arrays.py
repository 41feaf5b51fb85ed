"""TensorRT's runtime on arrays that are on the GPU: no copies, the caller's streams, results the caller owns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_fakes import CudaError, FakeGpu
from runtime_fakes import (
    CUDA,
    FakeEngine,
    Foreign,
    Load,
    Types,
    expected,
    images,
    loader,
)
from torch_cuda_fakes import fake_torch

from deploy_sparse.engine.cuda.arrays import DeviceArray, device_views
from deploy_sparse.engine.cuda.runtime import Cuda
from deploy_sparse.engine.trt import session as trt_session
from deploy_sparse.engine.trt.session import TrtSession
from deploy_sparse.errors import EngineError, MissingDependencyError


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def load(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(gpu, monkeypatch)


def on_gpu(session: TrtSession, feeds: dict[str, object], out: dict[str, object] | None = None) -> dict[str, object]:
    return session.run_on_gpu(device_views(feeds, 1), device_views(out or {}, 1), 1)


@pytest.mark.parametrize("cuda", CUDA)
def test_nothing_is_copied_for_arrays_on_the_gpu(load, gpu: FakeGpu, cuda: str) -> None:
    session, feeds = load(cuda=cuda), images(3)
    given = Foreign(gpu, feeds["input"], stream=7)
    before = len(gpu.calls)
    result = on_gpu(session, {"input": given})["output"]
    assert not [call for call in gpu.calls[before:] if "emcpy" in str(call[0])]
    assert isinstance(result, DeviceArray)
    assert (result.shape, result.dtype) == ((3, 10), np.float32)
    np.testing.assert_array_equal(result.numpy(), expected(feeds))
    interface = result.__cuda_array_interface__
    assert {key: interface[key] for key in ("shape", "typestr", "strides", "version")} == {
        "shape": (3, 10), "typestr": "<f4", "strides": None, "version": 3,
    }  # fmt: skip
    again = on_gpu(session, {"input": given})["output"]
    assert again.__cuda_array_interface__["data"] != interface["data"]
    del result
    np.testing.assert_array_equal(again.numpy(), expected(feeds))
    session.close()
    np.testing.assert_array_equal(again.numpy(), expected(feeds))  # a result outlives its engine
    del again
    assert not gpu.live


def test_results_go_where_the_caller_wants_them(load, gpu: FakeGpu) -> None:
    session, feeds = load(), images(3)
    out = Foreign(gpu, np.zeros((3, 10), np.float32), stream=9)
    before = len(gpu.calls)
    result = on_gpu(session, {"input": Foreign(gpu, feeds["input"])}, {"output": out})
    assert result == {"output": out}
    assert "cudaStreamSynchronize" in [call[0] for call in gpu.calls[before:]]  # complete, as no stream is to wait
    np.testing.assert_array_equal(out.numpy(), expected(feeds))
    assert [call[1] for call in gpu.named("cudaEventRecord")] == [1, 9]  # waited for: the caller's stream, the array's
    assert not gpu.live
    small = Foreign(gpu, np.zeros((2, 10), np.float32))
    with pytest.raises(EngineError, match=r"'output' goes into an array \[2, 10\](.|\n)*\[3, 10\]"):
        on_gpu(session, {"input": Foreign(gpu, feeds["input"])}, {"output": small})


def test_with_torch_results_are_tensors_and_nothing_waits(load, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(gpu)
    session, feeds = load(), images(4)
    monkeypatch.setattr(trt_session, "torch_with_cuda", lambda: torch)
    before = len(gpu.calls)
    result = on_gpu(session, {"input": Foreign(gpu, feeds["input"])})["output"]
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), expected(feeds))
    calls = [call[0] for call in gpu.calls[before:]]
    assert "cudaStreamSynchronize" not in calls
    assert calls.count("cudaStreamWaitEvent") == 2  # ours for the caller's stream, then the caller's for ours


def test_no_memory_for_a_result(load: Load, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, session, given = fake_torch(gpu), load(), {"input": Foreign(gpu, images(4)["input"])}
    with monkeypatch.context() as patch:
        patch.setattr(trt_session, "torch_with_cuda", lambda: torch)
        gpu.failing["empty"] = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        with pytest.raises(EngineError, match=r"out of memory while making a tensor float32 \[4, 10\]"):
            on_gpu(session, given)
    gpu.failing["cudaMalloc"] = CudaError.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=r"out of memory while allocating 0\.0 MiB"):
        on_gpu(session, given)
    gpu.failing.clear()
    assert on_gpu(session, given)["output"].shape == (4, 10)  # the context came back


def test_a_slice_at_an_odd_address_is_refused(load, gpu: FakeGpu) -> None:
    given = Foreign(gpu, images(3)["input"])
    address = given.__cuda_array_interface__["data"][0]
    given._interface["data"], given._interface["shape"] = (address + 64, False), (1, 1, 8, 8)
    session = load()
    with pytest.raises(EngineError, match=r"no address .* for 'input'(.|\n)*256 bytes(.|\n)*\.clone\(\)"):
        on_gpu(session, {"input": given})


def test_bfloat16_results_on_the_gpu_need_torch(load, gpu: FakeGpu) -> None:
    engine = FakeEngine(gpu, {"x": (Types.FLOAT, (-1, 2))}, {"y": (Types.BF16, (-1, 2), lambda x: 0)})
    session = load(engine)
    with pytest.raises(EngineError, match=r"'y' is bfloat16, which __cuda_array_interface__ does not have"):
        on_gpu(session, {"x": Foreign(gpu, np.zeros((1, 2), np.float32))})
    session.close()
    assert gpu.is_clean()


def test_no_library_for_memory(load, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Cuda:
        raise MissingDependencyError("nothing here manages GPU memory", expected="one", fix="pip install cuda-python")

    monkeypatch.setitem(CUDA, "none", lambda gpu: missing())
    with pytest.raises(MissingDependencyError, match="pip install cuda-python"):
        load(cuda="none")


def test_arrays_on_another_gpu(load: Load, gpu: FakeGpu) -> None:
    session, feeds = load(), images(2)
    views = device_views({"input": Foreign(gpu, feeds["input"])}, 1)
    result = device_views({"output": Foreign(gpu, expected(feeds))}, 1)
    here, there = ({name: replace(view, device=number) for name, view in views.items()} for number in (0, 1))
    session.run_on_gpu(here, result, 1)
    with pytest.raises(EngineError, match=r"'input' is on GPU 1, and the engine on GPU 0(.|\n)*tensor.to\('cuda:0'\)"):
        session.run_on_gpu(there, {}, 1)
    elsewhere = {name: replace(view, device=1) for name, view in result.items()}
    with pytest.raises(EngineError, match="'output' is on GPU 1"):
        session.run_on_gpu(here, elsewhere, 1)
