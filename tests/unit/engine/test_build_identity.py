"""When two builds are the same build, when a file is not what is said of it, and what is said before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_samples import write_graph
from onnx import helper, numpy_helper
from precision_samples import exported_network, images

from deploy_sparse.artifact import sha256_file
from deploy_sparse.cli.main import main
from deploy_sparse.engine import backends
from deploy_sparse.engine.build import build_engine, require_runtime
from deploy_sparse.engine.onnx.file import OnnxFile, sidecar_path
from deploy_sparse.engine.target import in_precision, load_target
from deploy_sparse.errors import ArtifactError, BuildError


def test_the_order_of_excluded_layers_is_no_other_engine(tmp_path: Path) -> None:
    first = in_precision(load_target("cpu"), "fp16", ("head", "layer1"))
    second = in_precision(load_target("cpu"), "fp16", ("layer1", "head"))
    assert first.digest == second.digest
    assert first.digest != in_precision(load_target("cpu"), "fp16", ("head",)).digest
    build = {"out": tmp_path, "precision": "fp16", "calibration": images()}
    names = [node.name for node in onnx.load(exported_network("resnet").path).graph.node if node.op_type == "Conv"]
    made = build_engine(exported_network("resnet"), "cpu", exclude=names[:2], **build)
    again = build_engine(exported_network("resnet"), "cpu", exclude=names[1::-1], **build)
    assert (again.cached, again.folder) == (True, made.folder)


def test_a_pattern_given_twice_is_one() -> None:
    target = in_precision(load_target("cpu"), "fp16", ("head", "stem", "head"))
    assert target.exclude == ("head", "stem")
    assert in_precision(target, None, "stem") == target


@pytest.mark.parametrize("damage", ["other file", "no digest", "no JSON"])
def test_a_file_that_its_sidecar_contradicts_is_no_cache_hit(exported: OnnxFile, tmp_path: Path, damage: str) -> None:
    alone = Path(shutil.copy(exported.path, tmp_path / "alone.onnx"))
    model = onnx.load(alone)
    model.producer_name = "somebody"
    onnx.save(model, alone)
    assert not build_engine(alone, "cpu", out=tmp_path / "out").cached
    beside = Path(shutil.copy(alone, tmp_path / "beside.onnx"))
    assert build_engine(beside, "cpu", out=tmp_path / "out").cached  # the very same bytes
    text = sidecar_path(exported.path).read_text()
    if damage == "no digest":
        text = text.replace(exported.sha256, sha256_file(beside))
    sidecar_path(beside).write_text("{" if damage == "no JSON" else text)
    with pytest.raises(ArtifactError, match=r"beside\.onnx(\.json)? "):
        build_engine(beside, "cpu", out=tmp_path / "out")
    shutil.copy(exported.path, beside)
    sidecar_path(beside).write_text(sidecar_path(exported.path).read_text())
    build_engine(beside, "cpu", out=tmp_path / "out")
    assert build_engine(beside, "cpu", out=tmp_path / "out").cached  # with a sidecar that fits


def test_bf16_for_the_cpu_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "onnx_of", lambda *_: pytest.fail("it was exported first"))
    target = in_precision(load_target("cpu"), "bf16")
    with pytest.raises(BuildError, match=r"'cpu-bf16' is in bf16, for which ONNX Runtime has no kernels") as caught:
        build_engine(exported_network("resnet"), target, out=tmp_path / "out")
    assert "build in fp32, fp16 or int8" in caught.value.fix
    with pytest.raises(BuildError, match="no kernels on the CPU"):
        require_runtime(target)
    assert not (tmp_path / "out").exists()


def test_size_of_an_engine_whose_weights_are_in_a_second_file(tmp_path: Path, capsys) -> None:
    weight = numpy_helper.from_array(np.ones((4, 300), np.float32), "w")
    node = helper.make_node("MatMul", ["input", "w"], ["output"])
    file = write_graph(tmp_path / "whole.onnx", [node], out_shape=("n", 300), initializers=(weight,))
    outside = tmp_path / "net.onnx"
    onnx.save(onnx.load(file), outside, save_as_external_data=True, location="net.bin", size_threshold=0)
    engine = build_engine(outside, "cpu", out=tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in engine.folder.iterdir()}
    assert engine.bytes == engine.manifest["bytes"] == sizes["model.onnx"] + sizes["net.bin"]
    assert sizes["net.bin"] == 4800
    assert main(["build", str(outside), "--out", str(tmp_path / "out")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bytes")]
    assert line.split() == ["bytes", str(engine.bytes)]


def test_calibration_and_comparison_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    data = [images(8, seed=seed) for seed in range(3)]
    build_engine(
        exported_network("resnet"), "cpu", out=tmp_path, precision="int8", calibration=data,
        progress=lambda step: told.append(step.what) or str(step),
    )  # fmt: skip
    for what in ("calibrating", "comparing int8 with fp32"):
        found = [line for line in told if line.startswith(what)]
        assert list(dict.fromkeys(found)) == [f"{what}, batch {index} of 3" for index in (1, 2, 3)]
    assert told.index("calibrating, batch 3 of 3") < told.index("comparing int8 with fp32, batch 1 of 3")


def test_progress_may_stop_a_calibration(tmp_path: Path) -> None:
    def progress(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            exported_network("resnet"), "cpu", out=tmp_path, precision="int8", calibration=images(), progress=progress
        )
    assert not list(tmp_path.iterdir())
