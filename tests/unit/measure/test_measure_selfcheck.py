"""The self-check: what it counts, what it sets beside other clocks, and what its tables say."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from deploy_sparse.measure.compare import compare
from deploy_sparse.measure.timing import Clock

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "selfcheck.py"
WAY = {"duration_s": 0.02, "warmup_ms": 1.0, "block_ms": 1.0, "cpus": None}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("selfcheck", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_work_is_counted(check):
    work = check.Counted(7)
    work()
    work()
    assert (work.done, work.calls) == (14, 2)
    np.testing.assert_allclose(check.Counted.result, check.Counted.factors[0] * check.Counted.factors[1])


def test_known_ratio_by_a_clock_that_counts_the_work(check, monkeypatch):
    """Where each product takes a microsecond, the ratio is the truth and the interval holds it."""
    ns = [0]

    class Counted(check.Counted):
        def __call__(self):
            ns[0] += 1000 * self.units
            self.done += self.units
            self.calls += 1

    monkeypatch.setattr(check, "Counted", Counted)
    for units, truth, verdict in (
        ((2100, 2000), 1.05, "faster"),
        ((20, 20), 1, "cannot tell"),
        ((20, 25), 0.8, "slower"),
    ):
        row = check.known_ratio(units, 2, {**WAY, "clock": Clock(lambda: ns[0], lambda: ns[0])})
        assert row["truth"] == pytest.approx(truth)
        assert row["interval"] == pytest.approx([truth, truth])
        assert (row["holds"], row["verdict"], row["expected"], row["trial"]) == ("yes", verdict, verdict, 2)
        assert row["ratio_in_processor_time"] == pytest.approx(truth, abs=1e-4)
        assert abs(row["off"]) < 1e-6


def test_work_that_is_lost_is_noticed(check, monkeypatch):
    class Forgetful(check.Counted):
        def __call__(self):
            self.calls += 1
            self.done += self.units if self.calls > 1 else 0

    monkeypatch.setattr(check, "Counted", Forgetful)
    with pytest.raises(AssertionError, match="work was lost"):
        check.known_ratio((2, 2), 0, WAY)


@pytest.mark.parametrize(
    ("low", "high", "truth", "holds"),
    [(1.9, 2.1, 2.0, "yes"), (2.01, 2.1, 2.0, "within 1%"), (2.03, 2.1, 2.0, "no"), (1.8, 1.97, 2.0, "no"), (None, None, 2.0, "no interval")],
)  # fmt: skip
def test_what_holding_the_truth_means(check, make_record, low, high, truth, holds):
    from dataclasses import replace

    found = replace(compare(make_record(), make_record("ticket")), low=low, high=high)
    assert check._holds(found, truth) == holds


def test_their_times_are_set_beside_the_same_calls(check, make_record):
    ours = make_record(blocks=((1.0, 2.0), (3.0,), (4.0, 5.0)))
    profiled = [{"name": "session_initialization", "dur": 9}] + [
        {"name": "model_run", "dur": 1000 * n} for n in range(7)
    ]
    runs = check.model_runs(profiled)
    assert runs == [0, 1, 2, 3, 4, 5, 6]
    theirs = check.by_their_clock(ours, runs)
    assert theirs.samples_ms == ((2, 3), (4,), (5, 6))  # the first two were warm-up
    assert theirs.stats.p50 == 4
    row = check._beside(64, ours, theirs, WAY)
    assert row["more_us"] == {"p1": -1000, "p50": -1000, "p99": -1000}
    assert not row["holds"]
    assert check._beside(64, theirs, ours, WAY)["holds"]


def test_network_computes_what_it_says(check):
    session = onnxruntime.InferenceSession(check.network(8), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": np.ones((1, 8, check.IMAGE, check.IMAGE), np.float32)})
    assert output.shape == (1, 8, check.IMAGE, check.IMAGE)
    assert output.min() == 0 < output.max()


HYPERFINE = """#!{python}
import json, subprocess, sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("hyperfine 1.19.0"))
out = next(word.split("=", 1)[1] for word in sys.argv if word.startswith("--export-json="))
commands = [word for word in sys.argv[1:] if not word.startswith("--")]
for command in commands:
    subprocess.run(command, shell=True, check=True)
times = [[0.2, 0.1, 0.3], [0.1, 0.05, 0.15]]
json.dump({{"results": [{{"command": c, "times": t}} for c, t in zip(commands, times)]}}, open(out, "w"))
"""


def test_a_short_run_adds_one_line_a_measurement(check, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "bin" / "hyperfine"
    tool.parent.mkdir()
    tool.write_text(HYPERFINE.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(check, "RATIOS", ((20, 20), (40, 20)))
    monkeypatch.setattr(check, "LOOPS", (20, 10))
    monkeypatch.setattr(check, "WIDTHS", (16, 8))
    monkeypatch.setattr(check, "MEMORY", 1 << 12)
    out = tmp_path / "records" / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["selfcheck.py", "--out", str(out), "--seconds", "0.02", "--trials", "2"])
    check.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == [
        *["known ratio"] * 4,
        *["calls by ONNX Runtime's profiler"] * 2,
        "ratio by ONNX Runtime's profiler",
        "cold caches",
        "hyperfine",
    ]
    assert [(row["units"], row["trial"]) for row in rows[:4]] == [
        ([20, 20], 0),
        ([40, 20], 0),
        ([20, 20], 1),
        ([40, 20], 1),
    ]
    for row in rows[4:6]:
        assert row["holds"]  # their run lies within our call
        assert row["calls"] == row["stats"][{16: "dense", 8: "ticket"}[row["width"]]]["count"]
    assert rows[7]["evicted_bytes"] > 1 << 20
    assert rows[8]["theirs_p50_ms"] == [200, 100]
    assert rows[8]["truth"] == pytest.approx(2)
    for row in rows:
        assert {"onnxruntime", "processor"} <= row["environment"].keys()
        assert row["cpus"]
    printed = capsys.readouterr().out
    assert out.with_suffix(".md").read_text() == check.text(rows) == printed[:-1]
    assert "intervals hold the truth" in printed
    assert "hyperfine 1.19.0, processes" in printed

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", "hyperfine"])
    check.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (len(rows), rows[-1]["installed"]) == (10, False)
    assert "hyperfine is not installed here" in check.text(rows[-1:])
