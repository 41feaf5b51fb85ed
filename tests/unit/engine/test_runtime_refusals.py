"""What a runner refuses because it would read, or write, something else than the caller means."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_fakes import CudaError, FakeDriver, FakeGpu, fake_bindings
from runtime_fakes import Foreign, Load, expected, image_engine, images, loader

from deploy_sparse.engine.cuda import gpu as gpu_module
from deploy_sparse.engine.cuda.arrays import check_device, device_views
from deploy_sparse.engine.cuda.with_bindings import BindingsCuda
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.pytorch.session import TorchSession
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.trt.worker import _GRAPHS
from deploy_sparse.errors import EngineError


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def load(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(gpu, monkeypatch)


def test_a_masked_array(built: Engine) -> None:
    with load_engine(built) as runner:
        feeds = runner.sample_inputs(2)
        masked = np.ma.masked_greater(feeds["input"], 0)
        with pytest.raises(EngineError, match=r"input 'input' is a masked array(.|\n)*array\.filled\(0\)"):
            runner.run({"input": masked})
        filled = runner.run({"input": masked.filled(0)})["output"]
        out = np.ma.masked_array(np.empty((2, 10), np.float32), mask=True)
        with pytest.raises(EngineError, match="output 'output' is a masked array"):
            runner.run(feeds, out={"output": out})
        assert not np.array_equal(filled, runner.run(feeds)["output"])


@pytest.mark.parametrize("contexts", [True, 0, 1.0, "2"])
def test_numbers_of_contexts_that_are_none(built: Engine, contexts: object) -> None:
    with pytest.raises(EngineError, match=f"contexts is {contexts!r}"):
        load_engine(built, contexts=contexts)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 0.5, "a", None])
def test_seeds_that_are_none(built: Engine, seed: object) -> None:
    with load_engine(built) as runner, pytest.raises(EngineError, match=f"seed is {seed!r}"):
        runner.sample_inputs(seed=seed)  # type: ignore[arg-type]


# Another GPU


def test_the_driver_tells_on_which_gpu_an_array_lies(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """``__cuda_array_interface__`` does not."""
    array, driver = Foreign(gpu, np.ones((2, 3), np.float32)), FakeDriver()
    monkeypatch.setattr(gpu_module, "_driver", lambda: driver)
    assert device_views({"x": array}, 1)["x"].device is None  # memory that it does not know
    driver.owners[array.__cuda_array_interface__["data"][0]] = 1
    views = device_views({"x": array}, 1)
    assert views["x"].device == 1
    with pytest.raises(EngineError, match="'x' is on GPU 1, and the engine on GPU 0"):
        check_device(views, 0)
    check_device(views, 1)
    empty = Foreign(gpu, np.ones((0, 3), np.float32), data=(0, False))
    assert device_views({"x": empty}, 1)["x"].device is None
    monkeypatch.setattr(gpu_module, "_driver", lambda: None)
    assert device_views({"x": array}, 1)["x"].device is None


def test_an_array_on_another_gpu_given_to_torch() -> None:
    session = object.__new__(TorchSession)
    session._stream = SimpleNamespace(device=torch.device("cuda", 0))
    views = device_views({"x": SimpleNamespace(__cuda_array_interface__=_interface())}, 1)
    with pytest.raises(EngineError, match=r"'x' is on GPU 1, and the engine on GPU 0(.|\n)*tensor\.to\('cuda:0'\)"):
        session.run_on_gpu({"x": replace(views["x"], device=1)}, {}, 1)


def _interface() -> dict[str, object]:
    return {"shape": (2, 3), "typestr": "<f4", "data": (256, False), "version": 3}


class Lying:
    """Says that it is CUDA's, and hands out memory of the CPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> object:
        return np.zeros(3, np.float32).__dlpack__()


def test_a_capsule_of_the_cpu_from_a_producer_that_says_cuda() -> None:
    with pytest.raises(EngineError, match=r"'x' is a Lying, .*device type 1, which is not CUDA's"):
        device_views({"x": Lying()}, 1)


# Graphs that cannot be had


def test_a_graph_that_does_not_go_leaves_no_other(gpu: FakeGpu) -> None:
    cuda = BindingsCuda(fake_bindings(gpu))
    stream = cuda.stream()
    gpu.failing["cudaGraphDestroy"] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match="CUDA failed in cudaGraphDestroy"):
        stream.capture(lambda: None)
    assert len(gpu.graphs) == 1  # the one that could not be destroyed
    gpu.failing.clear()
    gpu.graphs.clear()
    stream.close()
    assert gpu.is_clean()


def test_shapes_without_memory_for_a_graph_take_none_from_others(load, gpu: FakeGpu, caplog) -> None:
    engine = image_engine(gpu)
    session = load(engine, cuda_graph=True)
    gpu.failing["cudaGraphInstantiate"] = CudaError.cudaErrorMemoryAllocation
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(session.run(images(9))["output"], expected(images(9)))
        del gpu.failing["cudaGraphInstantiate"]
        for batch in (1, 2, 1):
            np.testing.assert_array_equal(session.run(images(batch))["output"], expected(images(batch)))
        assert (len(gpu.graphs), gpu.launches) == (2, 3)
        contexts = len(engine.made)
        np.testing.assert_array_equal(session.run(images(9))["output"], expected(images(9)))
        session.prepare(images(9))()
    assert (len(engine.made), gpu.launches) == (contexts, 3)  # what gave no graph is not tried again
    (record,) = caplog.records
    assert "runs on [9, 1, 8, 8] are launched one by one" in record.message
    assert "out of memory" in record.message
    session.close()
    assert gpu.is_clean()


def test_after_so_many_shapes_without_a_graph_none_is_tried(load, gpu: FakeGpu, caplog) -> None:
    engine = image_engine(gpu)
    session = load(engine, cuda_graph=True)
    gpu.failing["cudaStreamBeginCapture"] = CudaError.cudaErrorStreamCaptureUnsupported
    with caplog.at_level(logging.WARNING):
        for batch in range(1, _GRAPHS + 5):
            session.run(images(batch))
    assert len(engine.made) == 1 + _GRAPHS
    assert len(caplog.records) == 1  # one reason, said once
