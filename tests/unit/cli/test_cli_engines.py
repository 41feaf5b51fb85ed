"""deploy-sparse engines: what ls, verify and gc print, as text and as JSON, and their exit codes."""

import json
import os
import time
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from deploy_sparse.artifact import temporary_name
from deploy_sparse.cli.main import main
from deploy_sparse.engine.build import build_engine

NAMES = ("small", "large")


@pytest.fixture
def store(tmp_path):
    """Two engines, ``small`` built three days ago, beside a file that is none."""
    folder = tmp_path / "engines"
    for width, name in enumerate(NAMES, start=2):
        shape = ("n", width)
        tensors = [helper.make_tensor_value_info(word, TensorProto.FLOAT, shape) for word in ("input", "output")]
        graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], name, tensors[:1], tensors[1:])
        file = tmp_path / f"{name}.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        file.write_bytes(model.SerializeToString())
        build_engine(file, "cpu", out=folder, name=name)
    (folder / "notes.txt").write_text("mine")
    then = time.time() - 3 * 86400
    os.utime(entry(folder, "small") / "engine.json", (then, then))
    return folder


def entry(store: Path, name: str) -> Path:
    (found,) = store.glob(f"{name}-cpu-*")
    return found


def run(capsys, *words):
    code = main(["engines", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def damage(store: Path, name: str) -> Path:
    folder = entry(store, name)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    return folder


def test_ls_is_a_table_or_json(capsys, store):
    code, out, err = run(capsys, "ls", store)
    assert (code, err) == (0, "")
    title, _, *rows = out.splitlines()
    assert title.split()[:4] == ["engine", "target", "runtime", "for"]
    assert [row.split()[0] for row in rows] == [entry(store, name).name for name in ("large", "small")]
    assert "any CPU" in rows[0]
    assert "3 days" in rows[1]
    assert rows[1].split()[-1] == "yes"
    value = json.loads(run(capsys, "ls", store, "--json")[1])
    assert value["others"] == ["notes.txt"]
    assert [engine["name"] for engine in value["engines"]] == ["large", "small"]
    assert value["engines"][1]["age_seconds"] == pytest.approx(3 * 86400, abs=60)
    assert {engine["state"] for engine in value["engines"]} == {"good"}


def test_ls_says_why_an_engine_does_not_run_and_what_to_do(capsys, store):
    (entry(store, "small") / "model.onnx").write_bytes(b"")
    out = run(capsys, "ls", store)[1]
    assert out.splitlines()[3].split()[-1] == "damaged"
    assert f"{entry(store, 'small')}: damaged: " in out
    assert f"next step: deploy-sparse engines gc {store}; then build it again: deploy-sparse build SUBJECT" in out


def test_verify_names_every_bad_engine_and_exits_with_2(capsys, store):
    assert run(capsys, "verify", store) == (0, "2 of 2 engines good; 2 run here\n", "")
    assert run(capsys, "verify", entry(store, "small"))[1] == "1 of 1 engines good; 1 run here\n"
    folder = damage(store, "small")
    assert run(capsys, "ls", store)[1].count("yes") == 2  # sizes are right, ls reads no more
    temporary_name(store / "new-cpu-0123456789ab").mkdir()  # a build that is writing just now is nothing bad
    code, out, _ = run(capsys, "verify", store)
    assert code == 2
    assert f"{folder}: damaged: {folder}/model.onnx is damaged: its SHA-256 is" in out
    assert out.splitlines()[-1] == "1 of 2 engines good; 1 run here"
    code, out, _ = run(capsys, "verify", store, "--json")
    assert (code, json.loads(out)["bad"]) == (2, [str(folder)])


def test_verify_here_also_refuses_engines_for_other_machines(capsys, store, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    from deploy_sparse.engine.trt import bindings as trt_bindings

    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: None)
    engine = build_engine(entry(store, "small") / "model.onnx", "rtx-sm89", out=store, name="small")
    assert run(capsys, "verify", store) == (0, "3 of 3 engines good; 2 run here\n", "")
    code, out, _ = run(capsys, "verify", store, "--here")
    assert code == 2
    assert f"{engine.folder}: does not run here: no NVIDIA GPU here; it needs an NVIDIA GPU" in out
    listed = run(capsys, "ls", store)[1]
    assert f"next step: load it on a machine with that GPU, or build for the CPU of this one: deploy-sparse build {engine.folder}" in listed  # fmt: skip


def test_gc_shows_first_when_asked_and_then_removes(capsys, store):
    folder = damage(store, "small")
    code, out, _ = run(capsys, "gc", store, "--dry-run")
    assert code == 0
    assert f"would remove {folder}: damaged: " in out
    assert out.splitlines()[-1].startswith("would remove 1 engine, ")
    assert folder.exists()
    assert run(capsys, "gc", store, "--older-than", 30, "--json")[0] == 0
    assert folder.exists()
    value = json.loads(run(capsys, "gc", store, "--json")[1])
    assert [verdict["folder"] for verdict in value["verdicts"]] == [str(folder)]
    assert value["verdicts"][0]["left"] is None
    assert value["bytes"] > 0
    assert value["kept"] == [str(entry(store, "large"))]
    assert value["others"] == ["notes.txt"]
    assert sorted(path.name for path in store.iterdir()) == [entry(store, "large").name, "notes.txt"]
    assert run(capsys, "gc", store)[1] == "removed 0 engines, 0 B; kept 1 engine\n"


def test_gc_says_what_it_leaves_and_why(capsys, store):
    (entry(store, "small") / "thesis.tex").write_text("precious")
    out = run(capsys, "gc", store, "--keep", 0)[1]
    assert f"left {entry(store, 'small')}: it holds what is not the engine's: thesis.tex;" in out
    assert [path.name for path in store.glob("*-cpu-*")] == [entry(store, "small").name]
    assert run(capsys, "ls", store)[1].splitlines()[2].startswith("small-cpu-")


def test_an_empty_folder_is_no_error_and_a_missing_one_is(capsys, tmp_path):
    assert run(capsys, "ls", tmp_path) == (0, f"no engines in {tmp_path}\n", "")
    assert run(capsys, "verify", tmp_path) == (0, "0 of 0 engines good; 0 run here\n", "")
    for action in ("ls", "verify", "gc"):
        code, out, err = run(capsys, action, tmp_path / "gone")
        assert (code, out) == (2, "")
        assert "gone does not exist" in err
        assert "deploy-sparse build" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verfy"], "unknown action 'verfy'\n  expected: one of ls, verify, gc\n  next step: did you mean 'verify'?"),
        (["ls", "--keep", "2"], "--keep with ls\n  expected: --keep with gc only"),
        (["verify", "--dry-run"], "--dry-run with verify"),
        (["gc", "--here"], "--here with gc\n  expected: --here with verify only"),
        (["gc", ".", "--keep", "-1"], "--keep -1\n  expected: zero or more"),
        (["gc", ".", "--older-than", "nan"], "--older-than nan"),
        (["gc", "--keep", "two"], "invalid int value"),
        ([], "the following arguments are required: {ls,verify,gc}"),
    ],
)
def test_bad_words_are_one_message(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
