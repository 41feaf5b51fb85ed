"""Running on the CPU in ONNX Runtime and torch: verified first, equal to the module, strict about inputs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from engine_samples import TinyNet, write_graph
from onnx import helper, load, numpy_helper, save

import deploy_sparse
from deploy_sparse.artifact import write_artifact
from deploy_sparse.engine import runner as module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.engine.runner import Runner, load_engine
from deploy_sparse.errors import ArtifactError, EngineError
from deploy_sparse.measure.profile import profile


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(
    request: pytest.FixtureRequest, tiny: TinyNet, examples: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """The same network in each runtime."""
    if request.param == "onnxruntime":
        return request.getfixturevalue("built")
    return build_engine(tiny, "torch-cpu", examples, tmp_path_factory.mktemp("torch"), name="tiny")


@pytest.fixture(scope="module")
def runner(engine: Engine) -> Runner:
    return load_engine(engine)


def test_runs_like_the_module(runner: Runner, tiny: TinyNet) -> None:
    tiny.eval()
    for batch in (1, 3, 256):
        feeds = runner.sample_inputs(batch, seed=batch)
        with torch.no_grad():
            expected = tiny(torch.from_numpy(feeds["input"])).numpy()
        outputs = runner.run(feeds)
        assert list(outputs) == ["output"]
        np.testing.assert_allclose(outputs["output"], expected, atol=1e-5)
        runner.prepare(feeds)()


def test_folder_file_and_engine_open_alike(engine: Engine) -> None:
    assert deploy_sparse.load_engine is load_engine
    for path in (engine, engine.folder, str(engine.folder), engine.path, engine.folder / "engine.json"):
        with load_engine(path) as runner:
            assert runner.manifest["digest"] == engine.manifest["digest"]
            assert str(runner.inputs[0]) == "input float32 [batch, 1, 8, 8]"
            assert str(runner.outputs[0]) == "output float32 [batch, 10]"


def test_same_input_same_output_from_threads(runner: Runner) -> None:
    feeds = [runner.sample_inputs(batch, seed) for batch, seed in ((1, 0), (2, 1), (5, 2))] * 5
    alone = [runner.run(feed)["output"] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feed: runner.run(feed)["output"], feeds))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_prepared_closure_runs_once_per_call(tmp_path: Path) -> None:
    counted: list[int] = []

    class Session:
        def run(self, feeds, out):
            raise AssertionError

        def prepare(self, feeds):
            return lambda: counted.append(len(feeds["input"]))

        def close(self) -> None:
            counted.append(-1)

    engine = build_engine(
        write_graph(tmp_path / "x.onnx", [helper.make_node("Relu", ["input"], ["output"])]), "cpu", out=tmp_path
    )
    with Runner(engine, Session()) as runner:
        run = runner.prepare(runner.sample_inputs(3))
        assert run() is None
        run()
        assert counted == [3, 3]
    assert counted == [3, 3, -1]


def test_onnx_runtime_computes_right_into_the_callers_arrays(built: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_engine(built) as runner:
        feeds, given = runner.sample_inputs(2), {"output": np.zeros((2, 10), np.float32)}
        expected, bound = runner.run(feeds)["output"], []
        session = runner._session._session
        monkeypatch.setattr(session, "run", lambda *_: pytest.fail("a run that copies its results"))
        real = onnxruntime.IOBinding.bind_output

        def bind(self, name, *rest):
            bound.append((name, rest[-1]))
            real(self, name, *rest)

        monkeypatch.setattr(onnxruntime.IOBinding, "bind_output", bind)
        runner.run(feeds, given)
        assert bound == [("output", given["output"].ctypes.data)]
        np.testing.assert_array_equal(given["output"], expected)


def test_weights_in_other_files_are_read_from_their_folder(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
    nodes = [helper.make_node("Add", ["input", "w"], ["output"])]
    path = write_graph(tmp_path / "x.onnx", nodes, shape=("n", 4096), initializers=(weight,))
    save(load(path), path, save_as_external_data=True, location="x.data", size_threshold=0)
    assert (tmp_path / "x.data").stat().st_size >= 4096 * 4
    feeds = {"input": np.ones((1, 4096), np.float32)}
    outputs = OrtSession(path.read_bytes(), folder=tmp_path).run(feeds)
    np.testing.assert_array_equal(outputs["output"][0], np.arange(4096) + 1)


def test_some_outputs_into_given_arrays_and_others_new(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def forward(self, x):
            return x + 1, x * 2

    for target in ("cpu", "torch-cpu"):
        with build_engine(Two(), target, torch.randn(2, 3), tmp_path).open() as runner:
            feeds = runner.sample_inputs(4)
            first, second = (spec.name for spec in runner.outputs)
            given = np.zeros((4, 3), np.float32)
            outputs = runner.run(feeds, {second: given})
            assert list(outputs) == [first, second]
            assert outputs[second] is given
            np.testing.assert_array_equal(given, feeds["input"] * 2)
            np.testing.assert_array_equal(outputs[first], feeds["input"] + 1)


def test_prepared_closure_computes_into_its_buffers(built: Engine) -> None:
    with load_engine(built) as runner:
        feeds = runner.sample_inputs(2)
        run = runner.prepare(feeds)
        buffers = run.__defaults__[0][1]  # the closure holds its buffers
        buffers["output"][:] = -7
        run()
        np.testing.assert_array_equal(buffers["output"], runner.run(feeds)["output"])
        feeds["input"][:] = runner.sample_inputs(2, seed=1)["input"]  # bound, not copied
        run()
        np.testing.assert_array_equal(buffers["output"], runner.run(feeds)["output"])


def test_samples(runner: Runner) -> None:
    assert runner.sample_inputs()["input"].shape == (1, 1, 8, 8)
    assert np.array_equal(runner.sample_inputs(2)["input"], runner.sample_inputs(2, seed=0)["input"])
    with pytest.raises(EngineError, match=r"batch 257 is outside this engine's range(.|\n)*a batch of 1 to 256"):
        runner.sample_inputs(257)


@pytest.mark.parametrize("method", ["run", "prepare"])
def test_bad_feeds_reach_no_runtime(runner: Runner, method: str) -> None:
    call = getattr(runner, method)
    x = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(EngineError, match=r"unknown input 'imput'(.|\n)*did you mean 'input'"):
        call({"imput": x})
    with pytest.raises(EngineError, match=r"\.astype\(np\.float32\)"):
        call({"input": x.astype(np.float64)})
    with pytest.raises(EngineError, match="has 9 at axis 3"):
        call({"input": np.zeros((1, 1, 8, 9), np.float32)})
    with pytest.raises(EngineError, match="batch 0 is outside"):
        call({"input": x[:0]})


def test_closed_runner(engine: Engine) -> None:
    runner = load_engine(engine)
    feeds = runner.sample_inputs()
    runner.close()
    runner.close()
    for method in (runner.run, runner.prepare, runner.run_on_gpu):
        with pytest.raises(EngineError, match=f"the runner of {engine.folder} is closed(.|\\n)*load the engine again"):
            method(feeds)


def test_closing_waits_for_calls_of_other_threads(engine: Engine) -> None:
    runner, answers = load_engine(engine), []
    feeds = runner.sample_inputs(7)
    expected = runner.run(feeds)["output"]

    def call() -> None:
        try:
            while True:
                answers.append(np.array_equal(runner.run(feeds)["output"], expected))
        except EngineError as problem:
            answers.append(problem.given)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 20:
        time.sleep(0.001)
    runner.close()
    for thread in threads:
        thread.join(10)
    assert answers.count(True) == len(answers) - 4 >= 20
    assert answers.count(f"the runner of {engine.folder} is closed") == 4


def test_results_go_where_the_caller_wants_them(runner: Runner) -> None:
    feeds = runner.sample_inputs(3)
    expected = runner.run(feeds)["output"]
    given = np.full((3, 10), -7, np.float32)
    outputs = runner.run(feeds, {"output": given})
    assert outputs["output"] is given
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ({"outptu": np.zeros((2, 10), np.float32)}, r"unknown output 'outptu'(.|\n)*did you mean 'output'"),
        ({"output": np.zeros((2, 10))}, r"goes into an array float64 \[2, 10\](.|\n)*float32 \[2, 10\]"),
        ({"output": np.zeros((3, 10), np.float32)}, r"float32 \[3, 10\](.|\n)*float32 \[2, 10\]"),
        ({"output": np.zeros((10, 2), np.float32).T}, "that is not contiguous"),
        ({"output": np.frombuffer(bytes(80), np.float32).reshape(2, 10)}, "that is read-only"),
        ({"output": [0.0]}, r"output 'output' is a list(.|\n)*np\.asarray"),
        ([np.zeros((2, 10), np.float32)], "out is a list"),
    ],
)
def test_arrays_that_take_no_result(runner: Runner, out: object, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        runner.run(runner.sample_inputs(2), out)


def test_a_result_cannot_replace_its_own_input(engine: Engine, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "x.onnx", [helper.make_node("Relu", ["input"], ["output"])])
    with build_engine(path, "cpu", out=tmp_path).open() as runner:
        feeds = runner.sample_inputs(2)
        with pytest.raises(EngineError, match=r"'output' goes into memory of input 'input'(.|\n)*a new array"):
            runner.run(feeds, {"output": feeds["input"]})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"contexts": 0}, r"contexts is 0(.|\n)*a number from 1"),
        ({"contexts": "2"}, "contexts is '2'"),
        ({"cuda_graph": True}, r"cuda_graph was asked for, and .* runs on the CPU"),
    ],
)
def test_options_that_do_not_fit(engine: Engine, options: dict[str, object], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        load_engine(engine, **options)


def test_contexts_mean_nothing_where_calls_need_none(engine: Engine) -> None:
    with load_engine(engine, contexts=4) as runner:
        assert runner.run(runner.sample_inputs())["output"].shape == (1, 10)


def test_failure_inside_the_runtime(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([2, 4], np.int64), "shape")
    node = helper.make_node("Reshape", ["input", "shape"], ["output"], name="fixed")
    path = write_graph(tmp_path / "x.onnx", [node], out_shape=(2, 4), initializers=(shape,))
    with build_engine(path, "cpu", out=tmp_path).open() as runner:
        assert runner.run(runner.sample_inputs(2))["output"].shape == (2, 4)
        with pytest.raises(EngineError, match=r"ONNX Runtime failed while running: .*fixed"):
            runner.run(runner.sample_inputs(3))


@pytest.mark.parametrize("name", ["model.onnx", "engine.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "remove"])
def test_damaged_engine_never_reaches_the_runtime(
    entry: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deploy_sparse.engine.onnx.runtime.OrtSession", lambda *_: pytest.fail("a damaged engine was opened")
    )
    path = entry / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 3] ^= 4
        path.write_bytes({"flip": data, "truncate": data[:-1], "append": data + b" x"}[damage])
    with pytest.raises(ArtifactError) as caught:
        load_engine(entry)
    assert str(entry) in str(caught.value)
    assert "next step: make " in str(caught.value)


def test_file_swapped_while_loading(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = module.open_entry

    def verify_then_swap(path):
        engine = verify(path)
        engine.path.write_bytes(engine.path.read_bytes()[:-1])
        return engine

    monkeypatch.setattr(module, "open_entry", verify_then_swap)
    with pytest.raises(ArtifactError, match="changed while it was being loaded"):
        load_engine(entry)


@pytest.mark.parametrize("given", [None, 3])
def test_neither_path_nor_engine(given: object) -> None:
    with pytest.raises(EngineError, match=f"a {type(given).__name__} was given(.|\\n)*the folder of an engine"):
        load_engine(given)


def test_opened_engine_can_be_profiled(runner: Runner) -> None:
    found = profile({"dense": runner, "same": runner}, duration_s=0.01, warmup_ms=0, block_ms=1)
    assert [record.status for record in found.records] == ["timed", "timed"]
    assert runner.run(runner.sample_inputs())["output"].shape == (1, 10)  # still open


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="gone does not exist"):
        load_engine(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="holds no engine"):
        load_engine(tmp_path)
    write_artifact(tmp_path / "t", "ticket", {"a": b"b"}, {})
    with pytest.raises(ArtifactError, match=r"the artifact .ticket., not .engine."):
        load_engine(tmp_path / "t")


def test_an_array_where_a_dictionary_of_arrays_belongs(runner: Runner) -> None:
    feeds = runner.sample_inputs(2)
    for out in (np.empty((2, 10), np.float32), [], ()):
        with pytest.raises(EngineError, match=rf"out is a {type(out).__name__}\n(.|\n)*pass {{name: array}}"):
            runner.run(feeds, out)  # type: ignore[arg-type]
    assert runner.run(feeds, {})["output"].shape == (2, 10)


@pytest.mark.parametrize("batch", [0, -1, 257, 10**12, "2", 2.5])
def test_samples_of_no_batch_are_refused_before_they_are_made(runner: Runner, batch: object) -> None:
    with pytest.raises(EngineError, match=rf"batch {batch!r} is outside this engine's range\n  expected: a batch of 1"):
        runner.sample_inputs(batch)  # type: ignore[arg-type]
