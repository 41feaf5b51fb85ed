"""TensorRT's runtime on a GPU of host memory: shapes, types, contexts, graphs, and every failure on the way."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress

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


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("cuda", CUDA)
def test_runs_any_batch_of_its_range_and_frees_everything(load, gpu: FakeGpu, cuda: str, cuda_graph: bool) -> None:
    session = load(cuda=cuda, cuda_graph=cuda_graph)
    for batch in (1, 5, 2, 64, 5, 1):
        feeds = images(batch, seed=batch)
        outputs = session.run(feeds)
        assert list(outputs) == ["output"]
        np.testing.assert_array_equal(outputs["output"], expected(feeds))
        prepared = session.prepare(feeds)
        assert prepared() is None
        assert prepared.gpu_ms() == 0.25
    graphs = cuda_graph and cuda != "pycuda"
    assert bool(gpu.launches) == graphs
    session.close()
    assert not gpu.live
    assert not gpu.graphs
    assert not gpu.events
    assert gpu.streams <= {0}


def test_results_are_the_callers_own(load) -> None:
    session, feeds = load(), images(2)
    first = session.run(feeds)["output"]
    first[:] = 7
    np.testing.assert_array_equal(session.run(feeds)["output"], expected(feeds))
    given = np.zeros((2, 10), np.float32)
    assert session.run(feeds, {"output": given})["output"] is given
    np.testing.assert_array_equal(given, expected(feeds))


def test_buffers_grow_and_stay(load, gpu: FakeGpu) -> None:
    session = load()
    for batch in (4, 1, 4, 3):
        session.run(images(batch))
    assert len(gpu.named("cudaMalloc")) == 2
    assert len(gpu.named("cudaFree")) == 1  # of nothing, which makes the context
    session.run(images(8))
    assert len(gpu.named("cudaMalloc")) == 4
    assert len(gpu.live) == 2


def test_a_context_is_told_what_changed_and_nothing_else(load, gpu: FakeGpu) -> None:
    engine = image_engine(gpu)
    session = load(engine)
    (context,) = engine.made
    session.run(images(8))
    assert context.told == ["shape", "address", "address"]
    session.run(images(8))
    assert len(context.told) == 3
    session.run(images(2))
    assert context.told[3:] == ["shape"]
    prepared = session.prepare(images(8))
    prepared()
    prepared()
    assert context.told[4:] == ["shape", "address", "address"]


def test_prepared_runs_stay_valid_between_others(load) -> None:
    session = load()
    feeds, given = [images(1), images(3)], []
    prepared = [session.prepare(feed) for feed in feeds]
    for _ in range(2):
        for run, feed in zip(prepared, feeds, strict=True):
            session.run(images(7))
            run()
            given.append(np.empty((len(feed["input"]), 10), np.float32))
            run._slot.fetch("output", given[-1])
            np.testing.assert_array_equal(given[-1], expected(feed))


def test_a_prepared_run_that_nobody_keeps_frees_its_memory(load, gpu: FakeGpu) -> None:
    session = load(cuda_graph=True)
    session.run(images(1))
    before = len(gpu.live), len(gpu.graphs)
    prepared = session.prepare(images(9))
    assert (len(gpu.live), len(gpu.graphs)) == (before[0] + 2, before[1] + 1)
    del prepared
    assert (len(gpu.live), len(gpu.graphs)) == before


def test_a_session_that_nobody_keeps_or_closes_frees_its_memory(load, gpu: FakeGpu) -> None:
    session = load(cuda_graph=True)
    run = session.prepare(images(2))
    session.run(images(2))
    del session
    run()  # it keeps the session
    assert gpu.live
    del run
    assert gpu.is_clean()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_who_keeps_a_prepared_run_of_a_closed_session_keeps_no_engine(load: Load, cuda_graph: bool) -> None:
    session = load(cuda_graph=cuda_graph)
    prepared = session.prepare(images(2))
    engine = weakref.ref(prepared._slot._opened)
    assert engine() is not None
    session.close()
    assert engine() is None


# Types


def one_output(gpu: FakeGpu, kind: Types, values: np.ndarray) -> FakeEngine:
    return FakeEngine(gpu, {"x": (Types.FLOAT, (-1, 2))}, {"y": (kind, (-1, 3), lambda x: values)})


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Types.FLOAT, "float32"), (Types.HALF, "float16"), (Types.INT64, "int64"), (Types.BOOL, "bool"), (Types.INT32, "int32")],
)  # fmt: skip
def test_output_types(load, gpu: FakeGpu, kind: Types, dtype: str) -> None:
    values = np.array([[0, 1, 1]]).astype(dtype)
    output = load(one_output(gpu, kind, values)).run({"x": np.zeros((1, 2), np.float32)})["y"]
    assert output.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(output, values)


BITS = np.array([[0x3F80, 0xC049, 0x7F80]], np.uint16)  # 1, -3.140625, infinity


def test_bfloat16_is_ml_dtypes_where_that_is_installed(load, gpu: FakeGpu) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    output = load(one_output(gpu, Types.BF16, BITS)).run({"x": np.zeros((1, 2), np.float32)})["y"]
    assert output.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(output.astype(np.float32), [[1, -3.140625, np.inf]])
    given = np.zeros((1, 3), ml_dtypes.bfloat16)
    load(one_output(gpu, Types.BF16, BITS)).run({"x": np.zeros((1, 2), np.float32)}, {"y": given})
    np.testing.assert_array_equal(given, output)


def test_bfloat16_is_widened_to_float32_without(load, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    output = load(one_output(gpu, Types.BF16, BITS)).run({"x": np.zeros((1, 2), np.float32)})["y"]
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output, [[1, -3.140625, np.inf]])


def test_bfloat16_feeds_reach_the_gpu_as_they_are(load, gpu: FakeGpu) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    engine = FakeEngine(gpu, {"x": (Types.BF16, (-1, 3))}, {"y": (Types.BF16, (-1, 3), lambda x: x)})
    x = np.array([[1, -3.14, 5]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(load(engine).run({"x": x})["y"], x)


def test_types_without_arrays_are_refused_when_loading(load, gpu: FakeGpu) -> None:
    with pytest.raises(EngineError, match=r"'y' of the engine is of type float8(.|\n)*bfloat16(.|\n)*inside the graph"):
        load(one_output(gpu, Types.FP8, BITS))
    assert gpu.is_clean()


# What cannot run


def test_shapes_outside_the_profile(load, gpu: FakeGpu) -> None:
    session = load(image_engine(gpu, largest=4))
    session.run(images(4))
    with pytest.raises(
        EngineError, match=r"refuses shape \(5, 1, 8, 8\) for input 'input'(.|\n)*deploy-sparse build …"
    ):
        session.run(images(5))
    np.testing.assert_array_equal(session.run(images(4))["output"], expected(images(4)))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_shapes_that_depend_on_values(load, gpu: FakeGpu, cuda_graph: bool, caplog) -> None:
    session = load(image_engine(gpu, depends=True), cuda_graph=cuda_graph)
    with pytest.raises(EngineError, match=r"'output' has shape \[-1, 10\]: it depends on the values(.|\n)*NonZero"):
        session.run(images(2))
    assert not caplog.records


def test_engines_that_are_refused_when_loading(load, gpu: FakeGpu) -> None:
    with pytest.raises(EngineError, match="cannot be deserialized"):
        load(plan=b"broken")
    with pytest.raises(EngineError, match="reads a shape from host memory"):
        load(image_engine(gpu, host=("input",)))
    with pytest.raises(EngineError, match=r"makes no execution context(.|\n)*fewer contexts"):
        load(image_engine(gpu, contexts=2), contexts=3)
    assert gpu.is_clean()


def test_a_run_that_does_not_start(load, gpu: FakeGpu) -> None:
    engine = image_engine(gpu)
    session = load(engine)
    engine.made[0].works = False
    for _ in range(2):  # the context comes back
        with pytest.raises(EngineError, match="could not start the run"):
            session.run(images(1))
    engine.made[0].works = True
    session.run(images(1))
    session.close()
    assert gpu.is_clean()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_failures_of_the_gpu(load, gpu: FakeGpu, call: str, cuda_graph: bool) -> None:
    session = load(cuda_graph=cuda_graph)
    session.run(images(1))
    gpu.failing[call] = (
        CudaError.cudaErrorMemoryAllocation if call == "cudaMalloc" else CudaError.cudaErrorIllegalAddress
    )
    text = "out of memory while allocating" if call == "cudaMalloc" else f"CUDA failed in {call}"
    for use in (session.run, session.prepare):
        with pytest.raises(EngineError, match=text):
            use(images(8))
    gpu.failing.clear()
    np.testing.assert_array_equal(session.run(images(8))["output"], expected(images(8)))
    session.close()
    assert gpu.is_clean()


def test_out_of_memory_for_the_second_context_frees_the_first(load, gpu: FakeGpu) -> None:
    made = []

    class Second(FakeEngine):
        def create_execution_context(self):
            made.append(len(gpu.streams))
            return super().create_execution_context()

    plain = image_engine(gpu)
    with pytest.raises(EngineError, match="makes no execution context"):
        load(Second(gpu, plain.inputs, plain.outputs, contexts=1), contexts=2)
    assert made == [1, 2]
    assert gpu.is_clean()


def test_nothing_is_freed_or_returned_while_the_gpu_may_still_use_it(load: Load, gpu: FakeGpu) -> None:
    session = load()
    for use, freed in ((session.run, []), (session.prepare, ["cudaFree", "cudaFree"])):
        gpu.failing["cudaMemcpyAsync"] = CudaError.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="CUDA failed in cudaMemcpyAsync"):
            use(images(3))
        calls = [call[0] for call in gpu.calls if call[0] in ("cudaMemcpyAsync", "cudaStreamSynchronize", "cudaFree")]
        assert calls[-2 - len(freed) :] == ["cudaMemcpyAsync", "cudaStreamSynchronize", *freed]


def test_closing_after_a_failure_of_the_gpu_frees_what_there_is(load: Load, gpu: FakeGpu) -> None:
    session = load(contexts=2, cuda_graph=True)
    session.run(images(1))
    prepared = session.prepare(images(2))
    engine = weakref.ref(prepared._slot._opened)
    gpu.failing["cudaStreamSynchronize"] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"CUDA failed in cudaStreamSynchronize(.|\n)*a new process"):
        session.close()
    assert gpu.is_clean()
    assert engine() is None
    with pytest.raises(EngineError, match="is closed"):
        prepared()


def test_a_failure_at_any_step_of_loading_frees_what_there_is(load: Load, gpu: FakeGpu, monkeypatch) -> None:
    load(contexts=3).close()
    steps = [call for call in gpu.calls if not str(call[0]).endswith("Destroy")]
    real, failed = FakeGpu.fails, 0
    for number in range(len(steps)):
        fresh, left = FakeGpu(), iter(range(number + 1))

        def fails(self, name, *arguments, left=left):
            real(self, name, *arguments)
            return CudaError.cudaErrorIllegalAddress if next(left, None) == number else None  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(FakeGpu, "fails", fails)
            with suppress(EngineError):
                session, failed = None, failed + 1
                session = loader(fresh, patch)(contexts=3)
            if session is not None:
                failed -= 1
                patch.setattr(FakeGpu, "fails", real)
                session.close()
        assert fresh.is_clean(), fresh.calls
    assert failed >= 10
