"""ONNX files with weights in other files: taken from foreign tools, written above a limit, refused where they mislead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_samples import make_tiny, write_graph
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.artifact import write_artifact
from deploy_sparse.engine.collect import collect
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx import export as export_module
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.engine.onnx.external import all_tensors, is_outside
from deploy_sparse.engine.onnx.file import OnnxFile, float_types, parse_graph, read_onnx, sidecar_path
from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.engine.source import identity_of_file, payload_of
from deploy_sparse.engine.store import read_store
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt.bindings import compile_onnx
from deploy_sparse.errors import ArtifactError, BuildError, ExportError

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def foreign(exported: OnnxFile, tmp_path: Path) -> Path:
    """The small network as another tool writes it: every weight in one file beside it, no sidecar."""
    path = tmp_path / "foreign" / "net.onnx"
    path.parent.mkdir()
    model = onnx.load(exported.path)
    onnx.save(model, path, save_as_external_data=True, location="net.bin", size_threshold=0)
    return path


def edited(path: Path, **changes: str) -> Path:
    """Other entries in the external data of the first tensor."""
    model = onnx.load(path, load_external_data=False)
    entries = {e.key: e for e in next(t for t in model.graph.initializer if is_outside(t)).external_data}
    for key, value in changes.items():
        entries[key].value = value
    path.write_bytes(model.SerializeToString())
    return path


def test_foreign_file_is_read_with_its_weights(foreign: Path, exported: OnnxFile) -> None:
    found = read_onnx(foreign)
    (file,) = found.weights
    content = (foreign.parent / "net.bin").read_bytes()
    assert (file.name, file.bytes) == ("net.bin", len(content))
    assert bytes(found.read_weights()["net.bin"]) == content
    assert (found.inputs, found.outputs, found.parameters) == (
        exported.inputs,
        exported.outputs,
        read_onnx_alone(exported).parameters,
    )
    assert float_types(parse_graph(foreign, found.read())) == {"float32"}
    assert exported.identity == exported.sha256
    assert found.identity not in (found.sha256, exported.sha256)


def read_onnx_alone(exported: OnnxFile) -> OnnxFile:
    path = exported.path.with_name("alone.onnx")
    shutil.copy(exported.path, path)
    return read_onnx(path)


def test_weights_make_the_identity(foreign: Path) -> None:
    first = read_onnx(foreign)
    data = bytearray((foreign.parent / "net.bin").read_bytes())
    data[0] ^= 1
    (foreign.parent / "net.bin").write_bytes(data)
    second = read_onnx(foreign)
    assert first.sha256 == second.sha256
    assert first.identity != second.identity
    assert identity_of_file(second) == second.identity
    assert identity_of_file(foreign) == identity_of_file(str(foreign)) == second.sha256  # which is no engine's
    with pytest.raises(ArtifactError, match=r"net\.bin is damaged"):
        identity_of_file(first)
    with pytest.raises(ArtifactError, match=r"net\.bin is damaged"):
        first.read_weights()


def test_identity_without_reading_the_graph(exported: OnnxFile, tmp_path: Path) -> None:
    assert identity_of_file(exported.path) == identity_of_file(exported) == exported.sha256
    assert identity_of_file(tmp_path / "gone.onnx") is None
    assert identity_of_file(make_tiny()) is None
    assert identity_of_file(tmp_path) is None
    assert identity_of_file("\0") is None


def test_sidecar_knows_the_weights(foreign: Path) -> None:
    found = read_onnx(foreign)
    sidecar_path(foreign).write_text(json.dumps(found.sidecar()))
    assert read_onnx(foreign) == found
    with open(foreign.parent / "net.bin", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match=r"net\.bin is damaged"):
        read_onnx(foreign)
    (foreign.parent / "net.bin").unlink()
    with pytest.raises(ArtifactError, match=r"keeps weights in net\.bin, which is missing"):
        read_onnx(foreign)


@pytest.mark.parametrize("name", ["../net.bin", "/etc/passwd", "sub/net.bin", "C:\\net.bin", "..", ".", "", "net.onnx"])
def test_weights_elsewhere_are_refused(foreign: Path, name: str) -> None:
    shutil.copy(foreign.parent / "net.bin", foreign.parent.parent / "net.bin")
    (foreign.parent / "sub").mkdir()
    shutil.copy(foreign.parent / "net.bin", foreign.parent / "sub" / "net.bin")
    with pytest.raises(ArtifactError) as caught:
        read_onnx(edited(foreign, location=name))
    assert f"in {name!r}" in caught.value.given
    assert caught.value.expected == "a file of another name in the same folder"


def test_a_link_is_refused(foreign: Path) -> None:
    shutil.move(foreign.parent / "net.bin", foreign.parent.parent / "secret")
    (foreign.parent / "net.bin").symlink_to("../secret")
    with pytest.raises(ArtifactError, match=r"in net\.bin, which is a link"):
        read_onnx(foreign)


def test_a_path_in_a_sidecar_is_refused(foreign: Path) -> None:
    found = read_onnx(foreign)
    body = {**found.sidecar(), "weights": [{"name": "../net.bin", "bytes": 1, "sha256": "0" * 64}]}
    del body["digest"]
    from deploy_sparse.artifact import digest_of

    sidecar_path(foreign).write_text(json.dumps({**body, "digest": digest_of(body)}))
    with pytest.raises(ArtifactError, match=r"names the file '\.\./net\.bin', which is not in its folder"):
        read_onnx(foreign)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_weights_are_named(foreign: Path, keep: float) -> None:
    data = (foreign.parent / "net.bin").read_bytes()
    (foreign.parent / "net.bin").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(
        ArtifactError, match=r"net\.bin is too short for weight '.+' of net\.onnx: that ends at byte \d+"
    ):
        read_onnx(foreign)


def test_missing_weights_are_named(foreign: Path) -> None:
    (foreign.parent / "net.bin").unlink()
    with pytest.raises(ArtifactError, match=r"net\.onnx keeps weights in net\.bin, which is missing"):
        read_onnx(foreign)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"offset": "-4"}, "is too short"),
        ({"offset": "99999999999999999999"}, "is too short"),
        ({"offset": "one"}, "does not say where"),
        ({"length": "3"}, "gives weight '.+' 3 bytes"),
        ({"length": "-1"}, "gives weight '.+' -1 bytes"),
        ({"length": "99999999999999999999"}, "gives weight '.+' 99999999999999999999 bytes"),
    ],
)
def test_places_that_cannot_be_right(foreign: Path, changes: dict[str, str], text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        read_onnx(edited(foreign, **changes))


def test_many_weights_small_and_large(tmp_path: Path) -> None:
    """Small ones are read with the graph, large ones stay where they are; all of them are in the same file."""
    sizes = [3, 40_000, 7, 16_384, 16_383, 1, 20_000] * 6
    weights = tuple(numpy_helper.from_array(np.full(size, i, np.float32), f"w{i}") for i, size in enumerate(sizes))
    nodes, last = [], "input"
    for index in range(len(sizes)):
        nodes.append(helper.make_node("ReduceMax", [f"w{index}"], [f"m{index}"], keepdims=0))
        nodes.append(helper.make_node("Add", [last, f"m{index}"], [last := f"s{index}"]))
    nodes.append(helper.make_node("Identity", [last], ["output"]))
    path = write_graph(tmp_path / "x.onnx", nodes, initializers=weights)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = read_onnx(path)
    assert found.parameters == sum(sizes)
    model = parse_graph(path, found.read())
    assert [int(np.prod(t.dims)) for t in model.graph.initializer if is_outside(t)] == [s for s in sizes if s > 16_383]
    assert len(model.graph.initializer) == len(sizes)
    session = OrtSession(found.read(), folder=tmp_path)
    assert session.run({"input": np.zeros((1, 4), np.float32)})["output"][0, 0] == sum(range(len(sizes)))


def test_nan_in_another_file_is_found(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.array([1, 2, np.nan, 4], np.float16), "w")
    add = helper.make_node("Add", ["input", "w"], ["output"])
    path = write_graph(tmp_path / "x.onnx", [add], initializers=(weight,), dtype=TensorProto.FLOAT16)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(ArtifactError, match="has NaN in weight 'w'"):
        read_onnx(path)


def test_constants_and_branches_count_too(tmp_path: Path) -> None:
    """External data hides in attributes of nodes and in branches as well."""
    value = numpy_helper.from_array(np.ones(4, np.float32), "w")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=value)],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, (4,))],
    )
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True), "y")),
        helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["input", "c"], ["output"]),
    ]
    path = write_graph(tmp_path / "x.onnx", nodes)
    model = onnx.load(path)
    hidden = [tensor for tensor in all_tensors(model) if tensor.name == "w"]
    assert len(hidden) == 2
    onnx.external_data_helper.set_external_data(hidden[0], "../../secret")
    hidden[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"keeps weight 'w' in '\.\./\.\./secret'"):
        read_onnx(path)


# Runtimes find the weights


def test_onnx_runtime_finds_them(foreign: Path, exported: OnnxFile) -> None:
    # ONNX Runtime wants shapes in the graph itself
    (foreign.parent / "net.bin").unlink()
    onnx.save(onnx.load(exported.path), foreign, save_as_external_data=True, location="net.bin", size_threshold=100)
    assert read_onnx(foreign).weights
    feeds = {"input": X.numpy()}
    expected = OrtSession(exported.read()).run(feeds)["output"]
    assert np.array_equal(OrtSession(foreign.read_bytes(), folder=foreign.parent).run(feeds)["output"], expected)


def test_tensorrt_finds_them(foreign: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    target, found = load_target("rtx-sm89"), read_onnx(foreign.relative_to(tmp_path))
    compiled = compile_onnx(found.read(), target, found.inputs, path=found.path)
    assert len(compiled.plan) > 1000
    assert compiled.float_types == {"float32"}
    with pytest.raises(BuildError, match="does not accept the graph for 'rtx-sm89': Failed to import initializer"):
        compile_onnx(found.read(), target, found.inputs)


# Entries hold them


def entry_of(source: OnnxFile, built: Engine, folder: Path) -> Path:
    own = ("key", "digest", "files")
    body = {**{k: v for k, v in built.manifest.items() if k not in own}, "key": source.identity}
    body["weights"] = [file.name for file in source.weights]
    write_artifact(folder, "engine", payload_of(source, source.read()), body)
    return folder


def test_an_entry_holds_the_weights_and_can_be_read_again(foreign: Path, built: Engine, tmp_path: Path) -> None:
    source = read_onnx(foreign)
    folder = entry_of(source, built, tmp_path / "store" / "tiny-cpu-0123456789ab")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.json", "net.bin", "engine.json"}
    engine = open_entry(folder)
    assert engine.weights == ("net.bin",)
    assert built.weights == ()
    again = read_onnx(engine.path)
    assert (again.identity, again.weights) == (source.identity, source.weights)
    (found,) = read_store(folder.parent).entries
    assert (found.state, found.strangers) == ("good", ())
    data = bytearray((folder / "net.bin").read_bytes())
    data[-1] ^= 1
    (folder / "net.bin").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"net\.bin is damaged"):
        open_entry(folder)


@pytest.mark.parametrize("state", ["damaged", "unfinished"])
def test_gc_knows_whose_the_weights_are(foreign: Path, built: Engine, tmp_path: Path, state: str) -> None:
    name = "tiny-cpu-0123456789ab" if state == "damaged" else ".tmp-tiny-cpu-0123456789ab-1-00000000"
    folder = entry_of(read_onnx(foreign), built, tmp_path / "store" / name)
    (folder / "engine.json").unlink()
    (found,) = read_store(folder.parent).entries
    assert (found.state, found.strangers) == (state, ())
    (folder / "model.onnx.json").write_text((folder / "model.onnx.json").read_text().replace("net.bin", "notes.txt"))
    (folder / "notes.txt").write_text("precious")
    (found,) = read_store(folder.parent).entries
    assert found.strangers == ("net.bin", "notes.txt")
    (verdict,) = collect(folder.parent).verdicts
    assert "it holds what is not the engine's: net.bin, notes.txt" in verdict.left


def test_weights_in_the_name_of_an_entrys_own_file(foreign: Path) -> None:
    (foreign.parent / "net.bin").rename(foreign.parent / "engine.json")
    model = onnx.load(foreign, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "engine.json"
    foreign.write_bytes(model.SerializeToString())
    found = read_onnx(foreign)
    with pytest.raises(BuildError, match=r"keeps weights in a file called engine\.json"):
        payload_of(found, found.read())


def test_files_without_external_weights_stay_as_they_were(exported: OnnxFile) -> None:
    assert "weights" not in exported.sidecar()
    payload = payload_of(exported, exported.read())
    assert [*payload] == ["model.onnx", "model.onnx.json"]
    assert json.loads(bytes(payload["model.onnx.json"])) == exported.sidecar()


# Exports above the limit


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "SIZE_LIMIT", 1000)


def test_export_above_the_limit(exported: OnnxFile, small_limit, tmp_path: Path) -> None:
    path = tmp_path / "out" / "big.onnx"
    found = export_onnx(make_tiny(), X, path)
    names = {"big.onnx", "big.onnx.data", "big.onnx.json"}
    assert {file.name for file in path.parent.iterdir()} == names
    assert [file.name for file in found.weights] == ["big.onnx.data"]
    assert read_onnx(path) == found
    assert (found.parameters, found.macs) == (exported.parameters, exported.macs)
    assert found.parity is not None
    assert found.parity.max_rel < 1e-5
    assert path.stat().st_size < exported.path.stat().st_size
    feeds = {"input": X.numpy()}
    assert np.array_equal(
        OrtSession(found.read(), folder=path.parent).run(feeds)["output"],
        OrtSession(exported.read()).run(feeds)["output"],
    )
    outside = [tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer if is_outside(tensor)]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in outside]
    assert places
    assert all(int(place["offset"]) % 4096 == 0 for place in places)


def test_export_above_the_limit_repeats_its_bytes_and_replaces(small_limit, tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    first = export_onnx(make_tiny(), X, path)
    other = export_onnx(make_tiny(1), X, path)
    assert other.weights != first.weights
    assert read_onnx(path) == other
    assert export_onnx(make_tiny(), X, path) == first
    assert {file.name for file in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data", "big.onnx.json"}


def test_failed_export_above_the_limit_keeps_the_old_files(small_limit, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "big.onnx"
    kept = export_onnx(make_tiny(), X, path)
    network = make_tiny(1)
    network.head.weight.data[0, 0] = float("nan")
    with pytest.raises((ExportError, ArtifactError), match="NaN"):
        export_onnx(network, X, path)
    assert read_onnx(path) == kept
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be"):
        export_onnx(make_tiny(), X, tmp_path / "file" / "x.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data", "big.onnx.json", "file"}
