"""Running: verified first, equal to the module, strict about inputs, light on imports."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_samples import TinyNet, write_graph
from onnx import helper, numpy_helper

import deploy_sparse
from deploy_sparse.artifact import write_artifact
from deploy_sparse.engine import runner as module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.runner import Runner, load_engine
from deploy_sparse.errors import ArtifactError, EngineError
from deploy_sparse.measure.profile import profile


@pytest.fixture(scope="module")
def runner(built: Engine) -> Runner:
    return load_engine(built)


def test_runs_like_the_module(runner: Runner, tiny: TinyNet) -> None:
    tiny.eval()
    for batch in (1, 3, 256):
        feeds = runner.sample_inputs(batch, seed=batch)
        with torch.no_grad():
            expected = tiny(torch.from_numpy(feeds["input"])).numpy()
        outputs = runner.run(feeds)
        assert list(outputs) == ["output"]
        np.testing.assert_allclose(outputs["output"], expected, atol=1e-5)


def test_folder_file_and_engine_open_alike(built: Engine) -> None:
    assert deploy_sparse.load_engine is load_engine
    for path in (built, built.folder, str(built.folder), built.path, built.folder / "engine.json"):
        with load_engine(path) as runner:
            assert runner.manifest["digest"] == built.manifest["digest"]
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
        def run(self, feeds):
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


def test_closed_runner(built: Engine) -> None:
    runner = load_engine(built)
    feeds = runner.sample_inputs()
    runner.close()
    runner.close()
    with pytest.raises(EngineError, match="is closed"):
        runner.run(feeds)
    with pytest.raises(EngineError, match="is closed"):
        runner.prepare(feeds)


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
    monkeypatch.setattr("deploy_sparse.engine._ort.OrtSession", lambda *_: pytest.fail("a damaged engine was opened"))
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


def test_loading_and_running_imports_neither_torch_nor_onnx(built: Engine) -> None:
    code = (
        "import sys, deploy_sparse; r = deploy_sparse.load_engine(sys.argv[1]); r.run(r.sample_inputs(2)); "
        "r.prepare(r.sample_inputs(2))(); "
        "assert not {'torch', 'onnx', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules), 'heavy import'"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(built.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
