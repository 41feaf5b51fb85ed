"""Building: one entry per key, verified on every use; what cannot be built says why and changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_samples import make_tiny, write_graph
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.artifact import read_artifact
from deploy_sparse.engine import build as module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.target import Target, load_target
from deploy_sparse.errors import ArtifactError, BuildError, ConfigError, EngineError


def relu(path: Path, **graph) -> Path:
    return write_graph(path, [helper.make_node("Relu", ["input"], ["output"], name="act")], **graph)


def test_entry_and_manifest(built: Engine, exported: OnnxFile) -> None:
    manifest = built.manifest
    assert built.folder.name == f"tiny-cpu-{manifest['key'][:12]}"
    assert built.path == built.folder / "model.onnx"
    assert built.path.read_bytes() == exported.read()
    assert not built.cached
    assert built.target == load_target("cpu")
    assert built.runnable() is None
    assert manifest["onnx_sha256"] == exported.sha256
    assert manifest["target"]["name"] == "cpu"
    assert manifest["target_digest"] == built.target.digest
    assert manifest["runtime"]["name"] == "onnxruntime"
    assert manifest["batch"] == {"min": 1, "opt": 1, "max": 256}
    assert manifest["precision"]["asked"] == manifest["precision"]["built"] == "fp32"
    assert "ONNX" in manifest["precision"]["read_from"]
    assert manifest["bytes"] == built.path.stat().st_size
    assert (manifest["parameters"], manifest["macs"]) == (exported.parameters, exported.macs)
    assert manifest["parity"]["max_abs"] == exported.parity.max_abs
    assert manifest["build_seconds"] >= 0
    assert manifest["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert manifest["digest"] == read_artifact(built.folder, "engine", remake="").digest


def test_same_key_is_built_once(exported: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engine(exported.path, "cpu", out=tmp_path)
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("built again"))
    second = build_engine(make_tiny(), "cpu", torch.randn(2, 1, 8, 8), tmp_path)  # the same network by another way
    assert second.cached
    assert second.folder == first.folder
    assert second.manifest == first.manifest


def test_target_and_weights_make_the_key(exported: OnnxFile, tmp_path: Path) -> None:
    target = load_target("cpu")
    folders = {
        build_engine(exported, target, out=tmp_path).folder,
        build_engine(exported, target.model_copy(update={"threads": 2}), out=tmp_path).folder,
        build_engine(make_tiny(1), target, torch.randn(2, 1, 8, 8), tmp_path).folder,
    }
    assert len(folders) == 3


def test_rebuild_from_the_entrys_own_file_keeps_its_facts(built: Engine, tmp_path: Path) -> None:
    again = build_engine(built.folder / "model.onnx", "cpu", out=tmp_path, name="tiny")
    assert again.folder.name == built.folder.name
    assert again.manifest["macs"] == built.manifest["macs"]
    assert again.manifest["parity"] == built.manifest["parity"]
    assert read_onnx(built.path).sha256 == built.manifest["onnx_sha256"]


@pytest.mark.parametrize("name", ["model.onnx", "engine.json", "model.onnx.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_entry_is_named_not_used(entry: Path, built: Engine, name: str, damage: str) -> None:
    path = entry / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-7])
    with pytest.raises(ArtifactError) as caught:
        build_engine(built.path, "cpu", out=entry.parent, name="tiny")
    assert str(entry) in str(caught.value)
    assert f"remove {entry} and build again" in str(caught.value)


def test_manifest_of_another_shape(entry: Path) -> None:
    found = read_artifact(entry, "engine", remake="")
    body = {key: value for key, value in found.body.items() if key != "inputs"}
    payload = {name: (entry / name).read_bytes() for name in found.files}
    shutil.rmtree(entry)
    module.write_artifact(entry, "engine", payload, body)
    with pytest.raises(ArtifactError, match="is no usable engine"):
        open_entry(entry)


def test_another_process_wins_the_race(exported: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_once, others = module._compile, []

    def slow_compile(*arguments):
        if not others:
            others.append(None)
            others[0] = build_engine(exported, "cpu", out=tmp_path)
        return compile_once(*arguments)

    monkeypatch.setattr(module, "_compile", slow_compile)
    mine = build_engine(exported, "cpu", out=tmp_path)
    assert mine.cached
    assert mine.manifest == others[0].manifest
    assert [p.name for p in tmp_path.iterdir()] == [mine.folder.name]


def test_unsupported_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Wobble", ["input"], ["output"], name="odd", domain="acme")
    path = write_graph(tmp_path / "x.onnx", [node], domain="acme")
    with pytest.raises(BuildError, match=r"ONNX Runtime .* does not accept the graph: .*acme:Wobble"):
        build_engine(path, "cpu", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_precision_is_an_error(tmp_path: Path) -> None:
    path = relu(tmp_path / "x.onnx", dtype=TensorProto.DOUBLE)
    with pytest.raises(BuildError, match=r"asked for fp32, but the ONNX graph is fp64(.|\n)*module\.float\(\)"):
        build_engine(path, "cpu", out=tmp_path)
    nodes = [helper.make_node("Cast", ["input"], ["h"], to=TensorProto.FLOAT16)]
    nodes.append(helper.make_node("Cast", ["h"], ["output"], to=TensorProto.FLOAT))
    path = write_graph(tmp_path / "y.onnx", nodes)
    with pytest.raises(BuildError, match=r"the ONNX graph is fp16 \+ fp32"):
        build_engine(path, "cpu", out=tmp_path)
    assert build_engine(path, "cpu", out=tmp_path, precision="fp16").manifest["precision"]["built"] == "fp16"


def test_another_precision_than_the_targets(exported: OnnxFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision = 'fp61'"):
        build_engine(exported, "cpu", out=tmp_path, precision="fp61")
    with pytest.raises(ConfigError, match="exclude only with a precision below fp32"):
        build_engine(exported, "cpu", out=tmp_path, exclude=["head"])
    engine = build_engine(exported, "cpu", out=tmp_path, precision="fp16", exclude=["head"])
    assert engine.folder.name.startswith("model-cpu-fp16-")
    assert engine.manifest["onnx_sha256"] == exported.sha256  # what it was made from
    assert engine.manifest["precision"]["layers"] == {"fp16": 2, "fp32": 1}


HEIGHTS = {"height": {"min": 2, "opt": 4, "max": 6}}


def with_axes(axes: dict[str, dict[str, int]]) -> Target:
    return Target(**{**load_target("cpu").model_dump(), "axes": axes})


def test_other_dynamic_axes_need_a_range(tmp_path: Path) -> None:
    path = relu(tmp_path / "x.onnx", shape=("n", 3, "height"))
    with pytest.raises(BuildError, match=r"input 'input' has the dynamic axis 2 \('height'\)(.|\n)*\[axes\.height\]"):
        build_engine(path, "cpu", out=tmp_path)
    for axes in ({**HEIGHTS, "hight": HEIGHTS["height"]}, {**HEIGHTS, "n": HEIGHTS["height"]}):
        with pytest.raises(BuildError, match=r"a range for the axis '(hight|n)', which no input has") as caught:
            build_engine(path, with_axes(axes), out=tmp_path)
        assert caught.value.expected == "one of height"
    with pytest.raises(BuildError, match="only the batch can be dynamic"):
        build_engine(relu(tmp_path / "y.onnx"), with_axes(HEIGHTS), out=tmp_path)


def test_engine_of_several_heights(tmp_path: Path) -> None:
    path = relu(tmp_path / "x.onnx", shape=("n", 3, "height"))
    engine = build_engine(path, with_axes(HEIGHTS), out=tmp_path)
    assert engine.axes == engine.manifest["axes"] == HEIGHTS
    assert build_engine(path, with_axes(HEIGHTS), out=tmp_path).cached
    with engine.open() as runner:
        assert runner.sample_inputs(3)["input"].shape == (3, 3, 4)
        for height in (2, 6):
            x = np.full((2, 3, height), -1, np.float32)
            np.testing.assert_array_equal(runner.run({"input": x})["output"], 0 * x)
            runner.prepare({"input": x})()
        for call in (runner.run, runner.prepare):
            for height in (1, 7):
                with pytest.raises(EngineError, match=rf"has {height} at axis 2 \(height\)(.|\n)*2 to 6 there"):
                    call({"input": np.zeros((1, 3, height), np.float32)})
        with pytest.raises(EngineError, match="batch 257"):
            runner.run({"input": np.zeros((257, 3, 4), np.float32)})


def test_fixed_batch_of_a_foreign_file(tmp_path: Path) -> None:
    engine = build_engine(relu(tmp_path / "x.onnx", shape=(3, 4)), "cpu", out=tmp_path)
    assert engine.manifest["batch"] == {"min": 3, "opt": 3, "max": 3}
    assert engine.manifest["macs"] is None
    with engine.open() as runner:
        assert runner.run(runner.sample_inputs())["output"].shape == (3, 4)


def test_several_inputs_of_a_foreign_file(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.full((4,), 2, np.float32), "w")
    path = write_graph(
        tmp_path / "x.onnx", [helper.make_node("Mul", ["input", "w"], ["output"])], initializers=(weight,)
    )
    with build_engine(path, "cpu", out=tmp_path).open() as runner:
        assert [spec.name for spec in runner.inputs] == ["input"]
        feeds = runner.sample_inputs(5)
        np.testing.assert_array_equal(runner.run(feeds)["output"], 2 * feeds["input"])


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a" * 65, "line\nbreak"])
def test_bad_name(name: str, exported: OnnxFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine name"):
        build_engine(exported, "cpu", out=tmp_path, name=name)


def test_bad_subjects(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"a TinyNet was given without example_inputs"):
        build_engine(make_tiny(), "cpu", out=tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        build_engine(tmp_path / "gone.onnx", "cpu", out=tmp_path)
    with pytest.raises(ConfigError, match="unknown target 'cqu'"):
        build_engine(make_tiny(), "cqu", torch.randn(2, 1, 8, 8), tmp_path)


ACCEPTED = "an nn.Module (or an object with one in .module), the path of an ONNX file, or an OnnxFile"


@pytest.mark.parametrize(
    "subject", [3, None, {"weight": torch.zeros(1)}, SimpleNamespace(masks={}), SimpleNamespace(module=3)]
)
@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 4)])
def test_subject_of_another_type(subject: object, inputs: torch.Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"a {type(subject).__name__} was given") as caught:
        build_engine(subject, "cpu", inputs, tmp_path)
    assert caught.value.expected == ACCEPTED
    assert "of a ticket: deploy_sparse.compact(ticket) first" in caught.value.fix


def test_engine_instead_of_its_graph(built: Engine, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"pass its {built.folder}/model.onnx"):
        build_engine(built, "cpu", out=tmp_path)
    with pytest.raises(
        ArtifactError, match=f"is an engine(.|\\n)*build from the graph in it: {built.folder}/model.onnx"
    ):
        build_engine(str(built.folder), "cpu", out=tmp_path)


@pytest.mark.parametrize(
    ("sidecar", "what", "fix"),
    [
        ("ticket.json", "a ticket", "pass deploy_sparse.compact('{0}'), or run: deploy-sparse build '{0}'"),
        ("plan.json", "a compact network", "pass deploy_sparse.load_compact('{0}'), or run: deploy-sparse build '{0}'"),
        ("run.json", "a run folder", "run: deploy-sparse build '{0}/compact'"),
        ("notes.txt", "a folder", "name an ONNX file"),
        ("checkpoint.json", "a checkpoint", "name an ONNX file"),
    ],
)
def test_folder_of_another_kind_says_which_call(sidecar: str, what: str, fix: str, tmp_path: Path) -> None:
    folder = tmp_path / "it is"
    folder.mkdir()
    (folder / sidecar).write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        build_engine(folder, "cpu", out=tmp_path / "out")
    assert caught.value.given == f"{folder} is {what}"
    assert (caught.value.expected, caught.value.fix) == (ACCEPTED, fix.format(folder))


def test_other_arguments_of_another_type(exported: OnnxFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the target is of type Tensor"):
        build_engine(make_tiny(), torch.zeros(2, 1, 8, 8), out=tmp_path)
    with pytest.raises(ConfigError, match="the folder for engines is of type int"):
        build_engine(exported, "cpu", out=3)
    with pytest.raises(ConfigError, match="engine name None"):
        build_engine(exported, "cpu", out=tmp_path, name=None)


def test_file_altered_between_export_and_build(exported: OnnxFile, tmp_path: Path) -> None:
    moved = OnnxFile(**{**vars(exported), "path": tmp_path / "x.onnx"})
    moved.path.write_bytes(exported.read()[:-1])
    with pytest.raises(ArtifactError, match="is damaged"):
        build_engine(moved, "cpu", out=tmp_path / "out")


def test_out_folder_that_cannot_be_made(exported: OnnxFile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be written"):
        build_engine(exported, "cpu", out=tmp_path / "file")


def test_rebuild_command_names_file_target_and_name(built: Engine) -> None:
    command = f"deploy-sparse build {built.folder / 'model.onnx'} --target cpu --out {built.folder.parent} --name tiny"
    assert built.build_command() == command
    assert built.build_command("rtx-sm89") == command.replace("cpu --out", "rtx-sm89 --out")


@pytest.mark.parametrize("change", [{"name": "board"}, {"threads": 2}])
def test_rebuild_command_of_an_own_target_says_what_is_needed(built: Engine, change: dict[str, object]) -> None:
    target = Target(**{**built.target.model_dump(), **change})
    own = Engine(Path("a b"), built.manifest, target)
    assert (
        own.build_command()
        == own.build_command(target.name)
        == (
            f"deploy-sparse build 'a b/model.onnx' --target FILE --out . --name tiny (FILE: a TOML file of target "
            f"'{target.name}', with the values that engine.json has under 'target')"
        )
    )
    assert "--target rtx-sm89 --out . --name tiny" in own.build_command("rtx-sm89")


def test_building_from_onnx_needs_no_torch(exported: OnnxFile, tmp_path: Path) -> None:
    code = (
        "import sys, deploy_sparse; "
        "deploy_sparse.build_engine(sys.argv[1], 'cpu', out=sys.argv[2]); "
        "assert not {'torch', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules), 'heavy import'"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(exported.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
