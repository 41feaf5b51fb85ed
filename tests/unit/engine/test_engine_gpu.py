"""TensorRT flavours on a real GPU, against ONNX Runtime on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
import torch

from deploy_sparse.engine.cuda.with_bindings import BindingsCuda
from deploy_sparse.engine.cuda.with_pycuda import PycudaCuda
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.trt import session as trt_session
from deploy_sparse.errors import EngineError

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "cuda.bindings.runtime", "pycuda.driver"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory and streams come from."""
    if request.param != "torch":
        pytest.importorskip(request.param, reason=f"needs {request.param}", exc_type=ImportError)
        maker = BindingsCuda if request.param.startswith("cuda") else PycudaCuda
        monkeypatch.setattr(trt_session, "cuda_library", lambda: maker(import_module(request.param)))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_engine_computes_what_the_cpu_computes(engine: Engine, library, built: Engine, cuda_graph: bool) -> None:
    with load_engine(engine, cuda_graph=cuda_graph) as on_gpu, built.open() as on_cpu:
        for batch in (1, 3, 64):
            feeds = on_gpu.sample_inputs(batch, seed=batch)
            actual, expected = on_gpu.run(feeds)["output"], on_cpu.run(feeds)["output"]
            np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
            run = on_gpu.prepare(feeds)
            run()
            assert run.gpu_ms() > 0
            np.testing.assert_array_equal(on_gpu.run(feeds)["output"], actual)
        with pytest.raises(EngineError, match="batch 65 is outside"):
            on_gpu.run({"input": np.zeros((65, 1, 8, 8), np.float32)})


def test_tensors_on_the_gpu_are_not_copied_and_streams_are_respected(engine: Engine, library) -> None:
    with load_engine(engine, contexts=2) as runner:
        feeds = runner.sample_inputs(8)
        expected = runner.run(feeds)["output"]
        images = torch.from_numpy(feeds["input"]).cuda()
        np.testing.assert_array_equal(runner.run_on_gpu({"input": images})["output"].cpu().numpy(), expected)
        given = torch.empty(8, 10, device="cuda")
        assert runner.run_on_gpu({"input": images}, {"output": given})["output"] is given
        np.testing.assert_array_equal(given.cpu().numpy(), expected)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(images)
            torch.cuda._sleep(50_000_000)  # what the run has to wait for
            late.copy_(images)
            found = runner.run_on_gpu({"input": late})["output"]
            found = found.cpu().numpy()
        np.testing.assert_array_equal(found, expected)


def test_threads_on_the_gpu(engine: Engine, library) -> None:
    with load_engine(engine, contexts=3, cuda_graph=True) as runner:
        feeds = [runner.sample_inputs(1 + index % 9, seed=index) for index in range(9)]
        alone = [runner.run(feed)["output"] for feed in feeds]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda index: runner.run(feeds[index % 9])["output"], range(400)))
    assert all(np.array_equal(found, alone[index % 9]) for index, found in enumerate(together))
