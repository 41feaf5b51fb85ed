import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import deploy_sparse
from deploy_sparse.errors import ConfigError, EngineError
from deploy_sparse.measure.profile import Facts, profile
from deploy_sparse.measure.record import read_records

FAST = {"warmup_ms": 2.0, "duration_s": 0.1, "block_ms": 5.0}


@dataclass
class FakeEngine:
    """Answers like an engine: doubles its input, takes ``ms`` a call on the fake machine."""

    name: str
    machine: object
    ms: float = 1.0
    target: str = "cpu"
    reason: str | None = None
    scale: float = 2.0
    width: int = 3
    opened: list = field(default_factory=list)
    fed: list = field(default_factory=list)

    @property
    def manifest(self):
        return {
            "target": {"name": self.target, "runtime": "onnxruntime", "threads": 2},
            "target_digest": "cd" * 32,
            "onnx_sha256": "ab" * 32,
            "digest": "ef" * 32,
            "macs": int(1e6 * self.ms),
            "parameters": 1000,
            "bytes": 4096,
            "build_seconds": 1.5,
        }

    def runnable(self):
        return self.reason

    def open(self):
        assert self.reason is None, "an engine that cannot run is never opened"
        self.opened.append("open")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.append("closed")

    def sample_inputs(self, batch, seed=0):
        if batch > 16:
            raise EngineError(f"batch {batch} is outside", expected="1 to 16", fix="split it")
        return {"input": np.random.default_rng(seed).normal(size=(batch, 3)).astype(np.float32)}

    def run(self, feeds):
        self.fed.append(feeds["input"])
        return {"output": self.scale * feeds["input"][:, : self.width]}

    def prepare(self, feeds):
        self.fed.append(feeds["input"])
        work = self.machine.work(self.name, self.ms, noise=0.1)
        return lambda: work()


@pytest.fixture
def engines(machine):
    return {"dense": FakeEngine("dense", machine, 2.0), "ticket": FakeEngine("ticket", machine, 1.0)}


def test_two_engines_at_two_batches(machine, engines, tmp_path):
    found = profile(engines, batches=(1, 8), clock=machine.clock, **FAST)
    assert [(r.subject, r.batch, r.status) for r in found.records] == [
        ("dense", 1, "timed"),
        ("ticket", 1, "timed"),
        ("dense", 8, "timed"),
        ("ticket", 8, "timed"),
    ]
    assert [(c.subject, c.batch, c.verdict) for c in found.comparisons] == [
        ("ticket", 1, "faster"),
        ("ticket", 8, "faster"),
    ]
    assert all(c.ratio == pytest.approx(2, rel=0.05) for c in found.comparisons)
    assert all(c.mac_ratio == 2 for c in found.comparisons)
    record = found.records[0]
    assert (record.target, record.runtime, record.conditions.threads) == ("cpu", "onnxruntime", 2)
    assert (record.parameters, record.macs, record.engine_bytes, record.build_seconds) == (1000, 2_000_000, 4096, 1.5)
    assert record.hashes == {"engine": "ef" * 32, "onnx": "ab" * 32, "target": "cd" * 32}
    assert record.conditions.interleaved_with == ("ticket",)
    assert record.environment["python"]
    assert len({r.run_id for r in found.records}) == 1
    assert all(engine.opened == ["open", "closed"] for engine in engines.values())
    found.save(tmp_path / "run.jsonl")
    assert read_records(tmp_path / "run.jsonl") == found.records


def test_all_subjects_get_the_same_feeds(machine, engines):
    profile(engines, batches=(4,), clock=machine.clock, **FAST)
    for mine, other in zip(engines["dense"].fed, engines["ticket"].fed, strict=True):
        assert mine is other


