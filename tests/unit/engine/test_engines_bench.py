"""The benchmark of engines: what is measured, how it goes on after crashes, and what its tables say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.errors import BuildError

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "engines.py"
NAMES = ("rtx-sm89/fp32", "cpu/int8")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("engines_bench", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def part(bench):
    return sys.modules["engines_part"]


@pytest.fixture
def scripted(bench, tmp_path, monkeypatch):
    """Measure two attempts with a process that runs the given lines; ``attempts`` is what is left to it."""

    def measure(*lines, **limits):
        script = tmp_path / "part.py"
        head = [
            "import json, os, sys, time",
            "network, form, file, seconds, *attempts = sys.argv[1:]",
            "def report(of='', **v): open(file, 'a').write(json.dumps({'of': of, **v}) + '\\n')",
        ]
        script.write_text("\n".join([*head, *lines]))
        monkeypatch.setattr(bench, "SCRIPT", script)
        rows = list(bench.measure("resnet20", "dense", NAMES, **limits))
        assert [bench.key_of(row) for row in rows] == [("resnet20", "dense", name) for name in NAMES]
        assert all(row["kind"] == "engine" and row["process_s"] >= 0 for row in rows)
        return rows

    return measure


ALL_OK = ("for name in attempts:", "    report(of=name, built=name, outcome='ok', stage=None)")


def test_every_attempt_gets_a_row_with_what_all_share(scripted):
    rows = scripted("report(stage=None, classes=7, limit=seconds, form=form)", *ALL_OK, limit_s=50)
    assert [(row["built"], row["classes"], row["limit"], row["outcome"]) for row in rows] == [
        (name, 7, "50", "ok") for name in NAMES
    ]
    assert [(row["target"], row["precision"]) for row in rows] == [("rtx-sm89", "fp32"), ("cpu", "int8")]


def test_after_a_crash_the_rest_goes_on_in_another_process(scripted):
    rows = scripted(
        "report(stage=None, left=len(attempts))",
        "if len(attempts) == 2:",
        "    report(of=attempts[0], stage='build', seconds=1)",
        "    os.abort()",
        *ALL_OK,
    )
    assert (rows[0]["outcome"], rows[0]["stage"], rows[0]["reason"]) == ("failed", "build", "signal 6")
    assert rows[0]["error"] == "process"
    assert (rows[1]["outcome"], rows[1]["left"]) == ("ok", 1)


def test_what_stops_the_network_stops_all_its_attempts(scripted):
    rows = scripted("report(stage='surgery')", "report(outcome='failed', reason='not equal', error='SurgeryError')")
    assert [(row["stage"], row["reason"], row["error"]) for row in rows] == [
        ("surgery", "not equal", "SurgeryError")
    ] * 2
    rows = scripted("report(stage='ticket')", "raise SystemExit('no memory in /some/folder/file.py')")
    assert [(row["stage"], row["reason"]) for row in rows] == [("ticket", "exit 1: no memory in file.py")] * 2


def test_a_process_without_an_answer_is_ended(scripted):
    rows = scripted("report(stage='export')", "time.sleep(60)", limit_s=0.1, prepare_s=0.4)
    assert [row["reason"] for row in rows] == ["no answer in 0.8 s"] * 2


def row(network="resnet20", form="dense", target="rtx-sm89", precision="fp32", **values):
    found = {"stage": None, "seconds": 1.0, "built": precision, "unquantized": None, "bytes": 2_000_000}
    found |= {"agreement": None, "parity": {"max_rel": 2e-6}, "again_s": 0.05, "classes": 9, "outcome": "ok"}
    if target == "cpu":
        found |= {"ran": {"max_rel": 3e-6}}
    about = {"kind": "engine", "network": network, "form": form, "target": target, "precision": precision}
    return {**about, **found, **values}


def failed(reason, expected="", **about):
    full = row(**about)
    keys = ("kind", "network", "form", "target", "precision")
    return {
        **{key: full[key] for key in keys},
        **{"outcome": "failed", "stage": "build", "reason": reason, "error": "BuildError", "expected": expected},
    }


def test_only_what_is_missing_is_measured(bench):
    rows = [{"kind": "conditions"}, row(), failed("no", target="cpu", precision="int8")]

    def left(again, forms=("dense",)):
        return list(bench.wanted(["resnet2?"], forms, NAMES, rows, again))

    assert left("none") == []
    assert left("failed") == [("resnet20", "dense", ("cpu/int8",))]
    assert left("all") == [("resnet20", "dense", NAMES)]
    assert left("none", ("dense", "packed")) == [("resnet20", "packed", NAMES)]
    rows.append(row(target="cpu", precision="int8"))
    assert left("failed") == []  # the last line counts


def test_the_zoo_and_four_of_torchvisions_in_all_precisions(bench, monkeypatch):
    assert bench.NETWORKS[: len(zoo.ZOO)] == tuple(zoo.ZOO)
    assert [name for name in bench.NETWORKS if not zoo.known(name)] == []
    cpu = ("cpu/fp32", "cpu/fp16", "cpu/int8")
    monkeypatch.setattr(bench, "find_spec", lambda name: name == "tensorrt_rtx" or None)
    assert bench.attempts("rtx-portable") == (
        *(f"rtx-portable/{precision}" for precision in ("fp32", "fp16", "bf16", "int8", "fp8")),
        *cpu,
    )
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.attempts("rtx-portable") == cpu


def test_a_record_of_other_conditions_is_refused(bench, tmp_path):
    path = tmp_path / "engines" / "results.jsonl"
    first = bench.read(path, "rtx-sm89")
    assert first == bench.read(path, "rtx-sm89")
    assert first[0]["environment"]["torch"]
    assert first[0]["data"]["vgg_digits"].startswith("digits, 256")
    assert first[0]["data"]["torchvision/vit_b_16"].endswith("enlarged to 224×224")
    with pytest.raises(SystemExit, match=r"other conditions \(targets\)"):
        bench.read(path, "rtx-portable")


def test_the_command_resumes_and_writes_the_tables(bench, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(network, form, names, **limits):
        asked.append((network, form, tuple(names), limits))
        for name in names:
            target, precision = name.split("/")
            yield row(network, form, target, precision)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "attempts", lambda rtx: NAMES)
    out = tmp_path / "results.jsonl"
    words = ["engines.py", "--out", str(out), "--networks", "resnet20", "--limit-s", "9", "--forms"]
    for forms in (["dense"], ["dense", "packed"], []):
        monkeypatch.setattr(sys, "argv", [*words, *forms])
        bench.main()
    assert asked == [("resnet20", form, NAMES, {"limit_s": 9.0}) for form in ("dense", "packed")]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert out.with_suffix(".md").read_text() == bench.text(rows)
    assert "resnet20 packed cpu/int8: ok, 1.0 s, again 0.05 s" in capsys.readouterr().out


def goals(bench, rows, networks=("resnet20",)):
    first = {"kind": "conditions", "targets": {"rtx": "rtx-sm89"}, "forms": ["dense"], "data": dict.fromkeys(networks)}
    board = sys.modules["engines_table"].Board([first, *rows])
    return {goal: (found, met) for goal, found, met in sys.modules["engines_table"].goals(board).rows}


def test_the_goal_of_compiling(bench):
    goal = "every zoo network compiles for rtx-sm89 in fp32"
    two = ("resnet20", "resnet32")
    assert goals(bench, [row()])[goal] == ("1 of 1", "yes")
    assert goals(bench, [row()], two)[goal] == ("1 of 1; 2 wanted", "no")
    assert goals(bench, [row(), failed("too slow", network="resnet32")], two)[goal] == ("1 of 2", "no")
    lacks = failed("node Foo", "operators that TensorRT's ONNX parser supports", network="resnet32")
    assert goals(bench, [row(), lacks], two)[goal] == ("1 of 2, 1 with operators that it lacks", "yes")
    assert goals(bench, [failed("x"), row()])[goal] == ("1 of 1", "yes")  # measured again
    extra = [row(), failed("too slow", network="torchvision/vit_b_16")]
    found = goals(bench, extra, ("resnet20", "torchvision/vit_b_16"))
    assert found[goal] == ("1 of 1", "yes")
    assert found["every torchvision network compiles for rtx-sm89 in fp32"] == ("0 of 1", "no")


def test_the_goal_of_parity(bench):
    def found(precision, **values):
        rows = [row(target="cpu", precision=precision, **values)]
        return goals(bench, rows)[f"parity of every ONNX Runtime engine, {precision}"]

    assert found("fp32") == ("1 of 1; largest error of an export 2.0e-06, of an engine 3.0e-06", "yes")
    assert found("fp32", parity={"max_rel": 2e-4}) == ("0 of 1", "no")
    assert found("fp32", ran={"max_rel": 2e-4}) == ("0 of 1", "no")
    assert found("int8", agreement={"max_rel": 0.1}, ran={"max_rel": 0.1})[1] == "yes"
    assert found("int8", agreement={"max_rel": 0.1}, ran={"max_rel": 0.2})[1] == "no"
    assert found("fp32", outcome="failed", reason="x")[1] == "no"


def test_the_goal_of_the_second_build(bench):
    goal = "second identical build < 0.2 s"
    slow = row(network="resnet32", precision="int8", again_s=0.25)
    assert goals(bench, [row()])[goal] == ("1 of 1; slowest 0.050 s (resnet20, dense, rtx-sm89 fp32)", "yes")
    assert goals(bench, [row(), slow])[goal] == ("1 of 2; slowest 0.250 s (resnet32, dense, rtx-sm89 int8)", "no")


def test_a_row_says_what_was_built_and_how_close(bench):
    agreed = {"samples": 8, "top1": 0.975, "max_rel": 0.1, "mean_rel": 0.0123}
    facts = {"of_dense": {"macs": 0.26}, "packed_layers": 4, "form": "packed"}
    rows = [
        {"kind": "conditions", "targets": {"rtx": "rtx-sm89"}, "forms": ["packed"], "data": {"resnet20": ""}},
        row(**facts),
        row(**facts, precision="int8", agreement=agreed, unquantized=2),
        row(**facts, precision="fp8", agreement={"why_not": "ONNX Runtime cannot run it"}, unquantized=0),
        {**failed("not\n" + 80 * "x", target="cpu", precision="int8"), "form": "packed"},
    ]
    text = bench.text(rows)
    built, agreement, costs, failures = text.split("**Built**")[1].split("\n**")
    assert "| resnet20 | packed | ok | ok, 2 without | ok | no, build: not " in built
    assert "…" in built
    assert "| resnet20 | packed | 9 | 97.5%, 1.23% | ONNX Runtime cannot run it | – |" in agreement
    assert "| resnet20 | packed | 26% | 4 | 2.00 / 1.0 / 50 | 2.00 / 1.0 / 50 | 2.00 / 1.0 / 50 | – |" in costs
    assert f"| resnet20 | packed | cpu | int8 | build | not {80 * 'x'} |" in failures


def test_only_failures_have_a_table_of_their_own(bench):
    conditions = {"kind": "conditions", "targets": {"rtx": "rtx-sm89"}, "forms": ["dense"], "data": {"resnet20": ""}}
    assert "Not through" not in bench.text([conditions, row()])


@pytest.mark.parametrize(("form", "kept"), [("dense", None), ("channels", (0.15, 0.35)), ("packed", (0.4, 0.6))])
def test_forms_are_made_of_the_same_weights(part, monkeypatch, form, kept):
    monkeypatch.setattr(part, "SAMPLES", 8)
    stages = []
    made = part.make("resnet_digits", form, lambda **values: stages.append(values["stage"]))
    assert stages == (["network"] if form == "dense" else ["network", "ticket", "surgery"])
    assert made.images.shape == (8, 1, 8, 8)
    scores = part.scores_of(made.module, made.images)
    assert float(scores.mean(0).abs().max()) < 1e-4 * float(scores.abs().max())
    assert made.facts["classes"] == len(scores.argmax(1).unique()) > 1
    assert made.facts["data"] == "digits, 8 of the training split"
    if kept:
        low, high = kept
        assert low < made.facts["of_dense"]["macs"] < high
        assert made.facts["float64"] < 1e-10
        assert (made.facts["packed_layers"] > 0) == (form == "packed")


def test_the_images_fit_the_network(part, monkeypatch):
    monkeypatch.setattr(part, "SAMPLES", 4)
    monkeypatch.setattr(part, "LARGE_SAMPLES", 2)
    for network, shape in (("resnet20", (4, 3, 32, 32)), ("torchvision/resnet18", (2, 3, 224, 224))):
        name, source = part.images_of(network)
        images = source()
        assert images.shape == shape
        assert name.startswith(f"synthetic, {shape[0]} ")
        assert torch.equal(images, source())
        assert 0.3 < float(images.std()) < 3


@pytest.fixture(scope="module")
def small(part):
    """A network, images for it, and its scores."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)).eval()
    images = torch.randn(40, 1, 8, 8)
    return module, images, part.scores_of(module, images).numpy()


