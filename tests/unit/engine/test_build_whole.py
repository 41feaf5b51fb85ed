"""Building with everything around it: progress, stopping, waiting for others, weights in other files, quick finds."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_samples import make_tiny

from deploy_sparse.engine import backends
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.onnx import export as export_module
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.store import read_store
from deploy_sparse.engine.watch import Progress
from deploy_sparse.errors import ArtifactError, BuildError

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
BUILDER = """
import sys
from deploy_sparse.engine import build
from deploy_sparse.engine.build import build_engine
import deploy_sparse.engine.onnx.runtime, onnx.checker
real = build._compile
def counted(*given):
    print("compiled", end=" ")
    return real(*given)
build._compile = counted
print("ready", flush=True)
sys.stdin.readline()
print(build_engine(sys.argv[1], "cpu", out=sys.argv[2]).cached)
"""


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)


@pytest.fixture
def foreign(exported: OnnxFile, tmp_path: Path) -> Path:
    path = tmp_path / "foreign" / "net.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(exported.path), path, save_as_external_data=True, location="net.bin", size_threshold=100)
    return path


def test_progress_of_a_build(exported: OnnxFile, rtx, tmp_path: Path) -> None:
    seen: list[Progress] = []
    build_engine(exported, "rtx-sm89", out=tmp_path, progress=seen.append)
    assert (seen[0].fraction, seen[-1].fraction) == (0, 1)
    assert len(seen) > 20


@pytest.mark.parametrize("how", [{"cancel": lambda: True}, {"time_limit_s": 1e-9}])
@pytest.mark.parametrize("target", ["cpu", "rtx-sm89"])
def test_a_stopped_build_leaves_nothing(exported: OnnxFile, rtx, tmp_path: Path, how, target: str) -> None:
    with pytest.raises(BuildError, match=r"was cancelled|took longer than its limit"):
        build_engine(exported, target, out=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_cancelled_in_the_compiler(exported: OnnxFile, rtx, tmp_path: Path) -> None:
    stop = threading.Event()
    with pytest.raises(BuildError, match="the build was cancelled"):
        build_engine(exported, "rtx-sm89", out=tmp_path / "out", progress=lambda _: stop.set(), cancel=stop)
    assert not (tmp_path / "out").exists()


def test_processes_build_one_key_once(exported: OnnxFile, tmp_path: Path) -> None:
    words = [sys.executable, "-c", BUILDER, str(exported.path), str(tmp_path)]
    builders = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    assert sorted(builder.communicate()[0] for builder in builders) == ["True\n", "True\n", "compiled False\n"]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_file_is_found_without_reading_its_graph(
    exported: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_engine(exported.path, "cpu", out=tmp_path)
    monkeypatch.setattr(backends, "onnx_of", lambda *_: pytest.fail("the graph was read"))
    again = build_engine(exported.path, "cpu", out=tmp_path)
    assert again.cached
    assert again.manifest == first.manifest
    data = bytearray(first.path.read_bytes())
    data[-1] ^= 1
    first.path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        build_engine(exported.path, "cpu", out=tmp_path)


def results(engine: Engine) -> np.ndarray:
    with load_engine(engine) as runner:
        return runner.run({"input": X.numpy()})["output"]


def test_weights_in_another_file_are_part_of_the_entry(foreign: Path, built: Engine, tmp_path: Path) -> None:
    engine = build_engine(foreign, "cpu", out=tmp_path / "out")
    assert engine.weights == ("net.bin",)
    assert {*engine.manifest["files"]} == {"model.onnx", "model.onnx.json", "net.bin"}
    again = build_engine(foreign, "cpu", out=tmp_path / "out")
    assert again.cached
    data = bytearray((foreign.parent / "net.bin").read_bytes())
    data[0] ^= 1
    (foreign.parent / "net.bin").write_bytes(data)
    other = build_engine(foreign, "cpu", out=tmp_path / "out")
    assert other.folder != engine.folder
    for path in foreign.parent.iterdir():
        path.unlink()
    assert np.array_equal(results(engine), results(built))
    rebuilt = build_engine(engine.path, "cpu", out=tmp_path / "out")
    assert rebuilt.cached
    assert rebuilt.folder == engine.folder
    assert {entry.state for entry in read_store(tmp_path / "out").entries} == {"good"}


def test_weights_in_another_file_reach_tensorrt(foreign: Path, rtx, tmp_path: Path) -> None:
    engine = build_engine(foreign, "rtx-sm89", out=tmp_path / "out")
    assert {*engine.manifest["files"]} == {"model.engine", "model.onnx", "model.onnx.json", "net.bin"}
    assert read_onnx(engine.folder / "model.onnx").weights


def test_a_module_above_the_limit(built: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "SIZE_LIMIT", 1000)
    engine = build_engine(make_tiny(), "cpu", X, tmp_path)
    assert engine.weights == ("model.onnx.data",)
    assert np.allclose(results(engine), results(built), rtol=0, atol=1e-6)
    assert build_engine(make_tiny(), "cpu", X, tmp_path).cached