def test_table_shows_every_subject(machine, engines):
    facts = {"dense": Facts(accuracy=0.9778), "ticket": Facts(accuracy=0.97, ticket="99" * 32)}
    found = profile(engines, facts=facts, clock=machine.clock, **FAST)
    lines = found.table().splitlines()
    assert lines[0].split()[:3] == ["subject", "target", "batch"]
    assert lines[2].startswith("dense")
    assert "97.78 %" in lines[2]
    assert "baseline" in lines[2]
    assert "97.00 %" in lines[3]
    assert lines[3].rstrip().endswith("2.00×")
    assert found.records[1].hashes["ticket"] == "99" * 32


def test_plain_callables_are_subjects_too(machine):
    calls = {"dense": machine.work("dense", 2.0), "ticket": machine.work("ticket", 1.0)}
    found = profile(
        calls, "dense", facts={"dense": Facts(macs=4), "ticket": Facts(macs=2)}, clock=machine.clock, **FAST
    )
    assert found.comparisons[0].ratio == pytest.approx(2)
    assert found.comparisons[0].mac_ratio == 2
    assert {record.target for record in found.records} == {"this process"}


def test_engine_that_cannot_run_is_listed_without_times(machine, engines):
    engines["ticket"].reason = "compiled, not timed here: no NVIDIA GPU"
    found = profile(engines, clock=machine.clock, **FAST)
    ticket = found.records[1]
    assert (ticket.status, ticket.reason) == ("compiled, not timed here", "no NVIDIA GPU")
    assert ticket.stats is None
    assert ticket.samples_ms == ()
    assert ticket.conditions.interleaved_with == ()
    assert (ticket.engine_bytes, ticket.build_seconds) == (4096, 1.5)
    assert found.comparisons == ()
    assert "compiled, not timed here: no NVIDIA GPU" in found.table()
    assert engines["ticket"].opened == []


def test_no_engine_can_run(engines):
    for engine in engines.values():
        engine.reason = "no NVIDIA GPU"
    found = profile(engines, batches=(1, 2))
    assert [(record.timed, record.batch) for record in found.records] == [(False, 1)] * 2  # nothing to say twice
    assert "no NVIDIA GPU" in found.table()


def test_unknown_baseline_and_facts_get_a_hint(engines):
    with pytest.raises(ConfigError, match=r"unknown baseline 'dence'(.|\n)*did you mean 'dense'"):
        profile(engines, "dence")
    with pytest.raises(ConfigError, match=r"unknown subject in facts 'tickets'(.|\n)*did you mean 'ticket'"):
        profile(engines, facts={"tickets": Facts()})


def test_no_subject_is_refused(engines):
    with pytest.raises(ConfigError, match="no subject to profile"):
        profile({})
    with pytest.raises(ConfigError, match=r"the subjects are a list(.|\n)*a dictionary from name to engine"):
        profile(list(engines.values()))


class Network:
    """Like an nn.Module: callable with anything, says in ``forward`` what it needs."""

    def forward(self, x):
        return x

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("some/engine", r"is the path 'some/engine'(.|\n)*deploy_sparse\.load_engine\('some/engine'\), or open_entry"),
        (Path("x.onnx"), r"is the path 'x\.onnx'(.|\n)*deploy_sparse\.build_engine"),
        (
            Network(),
            r"of type Network, which is no engine and takes arguments(.|\n)*build_engine(.|\n)*lambda: a\(inputs\)",
        ),
        (lambda x: x, "takes arguments"),
        (3, r"of type int, which is no engine and cannot be called"),
        (None, r"of type NoneType"),
    ],
)
def test_what_is_no_subject_says_what_to_do(machine, subject, text):
    with pytest.raises(ConfigError, match=text):
        profile({"a": subject}, clock=machine.clock, **FAST)


def test_built_in_function_is_a_callable_without_arguments(machine):
    assert profile({"dense": machine.work("dense", 1.0), "dict": dict}, duration_s=0.001, warmup_ms=0, block_ms=0.1)