def test_an_attempt_is_built_found_again_and_run(part, small, tmp_path):
    module, images, expected = small
    export_onnx(module, images[:2], tmp_path / "model.onnx")
    found = {}
    part.attempt(
        "cpu/int8", tmp_path / "model.onnx", images.numpy(), lambda: expected, tmp_path / "out", 60, found.update
    )
    assert (found["built"], found["layers"], found["lowered"], found["unquantized"]) == ("int8", {"int8": 2}, 2, 0)
    assert found["parity"]["max_rel"] < 1e-4
    assert 0 < found["agreement"]["mean_rel"] < 0.2
    assert found["agreement"]["samples"] == found["ran"]["samples"] == 40
    assert found["ran"]["max_rel"] == pytest.approx(found["agreement"]["max_rel"], rel=0.01)
    assert found["ran"]["top1"] == found["agreement"]["top1"]
    assert len(found["again_runs"]) == 3
    assert found["again_s"] == sorted(found["again_runs"])[1]
    assert found["bytes"] > 1000
    assert found["stage"] == "run"


def test_a_second_build_that_is_made_anew_fails(part, small, tmp_path, monkeypatch):
    module, images, expected = small
    export_onnx(module, images[:2], tmp_path / "model.onnx")
    folders = (tmp_path / str(number) for number in range(9))
    monkeypatch.setattr(part, "build_engine", lambda *a, **k: build_engine(*a, **{**k, "out": next(folders)}))
    with pytest.raises(RuntimeError, match="was not found in the store"):
        part.attempt("cpu/fp32", tmp_path / "model.onnx", images.numpy(), lambda: expected, tmp_path, 60, lambda **_: 0)


