"""Whole networks on a target: built once, timed at all batches beside the dense one."""

from types import SimpleNamespace

import pytest

from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import Interrupted
from deploy_sparse.tune import network_bench
from deploy_sparse.tune.choice import BatchTime, NetworkTime
from deploy_sparse.tune.network_bench import NetworkBench

CPU = load_target("cpu")


def compact(macs):
    return SimpleNamespace(plan=SimpleNamespace(cost_after=SimpleNamespace(macs=macs)))


def bench(tmp_path, duration_s=1.0, poll=lambda: None):
    return NetworkBench(CPU, (4, 1), duration_s, tmp_path, poll)


def test_networks_are_timed_beside_dense_as_often_as_asked(monkeypatch, tmp_path):
    built, asked = [], []

    def profile(engines, baseline, **options):
        asked.append((list(engines), baseline, options))
        ratio = {"a": 1.5, "b": 0.5}
        return SimpleNamespace(
            comparisons=[
                SimpleNamespace(subject=name, batch=batch, ratio=ratio[name] + batch, low=1.0, high=None)
                for batch in options["batches"]
                for name in engines
                if name != baseline
            ]
        )

    monkeypatch.setattr(network_bench, "build_engine", lambda made, target, *, out, name: built.append(name) or name)
    monkeypatch.setattr(network_bench, "profile", profile)
    made = bench(tmp_path)
    for name, macs in (("dense", 9), ("a", 5), ("b", 7)):
        made.add(name, compact(macs))
    assert made.times(["a", "b"]) == (
        NetworkTime("a", 5, 5.5, 1.0, None, (BatchTime(1, 2.5, 1.0, None),)),
        NetworkTime("b", 7, 4.5, 1.0, None, (BatchTime(1, 1.5, 1.0, None),)),
    )
    assert [time.name for time in made.times(["b"])] == ["b"]
    assert built == ["network0", "network1", "network2"]
    assert [names for names, *_ in asked] == [["dense", "a", "b"], ["dense", "b"]]
    assert {baseline for _, baseline, _ in asked} == {"dense"}
    assert asked[0][2] == {"batches": (4, 1), "duration_s": 1.0, "block_ms": 50.0, "poll": made.poll}
    short = bench(tmp_path, duration_s=0.08)  # blocks are shorter too, so that there are enough for an interval
    short.add("dense", compact(9))
    short.add("a", compact(5))
    short.times(["a"])
    assert asked[-1][2]["block_ms"] == pytest.approx(5.0)


def test_a_stop_is_heard_before_each_build(monkeypatch, tmp_path):
    def poll():
        raise Interrupted("stopped", signal_number=15, fix="go on")

    monkeypatch.setattr(network_bench, "build_engine", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(Interrupted):
        bench(tmp_path, poll=poll).add("dense", compact(1))
