"""Zip bundles: whole, the same every time, rebuilt and proved; and what is refused when one is made."""

from __future__ import annotations

import io
import json
import os
import shutil
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_samples import as_tensorrt, reseal_, rezip, write_graph, write_network
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from deploy_sparse.artifact import sha256_bytes, write_artifact
from deploy_sparse.bundle import bundle_engine, open_bundle
from deploy_sparse.bundle.sample import tolerance_of
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import read_onnx
from deploy_sparse.engine.target import Extents, load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ArtifactError, BuildError, ConfigError, EngineError, MissingDependencyError

MEMBERS = ["README.md", "bundle.json", "model.onnx", "model.onnx.json", "sample.npz", "target.toml"]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_holds_graph_target_manifest_and_sample(engine: Engine, sealed: Path) -> None:
    found = members(sealed)
    assert list(found) == MEMBERS
    assert found["model.onnx"] == (engine.folder / "model.onnx").read_bytes()
    body = json.loads(found["bundle.json"])
    assert body["engine"] == engine.manifest
    assert {name: entry["sha256"] for name, entry in body["files"].items()} == {
        name: sha256_bytes(data) for name, data in found.items() if name != "bundle.json"
    }
    arrays = np.lib.npyio.NpzFile(io.BytesIO(found["sample.npz"]), allow_pickle=False)
    assert arrays["input_0"].shape == (2, 1, 8, 8)
    with engine.open() as runner:
        expected = runner.run({"input": arrays["input_0"]})["output"]
    np.testing.assert_array_equal(arrays["output_0"], expected)
    assert "deploy-sparse bundle --rebuild FILE.zip" in found["README.md"].decode()
    assert engine.manifest["key"] in found["README.md"].decode()


def test_target_file_is_the_target(engine: Engine, sealed: Path, tmp_path: Path) -> None:
    text = members(sealed)["target.toml"]
    (tmp_path / "mine.toml").write_bytes(text)
    assert load_target(tmp_path / "mine.toml") == engine.target
    assert "device" not in tomllib.loads(text.decode())  # a key of PyTorch alone


