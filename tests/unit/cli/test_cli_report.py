"""``deploy-sparse report``: one source, several, several devices, and what it refuses."""

import json
import os
from datetime import UTC, datetime

import pytest

from deploy_sparse.cli.main import main
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.record import Conditions, LatencyRecord, write_records
from deploy_sparse.measure.table import Table
from deploy_sparse.measure.timing import summarise
from deploy_sparse.tune.run_report import ReportText, load_report, write_report


def records(run, network=None, processor="one, 2 cores", batches=(1,)):
    """Dense and a ticket of half its time, at each batch."""
    conditions = {"warmup_ms": 1.0, "duration_s": 1.0, "min_iterations": 1, "block_ms": 1.0}
    return [
        LatencyRecord(
            run_id=run, date=datetime(2026, 11, 22, tzinfo=UTC), subject=name, baseline="dense", target="cpu",
            runtime="onnxruntime", batch=batch, network=network, status="timed", macs=macs,
            stats=summarise([ms] * 20), samples_ms=((ms, ms),) * 10, environment={"processor": processor},
            conditions=Conditions(interleaved_with=(other,), **conditions),
        )
        for batch in batches
        for name, other, ms, macs in (("dense", "ticket", 2.0 * batch, 200), ("ticket", "dense", 1.0 * batch, 100))
    ]  # fmt: skip


def run(capsys, *words):
    code = main(["report", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_of_records_has_its_report_beside_it(capsys, tmp_path):
    write_records(tmp_path / "mine.jsonl", records("r1"))
    code, out, _ = run(capsys, tmp_path / "mine.jsonl")
    assert code == 0
    assert files(tmp_path) == ["mine.jsonl", "report.html", "report.md"]
    assert out.splitlines()[0].startswith("cpu, batch 1: ticket is 2.00× as fast as dense")
    assert out.splitlines()[1:] == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert (tmp_path / "report.md").read_text().startswith("# mine\n")
    assert run(capsys, tmp_path / "mine.jsonl", "--title", "Another", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Another\n")


def test_a_folder_of_records_without_report_text_is_named_after_itself(capsys, tmp_path):
    write_records(tmp_path / "suite" / "records.jsonl", records("r1", "resnet18"))
    assert run(capsys, tmp_path / "suite")[0] == 0
    assert (tmp_path / "suite" / "report.md").read_text().startswith("# suite\n")


def test_several_sources_of_one_device_make_one_report(capsys, tmp_path):
    write_records(tmp_path / "a" / "records.jsonl", records("r1", "resnet18"))
    write_records(tmp_path / "b" / "more.jsonl", records("r2", "vgg16"))
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "b" / "more.jsonl", "--json")
    assert code == 0
    value = json.loads(out)
    assert value["report"] == str(tmp_path / "one-2-cores.html")  # in the folder that holds both
    assert files(tmp_path) == ["a", "b", "one-2-cores.html", "one-2-cores.md"]
    text = (tmp_path / "one-2-cores.md").read_text()
    assert text.startswith("# Latency on one, 2 cores\n\n4 records from 2 sources: a, more\n")
    assert "\n## resnet18\n" in text
    assert "\n## vgg16\n" in text


def test_a_folder_stands_for_all_records_below_it_and_every_device_has_its_files(capsys, tmp_path):
    write_report(tmp_path / "x" / "first", records("r1"), ReportText("First", tables=(Table("T", ("a",), ((1,),)),)))
    write_records(tmp_path / "x" / "second" / "records.jsonl", records("r2", processor="other"))
    write_records(tmp_path / "x" / "first" / "records.jsonl", records("r1"))
    code, out, _ = run(capsys, tmp_path / "x", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert list(json.loads(out)["reports"]) == ["one-2-cores", "other"]
    assert files(tmp_path / "out") == ["one-2-cores.html", "one-2-cores.md", "other.html", "other.md"]
    assert "## First: T\n" in (tmp_path / "out" / "one-2-cores.md").read_text()
    assert "First" not in (tmp_path / "out" / "other.md").read_text().split("## Verdict")[1]
    assert files(tmp_path / "x") == ["first", "second"]


def test_a_source_given_twice_counts_once(capsys, tmp_path):
    write_records(tmp_path / "a" / "records.jsonl", records("r1"))
    assert run(capsys, tmp_path / "a", tmp_path / "a", tmp_path / "a" / "records.jsonl")[0] == 0
    text = (tmp_path / "a" / "one-2-cores.md").read_text()
    assert text.count("| ticket | cpu |") == 2  # results and spread
    assert "2 records from 1 source: a\n" in text


def test_many_verdicts_are_summed_up_on_the_terminal(capsys, tmp_path):
    write_records(tmp_path / "r.jsonl", records("r1", "resnet18", batches=tuple(range(1, 11))))
    out = run(capsys, tmp_path / "r.jsonl")[1]
    assert len(out.splitlines()) == 3
    assert out.startswith("resnet18, cpu: 10 compared with dense: 10 faster. Furthest ahead is ticket at batch ")


def test_a_runs_plots_come_back_with_intervals_and_predictions(tmp_path):
    series = Series("a", ((1, 1.5), (8, None)), ((1.4, 1.6), None), (2.0, None))
    plot = LinePlot("P", "batch", "times", (series,), "Note.", "predicted", 1.0, True)
    write_records(tmp_path / "records.jsonl", records("r1"))
    write_report(tmp_path, records("r1"), ReportText("T", plots=(plot,)))
    assert load_report(tmp_path).plots == (plot,)


def test_tables_keep_their_place_in_the_report(tmp_path):
    shown = Table("Goals", ("a",), ((1,),), first=True), Table("Rounds", ("a",), ((1,),), "A note.")
    write_records(tmp_path / "records.jsonl", records("r1"))
    write_report(tmp_path, records("r1"), ReportText("T", tables=shown))
    assert load_report(tmp_path).tables == shown
    stored = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert [table.get("first") for table in stored] == [True, None], "others are stored as ever"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["empty"], "empty holds no finished run"),
        (["files"], f"name files of records, such as files{os.sep}a.jsonl"),
        (["run"], "run holds no finished run"),
        (["changed.jsonl", "mine.jsonl"], "hold different records of 'ticket' at batch 1 on cpu of run r1"),
        (["mine.jsonl", "text.txt"], "text.txt is no file of records"),
        (["own", "--title", "T"], "--title with a run folder"),
        (["mine.jsonl", "/other/records.jsonl"], "no folder holds all sources but the root"),
    ],
)
def test_what_cannot_be_reported_is_refused_and_nothing_is_written(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    first = records("r1")
    write_records(tmp_path / "mine.jsonl", first)
    write_records(tmp_path / "changed.jsonl", [first[0], first[1].model_copy(update={"macs": 99})])
    (tmp_path / "text.txt").write_text("text\n")
    (tmp_path / "empty").mkdir()
    write_records(tmp_path / "files" / "a.jsonl", first)
    write_report(tmp_path / "own", first, ReportText("T"))
    write_records(tmp_path / "own" / "records.jsonl", first)
    (tmp_path / "run").mkdir()
    write_records(tmp_path / "run" / "records.jsonl", first)
    state = {"status": "interrupted", "command": "deploy-sparse run x", "recipe": "x", "config": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert ("continue it with: deploy-sparse run x" in err) == (words == ["run"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
