"""The benchmark of the block kernel: what it times, what it writes, and what it says without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.measure.interleave import Samples

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "block_kernel.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("block_kernel", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["runs", "scattered"])
@pytest.mark.parametrize(("channels", "sparsity", "kept"), [(256, 0.75, 64), (512, 0.6, 192), (256, 0.9, 32)])
def test_blocks_cover_the_rows_and_share_the_channels(benchmark, channels, sparsity, kept, form):
    blocks = benchmark.blocks_of(channels, sparsity, form)
    assert sorted(row for rows, _ in blocks for row in rows) == list(range(channels))
    assert {len(set(columns)) for _, columns in blocks} == {kept}
    assert len({tuple(columns) for _, columns in blocks}) == len(blocks)
    aligned = all(columns[at] % 8 == 0 and columns[at + 7] == columns[at] + 7 for _, columns in blocks for at in range(0, kept, 8))  # fmt: skip
    assert aligned == (form == "runs")


def test_a_block_counts_by_its_median(benchmark):
    assert benchmark.medians(Samples(((1.0, 2.0, 9.0), (4.0,)), 1.0)).tolist() == [2.0, 4.0]


def test_without_a_gpu_nothing_is_written(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "local_gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["block_kernel.py", "--out", str(tmp_path / "results.jsonl")])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    assert "no NVIDIA GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lines_are_added_and_the_table_holds_them(benchmark, tmp_path, monkeypatch):
    def measure(channels, sparsity, form, batch, *, seconds):
        about = {
            "channels": channels,
            "size": benchmark.SIZES[channels],
            "batch": batch,
            "form": form,
            "device": "none",
        }
        times = {"eager": 0.004, "compiled": 0.003, "kernel": 0.001}
        goal = benchmark.GOALS.get(sparsity)
        return {**about, "sparsity_asked": sparsity, "sparsity": sparsity, "ms": times, "speedup": 3.0, "ideal": 4.0, "goal": goal}  # fmt: skip

    monkeypatch.setattr(benchmark, "local_gpu", lambda: Gpu("none", "SM90"))
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark.torch.backends.cudnn, "benchmark", False)
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["block_kernel.py", "--channels", "256", "--sparsities", "0.75", "0.5", "--out", str(out)])  # fmt: skip
    for lines in (4, 8):
        benchmark.main()
        assert len([json.loads(line) for line in out.read_text().splitlines()]) == lines
    table = out.with_suffix(".md").read_text()
    assert table.count("256@14") == 8
    assert table.count("2.6 at 75%") == 4
    assert table.count("–") == 4