def test_same_engine_same_bytes_whatever_the_clock_says(
    engine: Engine, sealed: Path, tmp_path: Path, monkeypatch
) -> None:
    copy = Path(shutil.copytree(engine.folder, tmp_path / "elsewhere" / engine.folder.name))
    os.utime(copy / "model.onnx", (1, 1))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    again = bundle_engine(copy, format="zip", out=tmp_path / "other-name.zip")
    assert again.path.read_bytes() == sealed.read_bytes()
    with zipfile.ZipFile(again.path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_verify_runs_the_graph_and_builds_nothing(engine: Engine, sealed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = open_bundle(sealed)
    assert (bundle.name, bundle.target, bundle.manifest) == ("net", engine.target, engine.manifest)
    proof = bundle.verify()
    assert (proof.max_abs, proof.max_rel, proof.top1, proof.rows, proof.why_graph) == (0.0, 0.0, 1.0, 2, None)
    assert proof.tolerance == 1e-4
    assert str(proof).startswith("the ONNX graph on this CPU computes the parity sample: max|Δ| 0, 0 of the largest")
    assert list(tmp_path.iterdir()) == []


def test_rebuilds_the_very_same_engine(engine: Engine, sealed: Path, tmp_path: Path) -> None:
    done = open_bundle(sealed).rebuild(tmp_path / "out")
    assert done.engine.manifest["key"] == engine.manifest["key"]
    assert done.engine.folder.name == engine.folder.name
    assert done.proof.subject == "the engine for cpu"
    assert done.proof.max_abs == 0.0
    assert open_entry(done.engine.folder).manifest["macs"] == engine.manifest["macs"]
    again = open_bundle(sealed).rebuild(tmp_path / "out")
    assert again.engine.cached
    assert again.proof == done.proof


def test_rebuilds_for_another_target_and_other_batches(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.toml").write_text('inherits = "cpu"\nthreads = 2\nbatch = { min = 5, opt = 8, max = 9 }\n')
    done = open_bundle(sealed).rebuild(tmp_path / "out", target=tmp_path / "wide.toml", name="wide")
    assert done.engine.folder.name.startswith("wide-wide-")
    assert done.engine.batch_range == (5, 9)
    assert done.proof.rows == 5  # the sample's two rows, repeated
    assert done.proof.max_rel < 1e-5


def test_an_engine_that_does_not_run_here_is_proved_by_its_graph(sealed: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: None)
    done = open_bundle(sealed).rebuild(tmp_path, target="rtx-sm89")
    assert done.engine.path.name == "model.engine"
    assert done.proof.subject == "the ONNX graph on this CPU"
    assert "the engine itself was not run: compiled, not timed here: no NVIDIA GPU" in str(done.proof)


def forged(sealed: Path, target: Path) -> Path:
    """A bundle whose sample says something else, with every hash made to fit."""

    def lie(found: dict[str, bytes]) -> None:
        with zipfile.ZipFile(io.BytesIO(found["sample.npz"])) as archive:
            arrays = {name: archive.read(name) for name in archive.namelist()}
        arrays["output_0.npy"] = arrays["output_0.npy"][:-4] + np.float32(7).tobytes()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in arrays.items():
                archive.writestr(name, data)
        found["sample.npz"] = stream.getvalue()
        reseal_(found)

    return rezip(sealed, target, lie)


def test_an_engine_that_computes_something_else_is_removed(sealed: Path, tmp_path: Path) -> None:
    bundle = open_bundle(forged(sealed, tmp_path / "forged.zip"))
    with pytest.raises(EngineError, match=r"^the ONNX graph on this CPU differs from the parity sample by [\d.]+ of"):
        bundle.verify()
    with pytest.raises(
        EngineError, match=r"the engine for cpu differs from the parity sample by .*\n  expected: at most 0.0001"
    ):
        bundle.rebuild(tmp_path / "out")
    assert not list((tmp_path / "out").glob("net-*"))
    kept = open_bundle(sealed).rebuild(tmp_path / "out").engine
    with pytest.raises(EngineError, match="the engine for cpu differs"):
        bundle.rebuild(tmp_path / "out")
    assert open_entry(kept.folder) == kept  # it was there before


def test_a_graph_that_names_a_file_of_this_machine_as_its_weights(sealed: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(144))

    def steal(found: dict[str, bytes]) -> None:
        model = onnx.load_model_from_string(found["model.onnx"])
        (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "conv.weight"]
        set_external_data(weight, str(secret), 0, 144)
        weight.ClearField("raw_data")
        found["model.onnx"] = model.SerializeToString()
        del found["model.onnx.json"]
        reseal_(found)

    bundle = open_bundle(rezip(sealed, tmp_path / "thief.zip", steal))
    for use in (bundle.verify, lambda: bundle.rebuild(tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"keeps weight 'conv.weight' in '.*secret.bin'"):
            use()
    assert not list(tmp_path.glob("out/net-*"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """The network with its weights in a second file."""
    model, file = onnx.load(str(write_network(tmp_path / "whole.onnx"))), tmp_path / "net.onnx"
    onnx.save(model, str(file), save_as_external_data=True, location="net.weights", size_threshold=0)
    return file


def test_weights_in_a_file_of_their_own_travel(engine: Engine, outside: Path, tmp_path: Path) -> None:
    weights = outside.with_name("net.weights").read_bytes()
    facts = json.dumps(read_onnx(outside).sidecar()).encode()
    payload = {"model.onnx": outside.read_bytes(), "model.onnx.json": facts, "net.weights": weights}
    body = {key: value for key, value in engine.manifest.items() if key not in ("digest", "files")}
    write_artifact(tmp_path / "made", "engine", payload, {**body, "weights": ["net.weights"]})
    path = bundle_engine(tmp_path / "made", format="zip", out=tmp_path / "net.zip").path
    assert members(path)["net.weights"] == weights
    assert open_bundle(path).verify().max_abs == 0.0
    model = bundle_engine(tmp_path / "made", format="triton", out=tmp_path / "models").path
    assert (model / "1" / "net.weights").read_bytes() == weights


def test_weights_in_a_file_of_their_own_are_built_again(outside: Path, tmp_path: Path) -> None:
    engine = build_engine(outside, "cpu", out=tmp_path / "out", name="net")
    path = bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path
    done = open_bundle(path).rebuild(tmp_path / "again")
    assert (done.engine.folder / "net.weights").read_bytes() == outside.with_name("net.weights").read_bytes()
    assert done.proof.max_abs == 0.0


def test_a_file_that_changes_after_it_was_opened_is_not_used(sealed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sealed, tmp_path / "net.zip"))
    bundle = open_bundle(path)
    forged(sealed, path)
    with pytest.raises(ArtifactError, match=r"its (bundle|sample).*(bytes, not|was altered)"):
        bundle.rebuild(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_own_inputs_and_tolerance(engine: Engine, tmp_path: Path) -> None:
    mine = np.full((3, 1, 8, 8), 0.5, np.float32)
    path = bundle_engine(engine, format="zip", out=tmp_path / "a.zip", sample={"input": mine}, tolerance=0.5).path
    proof = open_bundle(path).rebuild(tmp_path / "out").proof
    assert (proof.rows, proof.tolerance) == (3, 0.5)
    with pytest.raises(EngineError, match="input 'input' has dtype float64"):
        bundle_engine(engine, format="zip", out=tmp_path / "b.zip", sample={"input": mine.astype(float)})
    with pytest.raises(EngineError, match=r"output 'output' has NaN or infinite entries on the sample"):
        bundle_engine(engine, format="zip", out=tmp_path / "b.zip", sample={"input": mine * np.float32(np.inf)})
    for value in (-1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"^tolerance "):
            bundle_engine(engine, format="zip", out=tmp_path / "b.zip", tolerance=value)
    assert not (tmp_path / "b.zip").exists()


def test_dynamic_axes_travel(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx", shape=("batch", 1, "height", 8))
    axes = {"height": Extents(min=8, opt=12, max=16)}
    target = load_target("cpu").model_copy(update={"axes": axes, "name": "tall"})
    engine = build_engine(file, target, out=tmp_path / "out", name="net")
    bundle = open_bundle(bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path)
    assert bundle.target == target
    assert bundle.rebuild(tmp_path / "again").engine.axes == {"height": {"min": 8, "opt": 12, "max": 16}}
    short = target.model_copy(update={"axes": {"height": Extents(min=8, opt=8, max=9)}})
    with pytest.raises(ConfigError, match="takes 8 to 9 for height, and the parity sample has 12"):
        bundle.rebuild(tmp_path / "short", target=short)
    assert not (tmp_path / "short").exists()


def test_tensors_without_a_batch_axis_and_of_whole_numbers(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Shape", ["a"], ["size"])]
    kinds = {"a": TensorProto.INT64, "b": TensorProto.INT64, "sum": TensorProto.INT64, "size": TensorProto.INT64}
    file = write_graph(
        tmp_path / "n.onnx", nodes, {"a": ("batch", 3), "b": (3,)}, {"sum": ("batch", 3), "size": (2,)}, kinds=kinds
    )
    engine = build_engine(file, "cpu", out=tmp_path / "out")
    bundle = open_bundle(bundle_engine(engine, format="zip", out=tmp_path / "n.zip").path)
    assert bundle.rebuild(tmp_path / "again").proof.max_abs == 0.0


def test_the_compiled_engine_stays_behind(engine: Engine, tmp_path: Path) -> None:
    made = as_tensorrt(engine, tmp_path / "trt")
    path = bundle_engine(made, format="zip", out=tmp_path / "net.zip").path
    assert list(members(path)) == MEMBERS
    assert open_bundle(path).target.runtime == "tensorrt"
    with pytest.raises(
        (MissingDependencyError, BuildError), match=r"tensorrt is not installed|this machine, which has none"
    ):
        open_bundle(path).rebuild(tmp_path / "out")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ({"built": "fp32", "tf32": False}, 1e-4),
        ({"built": "fp32", "tf32": True}, 2**-6),
        ({"built": "fp16 + fp32"}, 2**-6),
        ({"built": "bf16"}, 2**-3),
        ({"built": "fp32 + int8"}, 2**-3),
        ({"built": "fp8 + fp32"}, 2**-2),
        ({"built": "something new"}, 2**-2),
    ],
)
def test_tolerance_is_that_of_the_coarsest_format(precision: dict, expected: float) -> None:
    assert tolerance_of(precision) == expected


def test_an_altered_engine_is_not_bundled(engine: Engine, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engine.folder, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx").write_bytes(data)
    for format, out in (("zip", "net.zip"), ("triton", "models")):
        with pytest.raises(ArtifactError, match=r"model.onnx is damaged: its SHA-256 is"):
            bundle_engine(copy, format=format, out=tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_file_swapped_while_it_is_copied_is_noticed(engine: Engine, tmp_path: Path, monkeypatch) -> None:
    from deploy_sparse.bundle import sealed as module

    copy = Path(shutil.copytree(engine.folder, tmp_path / "copy"))

    def swapping(found: Engine, given: object):
        (copy / "model.onnx.json").write_bytes(b"x" * (copy / "model.onnx.json").stat().st_size)
        return sample(found, given)

    sample = module._sample
    monkeypatch.setattr(module, "_sample", swapping)
    with pytest.raises(ArtifactError, match=r"model.onnx.json changed while it was being bundled"):
        bundle_engine(copy, format="zip", out=tmp_path / "out" / "net.zip")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone does not exist\n  expected: a folder with engine.json in it"):
        bundle_engine(tmp_path / "gone", format="zip", out=tmp_path / "net.zip")
    with pytest.raises(ArtifactError, match="holds no engine"):
        bundle_engine(tmp_path, format="triton", out=tmp_path / "models")
    with pytest.raises(EngineError, match="a Target was given"):
        bundle_engine(load_target("cpu"), format="zip", out=tmp_path / "net.zip")  # type: ignore[arg-type]


def test_what_exists_is_never_overwritten(engine: Engine, sealed: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.zip"
    path.write_bytes(b"mine")
    with pytest.raises(
        ArtifactError, match=r"net.zip already exists with other content\n  expected: a name that is free"
    ):
        bundle_engine(engine, format="zip", out=path)
    assert path.read_bytes() == b"mine"
    shutil.copy(sealed, path)
    bundle_engine(engine, format="zip", out=path)  # the very same bytes are no conflict
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(ArtifactError, match=r"folder.zip is a folder"):
        bundle_engine(engine, format="zip", out=tmp_path / "folder.zip")
    with pytest.raises(ArtifactError, match="cannot be written"):
        bundle_engine(engine, format="zip", out=path / "below.zip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.zip", "net.zip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "tritn"},
            "unknown format 'tritn'\n  expected: one of triton, zip\n  next step: did you mean 'triton'?",
        ),
        (
            {"format": "zip", "out": "net.tar"},
            "out is 'net.tar'\n  expected: a file ending in .zip\n  next step: take net.tar.zip",
        ),
        ({"format": "zip", "labels": ["a"]}, "labels with format 'zip'"),
        ({"format": "zip", "name": "x"}, "name with format 'zip'"),
        ({"format": "triton", "tolerance": 0.1}, "tolerance with format 'triton'"),
        ({"format": "triton", "name": "../up"}, "model name '../up'"),
    ],
)
def test_options_that_do_not_fit(engine: Engine, tmp_path: Path, monkeypatch, options: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        bundle_engine(engine, **{"out": "net.zip", **options})
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(engine: Engine, tmp_path: Path, monkeypatch) -> None:
    from deploy_sparse.bundle import placing

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(placing.os, "fsync", full)
    for format, out in (("zip", "out/net.zip"), ("triton", "models")):
        with pytest.raises(ArtifactError, match="No space left on device"):
            bundle_engine(engine, format=format, out=tmp_path / out)
    assert [path for path in tmp_path.rglob("*") if path.name not in ("out", "models")] == []