@pytest.mark.parametrize("batches", [(), (0,), (1.5,), (True,), (2, 2), 4, "18", None])
def test_bad_batches_are_refused(engines, batches):
    with pytest.raises(ConfigError, match=r"the batch sizes are (.|\n)*give for example 1 and 8, or a list of one"):
        profile(engines, batches=batches)


def test_batches_may_come_from_a_generator(machine, engines):
    found = profile(engines, batches=(b for b in (1, 2)), clock=machine.clock, **FAST)
    assert [record.batch for record in found.records] == [1, 1, 2, 2]


@pytest.mark.parametrize("facts", [[Facts()], {"dense": {"accuracy": 0.9}}, {"dense": 0.9}])
def test_facts_of_another_type_are_refused_before_timing(machine, engines, facts):
    with pytest.raises(ConfigError, match=r"the facts (.|\n)*Facts\(accuracy=0\.95\)"):
        profile(engines, facts=facts, clock=machine.clock, **FAST)
    assert machine.log == []


@dataclass
class Opened:
    """What load_engine gives: a runner of an engine, without ``open`` and ``runnable``."""

    engine: FakeEngine

    def __getattr__(self, name):
        if name not in ("manifest", "sample_inputs", "run", "prepare"):
            raise AttributeError(name)
        return getattr(self.engine, name)


def test_opened_engine_is_a_subject_and_stays_open(machine, engines):
    found = profile({"dense": engines["dense"], "ticket": Opened(engines["ticket"])}, clock=machine.clock, **FAST)
    assert found.comparisons[0].verdict == "faster"
    assert found.records[1].hashes["engine"] == "ef" * 32
    assert engines["ticket"].opened == []
    assert engines["dense"].opened == ["open", "closed"]


def test_batch_outside_the_range_is_the_engines_own_error_before_any_timing(machine, engines):
    with pytest.raises(EngineError, match="batch 32 is outside"):
        profile(engines, batches=(1, 32), clock=machine.clock, **FAST)
    assert machine.log == []
    assert engines["dense"].opened == ["open", "closed"]


def test_mixed_targets_are_refused(engines):
    engines["ticket"].target = "rtx-sm89"
    with pytest.raises(ConfigError, match=r"dense for cpu, ticket for rtx-sm89(.|\n)*in a run of their own"):
        profile(engines)


def test_outputs_must_be_finite_and_of_equal_shape(machine, engines):
    engines["ticket"].scale = float("nan")
    with pytest.raises(EngineError, match="output 'output' of 'ticket' at batch 1 holds NaN or infinity"):
        profile(engines, clock=machine.clock, **FAST)
    engines["ticket"].scale, engines["ticket"].width = 1.0, 2
    with pytest.raises(EngineError, match=r"'ticket' at batch 1 gives \{'output': \(1, 2\)\}(.|\n)*\(1, 3\)"):
        profile(engines, clock=machine.clock, **FAST)
    assert machine.log == []


def test_interrupt_closes_the_engines(machine, engines):
    def poll():
        if len(machine.log) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(engines, poll=poll, clock=machine.clock, **FAST)
    assert all(engine.opened == ["open", "closed"] for engine in engines.values())


def test_default_durations_make_a_profile_of_about_six_seconds(machine, engines):
    found = profile(engines, batches=(1, 8), clock=machine.clock)
    assert 5 < machine.wall / 1e9 < 7
    assert all(len(record.samples_ms) >= 20 for record in found.records)


def test_real_clock_and_public_name():
    calls = {"dense": lambda: sum(range(2000)), "ticket": lambda: sum(range(200))}
    found = deploy_sparse.profile(calls, duration_s=0.02, warmup_ms=1, block_ms=1)
    assert all(record.stats.min > 0 and record.cpu_ms > 0 for record in found.records)


def test_measuring_imports_no_heavy_library():
    heavy = "torch onnx onnxruntime tensorrt tensorrt_rtx matplotlib jinja2"
    script = (
        "import sys, deploy_sparse; deploy_sparse.profile; import deploy_sparse.measure.report;"
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
