"""`inspect` of an engine and of an ONNX file."""

import json

import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.cli.main import main
from deploy_sparse.engine import inspection
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.inspection import Inspection, LayerInfo, TensorInfo


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("cli-inspect")
    tensors = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ("n", 3)),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ("n", 5)),
    ]
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["m"], "product"),
        helper.make_node("Relu", ["m"], ["output"], "rectifier"),
    ]
    weight = numpy_helper.from_array(np.ones((3, 5), np.float32), "w")
    graph = helper.make_graph(nodes, "net", tensors[:1], tensors[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return build_engine(folder / "net.onnx", "cpu", out=folder / "out", name="net")


def run(capsys, *words):
    code = main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_engine_as_text(capsys, engine):
    code, out, err = run(capsys, engine.folder)
    assert (code, err) == (0, "")
    head, rows = out.split("\n\n")
    assert "target           cpu" in head
    assert "layers           2, from ONNX graph" in head
    assert [line.split()[:2] for line in head.splitlines()[-3:-1]] == [["parameters", "15"], ["MACs", "15"]]
    title, _, first, second = rows.splitlines()
    assert title.split() == ["node", "operator", "output", "type", "parameters", "MACs"]
    assert first.split() == ["product", "MatMul", "1×5", "fp32", "15", "15"]
    assert second.split() == ["rectifier", "Relu", "1×5", "fp32", "–", "–"]


@pytest.mark.parametrize("file", ["", "engine.json", "model.onnx"])
def test_an_engine_as_json(capsys, engine, file):
    value = json.loads(run(capsys, engine.folder / file, "--json")[1])
    assert (value["kind"], value["source"], value["why"], value["target"]) == ("engine", "ONNX graph", None, "cpu")
    assert [(layer["kind"], layer["macs"], layer["precision"]) for layer in value["layers"]] == [
        ("MatMul", 15, "fp32"),
        ("Relu", None, "fp32"),
    ]


def test_an_onnx_file(capsys, engine):
    file = engine.folder.parents[1] / "net.onnx"
    code, out, _ = run(capsys, file)
    assert code == 0
    assert "opset       20" in out
    assert "product" in out
    assert json.loads(run(capsys, file, "--json")[1])["kind"] == "onnx"


def test_layers_of_the_inspector(capsys, engine, monkeypatch):
    tensor = TensorInfo("output", (8, -1), "fp16", "Row major linear")
    layers = (LayerInfo("product + rectifier", "CaskGemmConvolution", (tensor,), (tensor,), "sm80_xmma"),)
    monkeypatch.setattr(inspection, "inspect_engine", lambda engine: Inspection("TensorRT's inspector", None, layers))
    out = run(capsys, engine.folder)[1]
    title, _, row = out.split("\n\n")[1].splitlines()
    assert title.split() == ["layer", "kind", "output", "precision", "layout", "tactic"]
    assert row.split("  ")[0] == "product + rectifier"
    assert all(word in row for word in ("CaskGemmConvolution", "8×?", "fp16", "Row major linear", "sm80_xmma"))
    assert "parameters" not in out
    monkeypatch.setattr(inspection, "inspect_engine", lambda engine: Inspection("ONNX graph", "no NVIDIA GPU", layers))
    assert "TensorRT's inspector was not asked: no NVIDIA GPU" in run(capsys, engine.folder)[1]


@pytest.mark.parametrize("option", ["--target", "--norms", "--shortcuts"])
def test_options_of_planning_are_refused(capsys, engine, option):
    for path, what in ((engine.folder, "an engine"), (engine.folder.parents[1] / "net.onnx", "an ONNX file")):
        code, _, err = run(capsys, path, option, "leave")
        assert code == 2
        assert f"{option} leave for {what}\n" in err


def test_a_folder_that_holds_nothing_names_what_can_be_inspected(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "holds nothing to inspect" in err
    assert "an engine's; or an ONNX file" in err
    assert "does not exist" in run(capsys, tmp_path / "gone.onnx")[2]


def test_a_graph_with_a_batch_of_its_own(capsys, tmp_path):
    """Its counts are those of the whole batch, and it says so."""
    tensors = [helper.make_tensor_value_info(*given) for given in (("x", TensorProto.FLOAT, (5, 3)), ("y", 1, (5, 4)))]
    weight = helper.make_tensor("w", TensorProto.FLOAT, (3, 4), [1.0] * 12)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "fixed.onnx").write_bytes(model.SerializeToString())
    note = "shapes and MACs are those of the graph's fixed batch of 5"
    made = build_engine(tmp_path / "fixed.onnx", "cpu", out=tmp_path / "out")
    for path in (tmp_path / "fixed.onnx", made.folder):
        assert note in run(capsys, path)[1].splitlines()
        value = json.loads(run(capsys, path, "--json")[1])
        assert (value["batch"], value["MACs"], value["layers"][0]["outputs"][0]["shape"]) == (5, 60, [5, 4])


def test_a_dynamic_batch_is_inspected_at_one_sample(capsys, engine):
    assert "fixed batch" not in run(capsys, engine.folder)[1]
    assert json.loads(run(capsys, engine.folder, "--json")[1])["batch"] == 1


def test_a_bundle_is_verified_instead(capsys, tmp_path):
    (tmp_path / "net.zip").write_bytes(b"PK")
    code, _, err = run(capsys, tmp_path / "net.zip")
    assert code == 2
    assert f"deploy-sparse bundle --verify {tmp_path / 'net.zip'}" in err
