"""``deploy-sparse bench``: lists suites, measures one, goes on where it was stopped, and leaves a report to mail."""

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

from deploy_sparse.cli.main import main
from deploy_sparse.measure.record import read_records
from deploy_sparse.suites import running
from deploy_sparse.suites.building import Builder

sys.path.append(str(Path(__file__).parents[1] / "suites"))
from suite_samples import FakeBuilds, no_layers

SUITE = """
title = "Tiny"
about = "One small network."
batches = [1]
seconds = 0.01
min_iterations = 9
warmup_ms = 0

[forms.half]
structure = "channels"
keep = 0.5
multiple = 4

[[networks]]
name = "tiny"
network = "resnet_digits"
arguments = {widths = [8, 8, 8]}
forms = ["half"]
layer_tables = ["half"]

[[goals]]
forms = ["half"]
of_predicted = 0.01
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def builds(monkeypatch):
    found = FakeBuilds()
    monkeypatch.setattr(running, "layers_of", no_layers)
    monkeypatch.setattr(Builder, "build", lambda self, subject, target: found(self, subject, target))
    return found


def run(capsys, *words):
    code = main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_without_a_suite_the_shipped_ones_are_listed(capsys):
    code, out, _ = run(capsys, "bench", "--json")
    assert code == 0
    listed = {entry["suite"]: entry for entry in json.loads(out)}
    assert {"smoke", "channels", "seeds"} <= set(listed)
    assert listed["channels"]["networks"] == 3
    assert "Channel pruning" in run(capsys, "bench")[1]


def test_a_suite_becomes_records_and_a_report_that_is_rendered_again_the_same(capsys, suite, tmp_path):
    folder = tmp_path / "out"
    code, out, err = run(capsys, "bench", suite, "--out", folder, "--json")
    assert code == 0
    assert "tiny, cpu: half built in" in err
    value = json.loads(out)
    assert (value["new_records"], value["records"], value["suite"]) == (2, 2, "tiny")
    records = read_records(folder / "records.jsonl")
    assert [(r.network, r.subject, r.timed) for r in records] == [("tiny", "dense", True), ("tiny", "half", True)]
    assert records[1].hashes["ticket"]
    assert records[1].macs < records[0].macs
    pages = {name: (folder / name).read_bytes() for name in ("report.md", "report.html", "report.json")}
    text = pages["report.md"].decode()
    assert "one-shot on random weights" in text
    assert "## Goals" in text
    assert "## Layers: tiny, half, on cpu at batch 1" in text
    assert f"deploy-sparse bench {shlex.quote(str(suite))}" in text
    assert run(capsys, "report", folder)[0] == 0
    assert {name: (folder / name).read_bytes() for name in pages} == pages
    code, out, _ = run(capsys, "bench", suite, "--out", folder)
    assert code == 0
    assert out.rstrip().endswith(f"0 new records, 2 in {folder}; report: {folder / 'report.html'}")


def test_a_stopped_run_says_how_to_go_on(capsys, suite, tmp_path, builds):
    folder = tmp_path / "out"
    builds.on_build = lambda subject: signal.raise_signal(signal.SIGTERM) if subject == "half" else None
    code, _, err = run(capsys, "bench", suite, "--out", folder, "--batch", "1", "2")
    assert code == 143
    assert "stopped by SIGTERM" in err
    assert f"deploy-sparse bench {shlex.quote(str(suite))} --batch 1 2 --out {folder}" in err
    builds.on_build = lambda subject: None
    code, out, _ = run(capsys, "bench", suite, "--out", folder, "--batch", "1", "2", "--json")
    assert code == 0
    assert json.loads(out)["new_records"] == 4


def test_other_seconds_are_other_conditions(capsys, suite, tmp_path, builds):
    folder = tmp_path / "out"
    assert run(capsys, "bench", suite, "--out", folder)[0] == 0
    code, _, err = run(capsys, "bench", suite, "--out", folder, "--seconds", "0.5")
    assert code == 2
    assert "seconds: 0.01 -> 0.5" in err
    code, _, err = run(capsys, "bench", suite, "--out", folder, "--cuda-graph")
    assert code == 2
    assert "cuda_graph: False -> True" in err
    code, _, err = run(capsys, "bench", suite, "--out", folder, "--seconds", "-1")
    assert code == 2
    assert "seconds = -1.0" in err


def test_what_cannot_be_built_is_told_and_the_report_is_written(capsys, suite, tmp_path, builds):
    builds.failing["half"] = RuntimeError("out of memory")
    code, out, err = run(capsys, "bench", suite, "--out", tmp_path / "out")
    assert code == 0
    assert "tiny, cpu: half is not built: RuntimeError: out of memory" in err
    assert "not built: RuntimeError: out of memory" in (tmp_path / "out" / "report.md").read_text()
    assert "not built: RuntimeError: out of memory" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bench", "smok"), "did you mean 'smoke'?"),
        (("bench", "smoke", "--target", "cpus"), "did you mean 'cpu'?"),
        (("bench", "smoke", "--batch", "0"), "the batch sizes are 0"),
        (("bench", "smoke", "--only", "vgg*"), "--only 'vgg*' matches nothing"),
        (("bench", "smoke", "--cpus", "100000"), "100000"),
    ],
)
def test_bad_input_is_answered_before_anything_is_measured(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert expected in err
    assert not list(tmp_path.iterdir()), "and before a folder is made"
