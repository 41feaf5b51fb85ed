"""The verb profile: what its options ask of the measurement."""

import json
import os
import sys

import pytest

from deploy_sparse.cli.main import main
from deploy_sparse.engine import entry
from deploy_sparse.errors import ArtifactError
from deploy_sparse.measure import profile as module


@pytest.fixture
def asked(monkeypatch, make_record):
    """What profile was asked for, by name; engines are their paths."""
    found = {}

    def profile(engines, baseline, **options):
        found.update(options, engines=engines, baseline=baseline)
        return module.Profile((make_record(),), ())

    monkeypatch.setattr(entry, "open_entry", str)
    monkeypatch.setattr(module, "profile", profile)
    return found


def test_plain_call_asks_for_the_defaults(asked, capsys):
    assert main(["profile", "a=A", "b=B"]) == 0
    assert (asked.pop("engines"), asked.pop("baseline"), asked.pop("poll")()) == ({"a": "A", "b": "B"}, "a", None)
    assert asked == {
        "batches": [1],
        "duration_s": 2.0,
        "min_iterations": 10,
        "warmup_ms": 200.0,
        "cache": "warm",
        "transfers": "excluded",
        "cuda_graph": False,
        "cpus": None,
    }
    assert "dense" in capsys.readouterr().out


def test_every_option_reaches_the_measurement(asked, capsys, tmp_path):
    words = "a=A b=B --baseline b --batch 1 8 --seconds 3 --iterations 100 --warmup 0 --cpus 0 1 --cold --transfers"
    out = tmp_path / "records.jsonl"
    assert main(["profile", *words.split(), "--cuda-graph", "--json", "--out", str(out)]) == 0
    assert (asked["baseline"], asked["batches"], asked["duration_s"]) == ("b", [1, 8], 3.0)
    assert (asked["min_iterations"], asked["warmup_ms"], asked["cpus"]) == (100, 0.0, [0, 1])
    assert (asked["cache"], asked["transfers"], asked["cuda_graph"]) == ("cold", "included", True)
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record == json.loads(out.read_text())
    assert record["stats"]["p95"] > 0


def test_records_are_kept_though_nobody_reads_the_table(asked, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    out = tmp_path / "records.jsonl"
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["profile", "a=A", "--out", str(out)]) == 1
    assert len(out.read_text().splitlines()) == 1


def test_table_is_shown_though_the_records_cannot_be_kept(asked, capsys, tmp_path, monkeypatch):
    def save(path, records):
        raise ArtifactError("the disk is full", expected="room", fix="make room")

    monkeypatch.setattr(module, "append_records", save)
    assert main(["profile", "a=A", "--out", str(tmp_path / "records.jsonl")]) == 2
    captured = capsys.readouterr()
    assert "speed-up" in captured.out
    assert "the disk is full" in captured.err


def test_processors_that_are_not_there_are_one_message(capsys, monkeypatch):
    monkeypatch.setattr(entry, "open_entry", lambda path: lambda: None)
    before = os.sched_getaffinity(0)
    assert main(["profile", "a=A", "--cpus", "4000"]) == 2
    assert "may not use all of the processors 4000" in capsys.readouterr().err
    assert os.sched_getaffinity(0) == before
