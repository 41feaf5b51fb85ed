"""deploy-sparse bundle: make, verify, rebuild; text, JSON and exit codes."""

import json

import pytest
from onnx import TensorProto, helper

from deploy_sparse.cli.main import main
from deploy_sparse.engine.build import build_engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-bundle")
    tensors = [helper.make_tensor_value_info(word, TensorProto.FLOAT, ("n", 3)) for word in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "net", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return build_engine(folder / "net.onnx", "cpu", out=folder / "out", name="net")


def run(capsys, *words):
    code = main(["bundle", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_make_verify_and_rebuild(capsys, engine, tmp_path):
    path = tmp_path / "net.zip"
    code, out, err = run(capsys, engine.folder, "--format", "zip", "--out", path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"bundle  {path}", "format  zip"]
    code, out, _ = run(capsys, "--verify", path)
    assert code == 0
    assert out.splitlines()[-1].startswith("the ONNX graph on this CPU computes the parity sample: max|Δ| 0, ")
    value = json.loads(run(capsys, "--verify", path, "--json")[1])
    assert (value["name"], value["target"], value["files"], value["proof"]["max_rel"]) == ("net", "cpu", 5, 0.0)
    code, out, _ = run(capsys, "--rebuild", path, "--out", tmp_path / "out")
    assert code == 0
    assert "the engine for cpu computes the parity sample" in out
    value = json.loads(run(capsys, "--rebuild", path, "--out", tmp_path / "out", "--name", "again", "--json")[1])
    assert value["cached"] is False
    assert value["engine"].startswith(str(tmp_path / "out" / "again-cpu-"))
    assert run(capsys, "--rebuild", path, "--out", tmp_path / "out", "--target", "cpus")[0] == 2


def test_triton(capsys, engine, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    words = [
        engine.folder,
        "--format",
        "triton",
        "--out",
        tmp_path / "models",
        "--name",
        "relu",
        "--labels",
        tmp_path / "classes.txt",
    ]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.splitlines()[-1] == "the server's ONNX Runtime has to know opset 20"
    assert (tmp_path / "models" / "relu" / "labels.txt").read_text() == "a\nb\nc\n"
    value = json.loads(run(capsys, *words, "--json")[1])
    assert (value["path"], value["format"], len(value["notes"])) == (str(tmp_path / "models" / "relu"), "triton", 1)


def test_rebuild_goes_to_engines_out(capsys, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, engine.folder, "--format", "zip", "--out", "net.zip", "--tolerance", "0.25")
    value = json.loads(run(capsys, "--rebuild", "net.zip", "--json")[1])
    assert value["engine"].startswith("engines/out/net-cpu-")
    assert value["proof"]["tolerance"] == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to bundle, verify or rebuild is given"),
        (["a", "--verify", "b.zip"], "engine and verify given at once"),
        (["a", "--out", "b"], "--format is missing"),
        (["a", "--format", "zip"], "--out is missing"),
        (
            ["a", "--format", "zip", "--out", "b.zip", "--target", "cpu"],
            "--target with bundling\n  expected: --target with --rebuild only",
        ),
        (["--verify", "b.zip", "--out", "c"], "--out with --verify\n  expected: --out with bundling, --rebuild only"),
        (["--rebuild", "b.zip", "--labels", "c"], "--labels with --rebuild"),
        (["--verify", "b.zip", "--calibration", "c"], "--calibration with --verify"),
        (["a", "--format", "tar", "--out", "b"], "unknown format 'tar'"),
        (["a", "--format", "zip", "--out", "b.zip"], "a does not exist"),
        (["--verify", "gone.zip"], "gone.zip does not exist"),
        (["a", "--format", "triton", "--out", "b", "--labels", "gone.txt"], "gone.txt cannot be read"),
        (["a", "--format", "zip", "--out", "b.zip", "--tolerance", "x"], "invalid float value"),
    ],
)
def test_bad_words_are_one_message(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
