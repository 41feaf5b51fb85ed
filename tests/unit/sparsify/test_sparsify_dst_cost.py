"""The benchmark of dynamic sparse training: what it times are updates and steps without one; a short run writes lines."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from deploy_sparse.measure.interleave import Samples
from deploy_sparse.train.runtime import RuntimeConfig, start_runtime

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "dst_cost.py"
NETWORK, BATCH = "resnet_synthetic", 4


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("dst_cost", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def training(benchmark):
    def make(name):
        runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
        method = benchmark.make_method(NETWORK, name)
        return method, benchmark._training(NETWORK, method, BATCH, runtime)

    return make


def copied(method):
    return {name: mask.clone() for name, mask in method.masks.items()}


def moved(method, before):
    return sum(int((mask != before[name]).sum()) for name, mask in method.masks.items())


def test_both_methods_start_at_the_density_of_all_weights(benchmark):
    for name in benchmark.METHODS:
        method = benchmark.make_method(NETWORK, name)
        assert sum(int(method.masks[n].sum()) for n in method.names) == round(benchmark.DENSITY * method.total)
        assert "fc.weight" in method.names


def test_every_update_moves_masks_and_no_plain_step_does(benchmark, training):
    method, made = training("rigl")
    steps = benchmark._Steps(method)
    plain, update = (benchmark._step(made, BATCH, number) for number in (steps.plain, steps.update))
    for _ in range(3):
        before = copied(method)
        plain()
        assert moved(method, before) == 0
        update()
        assert moved(method, before) > 0.02 * method.budget
    assert method.figures()["density"] == pytest.approx(benchmark.DENSITY, abs=1e-4)


def test_chases_updates_remove_channels_and_start_over_before_they_run_out(benchmark, training):
    method, made = training("chase")
    steps = benchmark._Steps(method)
    plain, update = (benchmark._step(made, BATCH, number) for number in (steps.plain, steps.update))
    left = [method.figures()["channels_left"]]
    events = [taken for taken in benchmark.REMOVALS.events() if taken <= benchmark.REMOVALS.until // 2]
    for _ in events[1:]:
        before = copied(method)
        plain()
        assert moved(method, before) == 0
        update()
        left.append(method.figures()["channels_left"])
    assert all(later <= earlier for earlier, later in zip([1.0, *left], left, strict=False))
    assert left[-1] == pytest.approx(1 - benchmark.REMOVALS.target(events[-1]), abs=0.01)
    update()
    assert method.figures()["channels_left"] == left[0]
    plain()
    assert all(bool(torch.isfinite(weight).all()) for weight in made.model.parameters())


def test_an_updates_cost_is_what_it_adds_in_plain_steps(benchmark):
    plain = Samples(tuple((10.0 * drift,) for drift in (1, 2, 3, 1, 2)), 10.0)
    update = Samples(tuple((25.0 * drift, 25.0 * drift, 99.0) for drift in (1, 2, 3, 1, 2)), 30.0)
    found = benchmark._cost({"plain": plain, "update": update}, "plain", "update", 3.0)
    assert found["cost"] == pytest.approx(1.5)
    assert found["interval"] == pytest.approx([1.5, 1.5])
    assert found["cost_in_processor_time"] == pytest.approx(2.0)
    assert found["within_goal"]
    assert not benchmark._cost({"plain": plain, "update": update}, "plain", "update", 1.4)["within_goal"]
    assert found["step_ms"] == {"plain": 20.0, "update": 50.0}


def test_a_short_run_adds_one_line_a_measurement(benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / "records" / "results.jsonl"
    subject = f"{NETWORK}:{BATCH}"
    words = f"--device cpu --threads 1 --seconds 0.05 --block-ms 1 --subjects {subject} --updates {subject} --out"
    monkeypatch.setattr(sys, "argv", ["dst_cost.py", *words.split(), str(out)])
    benchmark.main()
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["kind"], row["method"]) for row in rows] == [
        (kind, method) for kind in ("step between updates", "update") for method in ("rigl", "chase")
    ]
    for row in rows:
        low, high = row["interval"]
        assert low <= row["cost"] <= high
        assert row["within_goal"] == (high <= row["goal"])
        assert {len(blocks) for blocks in row["blocks_ms"].values()} == {row["pairs"]}
        assert (row["network"], row["batch"]) == (NETWORK, BATCH)
        assert {"torch", "processor"} <= row["environment"].keys()
    rests, updates = rows[:2], rows[2:]
    assert all(row["figures"]["explored"] == pytest.approx(0.1, abs=1e-4) for row in rests)
    assert all(row["figures"]["explored"] > 0.11 for row in updates)
    assert updates[1]["figures"]["channels_left"] < 1
    assert all(row["goal"] == 0.05 and row["masks_alone_over_dense"] > 0 for row in rests)
    assert {row["goal"] for row in updates} == {3.0}
    assert "of a dense step" in printed
    assert "at most 3 plain steps" in printed
    assert out.with_suffix(".md").read_text() == benchmark.text(rows) == printed[:-1]
    assert "of a dense step" not in benchmark.text(updates)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--updates", "--methods", "rigl"])
    benchmark.main()
    assert len(out.read_text().splitlines()) == len(rows) + 1
