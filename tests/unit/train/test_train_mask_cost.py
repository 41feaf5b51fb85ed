"""The benchmark of masks: its ratio is that of the pairs, and a short run writes a whole line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from deploy_sparse.measure.interleave import Samples

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "mask_cost.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("mask_cost", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cost_is_the_median_of_paired_blocks(benchmark):
    dense = Samples(tuple((10.0 * drift, 10.0 * drift, 99.0) for drift in (1, 2, 3, 1, 2)), 10.0)
    masked = Samples(tuple((10.4 * drift,) for drift in (1, 2, 3, 1, 2)), 10.4)
    assert benchmark.relative_cost(dense, masked) == pytest.approx((0.04, 0.04, 0.04))


def test_a_short_run_adds_one_line_a_subject(benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / "records" / "mask_cost.jsonl"
    words = "--device cpu --threads 1 --seconds 0.05 --block-ms 1 --subjects resnet_synthetic:4 --out"
    monkeypatch.setattr(sys, "argv", ["mask_cost.py", *words.split(), str(out)])
    for lines in (1, 2):
        benchmark.main()
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == lines
    low, high = rows[0]["interval"]
    assert low <= rows[0]["cost"] <= high
    assert rows[0]["within_goal"] == (high <= 0.05)
    assert (rows[0]["network"], rows[0]["batch"]) == ("resnet_synthetic", 4)
    assert rows[0]["density"] == pytest.approx(0.2, abs=0.01)
    assert len(rows[0]["blocks_ms"]["dense"]) == len(rows[0]["blocks_ms"]["masked"]) == rows[0]["pairs"]
    assert {"torch", "processor"} <= rows[0]["environment"].keys()
    assert "of a dense step" in capsys.readouterr().out