def test_an_engine_that_computes_something_else_is_told(part, small, tmp_path):
    module, images, expected = small
    engine = build_engine(module, "cpu", images[:2], tmp_path)
    assert part.ran(engine, images.numpy(), expected)["max_rel"] < 1e-5
    wrong = part.ran(engine, images.numpy(), expected + np.float32([0, 0, 9, 0]))
    assert wrong["top1"] < 0.6
    assert wrong["max_rel"] > 0.5


def test_what_an_attempt_raises_is_its_outcome_and_the_next_goes_on(part, small, monkeypatch):
    module, images, _ = small
    lines = []

    def attempt(name, *_):
        if name == "cpu/fp16":
            raise BuildError("node 'a'\n  is\nunknown", expected="operators that exist", fix="f")
        if name == "cpu/int8":
            raise ValueError

    monkeypatch.setattr(part, "attempt", attempt)
    monkeypatch.setattr(part, "make", lambda *_: part.Made(module, images, {"classes": 3}))
    part.run("any", "dense", ["cpu/fp16", "cpu/int8", "cpu/fp32"], 60, lambda **v: lines.append({"of": "", **v}))
    found = part.merged(map(json.dumps, lines))
    assert found[""] == {"stage": None, "classes": 3}
    told = ("outcome", "reason", "expected", "error")
    assert [found["cpu/fp16"][key] for key in told] == ["failed", "node 'a' is unknown", "operators that exist", "BuildError"]  # fmt: skip
    assert [found["cpu/int8"].get(key) for key in told] == ["failed", "ValueError", None, "ValueError"]
    assert found["cpu/fp32"]["outcome"] == "ok"


def test_what_making_the_network_raises_is_the_outcome_of_all(part, monkeypatch):
    def make(network, form, report):
        report(stage="ticket")
        raise RuntimeError("no blocks")

    monkeypatch.setattr(part, "make", make)
    found = {}
    part.run("any", "packed", ["cpu/fp32"], 60, found.update)
    assert found == {"stage": "ticket", "outcome": "failed", "reason": "no blocks", "error": "RuntimeError"}


def test_lines_are_merged_by_attempt_up_to_a_cut(part):
    lines = [
        '{"of": "", "a": 1}',
        '{"of": "x", "b": 2}',
        '{"of": "x", "b": 3}',
        '{"of": "x", "c',
        '{"of": "y", "d": 1}',
    ]
    assert part.merged(lines) == {"": {"a": 1}, "x": {"b": 3}}
