"""TensorRT's runtime on a GPU of host memory: contexts under threads, and CUDA graphs."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda_fakes import CudaError, FakeGpu
from runtime_fakes import CUDA, FakeEngine, Load, Types, expected, image_engine, images, loader

from deploy_sparse.errors import EngineError


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def load(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(gpu, monkeypatch)


def test_as_many_calls_run_at_a_time_as_there_are_contexts(load, gpu: FakeGpu) -> None:
    engine = image_engine(gpu)
    session = load(engine, contexts=3)
    assert len(engine.made) == 3
    assert len(gpu.streams) == 3
    running, most, lock = [0], [0], threading.Lock()
    for context in engine.made:
        execute = context.execute_async_v3

        def counted(handle: int, execute=execute) -> bool:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            try:
                return execute(handle)
            finally:
                with lock:
                    running[0] -= 1

        context.execute_async_v3, context.seconds = counted, 0.002

    def call(index: int) -> None:
        feeds = images(1 + index % 7, seed=index)
        np.testing.assert_array_equal(session.run(feeds)["output"], expected(feeds))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(80)))
    assert most[0] == 3
    session.close()
    assert gpu.is_clean()


@pytest.mark.parametrize("cuda", CUDA)
def test_mixed_calls_from_threads_with_failures_among_them(load, gpu: FakeGpu, cuda: str) -> None:
    session = load(image_engine(gpu, largest=6), contexts=2, cuda=cuda, cuda_graph=True)
    prepared = session.prepare(images(3))

    def call(index: int) -> str:
        feeds = images(1 + index % 7, seed=index)
        if index % 5 == 0:
            prepared()
            return "prepared"
        try:
            np.testing.assert_array_equal(session.run(feeds)["output"], expected(feeds))
        except EngineError as problem:
            return problem.given[:22]
        return "run"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, range(210)))
    assert {answer: answers.count(answer) for answer in set(answers)} == {
        "prepared": 42, "TensorRT refuses shape": 24, "run": 144,
    }  # fmt: skip
    session.close()


def test_closing_waits_for_a_running_call(load, gpu: FakeGpu) -> None:
    engine = image_engine(gpu)
    session = load(engine)
    engine.made[0].seconds = 0.1
    prepared = session.prepare(images(1))
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(session.run(images(2))["output"]))
    thread.start()
    while not engine.made[0].busy.locked():
        pass
    session.close()
    thread.join(5)
    np.testing.assert_array_equal(answers[0], expected(images(2)))
    with pytest.raises(EngineError, match="the engine of this prepared run is closed"):
        prepared()
    assert gpu.is_clean()


# Graphs


def test_a_graph_for_each_set_of_shapes_with_a_context_of_its_own(load, gpu: FakeGpu) -> None:
    engine = image_engine(gpu)
    session = load(engine, cuda_graph=True)
    for batch in (1, 2, 1, 2, 1):
        np.testing.assert_array_equal(session.run(images(batch))["output"], expected(images(batch)))
    assert (len(gpu.graphs), gpu.launches, len(engine.made)) == (2, 5, 3)
    for batch in range(1, 12):
        session.run(images(batch))
    assert len(gpu.graphs) == 8  # the latest used
    assert len(gpu.live) == 16
    launches = gpu.launches
    session.run(images(11))
    assert (len(gpu.graphs), gpu.launches, len(engine.made)) == (8, launches + 1, 12)


def test_before_a_capture_comes_a_run_on_the_feeds(load, gpu: FakeGpu) -> None:
    """On whatever is in fresh memory a look-up could read anywhere."""
    seen: list[float] = []
    engine = FakeEngine(
        gpu, {"x": (Types.FLOAT, (-1, 2))}, {"y": (Types.FLOAT, (-1, 2), lambda x: seen.append(float(x[0, 0])) or x)}
    )
    load(engine, cuda_graph=True).run({"x": np.full((1, 2), 7, np.float32)})
    assert seen == [7, 7]


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_without_a_capture_runs_are_launched(load, gpu: FakeGpu, call: str, caplog) -> None:
    session = load(cuda_graph=True)
    gpu.failing[call] = CudaError.cudaErrorStreamCaptureUnsupported
    with caplog.at_level(logging.WARNING):
        for batch in (1, 2):
            feeds = images(batch)
            np.testing.assert_array_equal(session.run(feeds)["output"], expected(feeds))
            session.prepare(feeds)()
    (record,) = caplog.records
    assert f"capturing a CUDA graph failed: CUDA failed in {call}: cudaErrorStreamCaptureUnsupported" in record.message
    assert gpu.launches == 0
    gpu.failing.clear()
    gpu.graphs.clear()
    session.close()
    assert gpu.is_clean()
