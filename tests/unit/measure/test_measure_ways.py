"""Ways of timing in profile: both clocks, transfers, CUDA graphs, cold caches, pinned processors, and what records say."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure import profile as profile_module
from deploy_sparse.measure.profile import Facts, profile
from deploy_sparse.measure.record_conditions import GpuState

FAST = {"warmup_ms": 2.0, "duration_s": 0.05, "block_ms": 5.0}


@dataclass
class Prepared:
    """Like a prepared run of TensorRT: ``gpu_ms()`` runs once and tells the GPU's own time."""

    machine: object
    name: str
    ms: float
    launch_ms: float

    def __call__(self):
        self.machine.work(self.name, self.ms + self.launch_ms)()

    def gpu_ms(self):
        self.machine.work(f"{self.name} on the GPU", self.ms + self.launch_ms)()
        return self.ms


@dataclass
class GpuEngine:
    """Answers like an engine of a GPU: ``ms`` on it, ``launch_ms`` before, ``copy_ms`` for the copies of ``run``."""

    name: str
    machine: object
    ms: float
    launch_ms: float = 0.5
    copy_ms: float = 3.0
    target: dict = field(default_factory=lambda: {"name": "tensorrt-h100", "runtime": "tensorrt"})
    precision: dict = field(default_factory=lambda: {"asked": "fp16", "built": "fp16", "tf32": False})
    opened: list = field(default_factory=list)

    @property
    def manifest(self):
        return {"target": self.target, "target_digest": "cd" * 32, "precision": self.precision}

    def runnable(self):
        return None

    def open(self, *, cuda_graph=False):
        self.opened.append(cuda_graph)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.append("closed")

    def sample_inputs(self, batch):
        return {"input": np.zeros((batch, 3), np.float32)}

    def run(self, feeds):
        self.machine.work(f"run {self.name}", self.ms + self.launch_ms + self.copy_ms)()
        return {"output": feeds["input"]}

    def prepare(self, feeds):
        return Prepared(self.machine, self.name, self.ms, self.launch_ms)


class Monitor:
    """Like the GPU's monitor."""

    name, driver, power_limit_w, sm_max_mhz = "NVIDIA H200", "580.65", 700.0, 1980

    def __init__(self):
        self.events = []

    def state(self):
        self.events.append("state")
        return GpuState(sm_mhz=1900, power_w=400.0)

    def clock(self):
        self.events.append("clock")
        return 1950, ("power cap",)

    def __enter__(self):
        self.events.append("open")
        return self

    def __exit__(self, *_):
        self.events.append("closed")


@pytest.fixture
def monitor(monkeypatch):
    found = Monitor()
    monkeypatch.setattr(profile_module, "gpu_monitor", lambda: found)
    return found


@pytest.fixture
def engines(machine, monitor):
    return {"dense": GpuEngine("dense", machine, 2.0), "ticket": GpuEngine("ticket", machine, 1.0)}


def test_gpu_engines_are_timed_on_both_clocks(machine, engines, monitor):
    found = profile(engines, clock=machine.clock, **FAST)
    dense, ticket = found.records
    assert (dense.stats.p50, ticket.stats.p50) == (2.5, 1.5)
    assert (dense.device_stats.p50, ticket.device_stats.p50) == (2.0, 1.0)
    assert len(dense.device_samples_ms) == len(dense.samples_ms)
    comparison = found.comparisons[0]
    assert comparison.ratio == pytest.approx(2.5 / 1.5)
    assert comparison.device_ratio == 2
    assert (
        "ticket kept the GPU at work for 0.67 of its wall time; the rest is launches and waiting" in comparison.reasons
    )
    assert "the GPU's clocks were held down meanwhile: power cap" in comparison.reasons
    for record in found.records:
        assert (record.conditions.transfers, record.conditions.cuda_graph, record.precision) == (
            "excluded",
            False,
            "fp16",
        )
        gpu = record.conditions.gpu
        assert (gpu.name, gpu.sm_mhz, gpu.held_by, gpu.before.power_w) == (
            "NVIDIA H200",
            (1900, 1950),
            ("power cap",),
            400,
        )
    assert monitor.events[:2] == ["open", "state"]
    assert monitor.events[-2:] == ["state", "closed"]
    assert "run dense" in machine.log[0]  # the check before, not timed


def test_transfers_are_timed_beside_the_computation_alone(machine, engines):
    found = profile(engines, transfers="included", clock=machine.clock, **FAST)
    dense = found.records[0]
    assert dense.stats.p50 == 5.5
    assert dense.device_stats.p50 == 2.0
    assert dense.conditions.transfers == "included"
    assert any("the rest is transfers, launches and waiting" in reason for reason in found.comparisons[0].reasons)


def test_graphs_are_asked_for_and_recorded(machine, engines):
    found = profile(engines, cuda_graph=True, clock=machine.clock, **FAST)
    assert engines["dense"].opened == [True, "closed"]
    assert all(record.conditions.cuda_graph is True for record in found.records)
    profile(engines, clock=machine.clock, **FAST)
    assert engines["dense"].opened[2:] == [False, "closed"]


TORCH = {"name": "torch-cuda", "runtime": "torch", "device": "cuda"}


@pytest.mark.parametrize(
    ("target", "transfers", "graph"),
    [
        (TORCH, "excluded", False),
        ({**TORCH, "cuda_graph": True}, "excluded", True),
        ({**TORCH, "cuda_graph": True}, "included", False),  # torch replays prepared runs only
    ],
)
def test_graphs_of_a_target_are_recorded_where_they_are_in_force(machine, engines, target, transfers, graph):
    for engine in engines.values():
        engine.target = target
    found = profile(engines, transfers=transfers, clock=machine.clock, **FAST)
    assert [record.conditions.cuda_graph for record in found.records] == [graph, graph]


class Opened:
    """A runner that somebody else opened."""

    def __init__(self, engine):
        self.engine = engine
        for name in ("manifest", "sample_inputs", "run", "prepare"):
            setattr(self, name, getattr(engine, name))


def test_what_cannot_be_had_is_refused_before_anything_runs(machine, engines):
    cpu = GpuEngine("cpu", machine, 1.0, target={"name": "cpu", "runtime": "onnxruntime", "threads": 4})
    torch = GpuEngine("torch", machine, 1.0, target=TORCH)
    fp32 = GpuEngine("fp32", machine, 1.0, precision={"built": "fp32", "tf32": True})
    for subjects, way, message in (
        ({"dense": cpu}, {"cuda_graph": True}, r"'dense' does not run on a GPU(.|\n)*leave CUDA graphs out"),
        (
            {"dense": Opened(engines["dense"])},
            {"cuda_graph": True},
            r"open already(.|\n)*load_engine\(…, cuda_graph=True\)",
        ),
        ({"dense": torch}, {"cuda_graph": True, "transfers": "included"}, "with torch 'dense' replays a graph only"),
        ({"dense": lambda: None}, {"transfers": "included"}, "'dense' is a callable, which copies what it copies"),
        (engines, {"cache": "cold"}, r"cold caches were asked for, and 'dense' runs on a GPU"),
        (engines, {"cache": "colt"}, r"cache = 'colt'\n  expected: one of warm, cold\n.*did you mean 'cold'"),
        (engines, {"transfers": True}, r"transfers = True\n  expected: one of excluded, included"),
        ({"dense": cpu}, {"cpus": [0, 1]}, "4 threads on 2 processors"),
        ({"dense": cpu}, {"cpus": []}, "the processors are none"),
        ({"dense": engines["dense"], "ticket": fp32}, {}, r"different precisions: dense fp16, ticket tf32(.|\n)*own"),
        (
            {"dense": lambda: None, "b": lambda: None},
            {"facts": {"dense": Facts(precision="fp32"), "b": Facts(precision="int8")}},
            "different precisions: dense fp32, b int8",
        ),
        (
            {"dense": lambda: None, "b": lambda: None},
            {"facts": {"dense": Facts(network="vgg16"), "b": Facts(network="resnet18")}},
            "different networks: dense vgg16, b resnet18",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            profile(subjects, clock=machine.clock, **FAST, **way)
    assert machine.log == []
    assert not any(engine.opened for engine in (*engines.values(), cpu, torch, fp32))


def test_opened_engine_does_not_tell_of_its_graphs(machine, engines):
    found = profile({name: Opened(engine) for name, engine in engines.items()}, clock=machine.clock, **FAST)
    assert [record.conditions.cuda_graph for record in found.records] == [None, None]
    machine.log.clear()
    with pytest.raises(ConfigError, match=r"'ticket' is open already(.|\n)*not known, as it is of 'dense'"):
        profile({"dense": engines["dense"], "ticket": Opened(engines["ticket"])}, clock=machine.clock, **FAST)
    assert machine.log == []


class FakeEvictor:
    bytes = 64 << 20

    def __init__(self, cpus):
        self.cpus, self.closed = cpus, False
        FakeEvictor.made = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def __call__(self):
        self.machine.work("evict", 2.0)()


def test_cold_caches_are_evicted_before_each_timed_call(machine, monkeypatch):
    FakeEvictor.machine = machine
    monkeypatch.setattr(profile_module, "Evictor", FakeEvictor)
    calls = {"dense": machine.work("dense", 2.0), "ticket": machine.work("ticket", 1.0)}
    found = profile(calls, cache="cold", clock=machine.clock, **FAST)
    timed = machine.log[5:]  # after a check of each, one warm-up of 2 ms for dense, and two for ticket
    assert timed[::2] == ["evict"] * (len(timed) // 2)
    assert set(timed[1::2]) == {"dense", "ticket"}
    for record in found.records:
        assert (record.conditions.cache, record.conditions.evicted_bytes) == ("cold", 64 << 20)
    assert FakeEvictor.made.cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert FakeEvictor.made.closed
    assert found.comparisons[0].ratio == 2


def test_records_say_how_a_callable_was_timed(machine):
    before = os.sched_getaffinity(0)
    one = min(before)
    seen = []

    def call():
        seen.append(os.sched_getaffinity(0))
        machine.work("dense", 1.0)()

    facts = Facts(network="vgg16", form="channels", precision="fp32", sparsity=0.8, accuracy=0.9)
    found = profile({"dense": call}, cpus=[one], facts={"dense": facts}, clock=machine.clock, **FAST).records[0]
    assert (found.network, found.form, found.precision, found.sparsity) == ("vgg16", "channels", "fp32", 0.8)
    assert (found.schema_version, found.device_stats, found.device_samples_ms) == (2, None, ())
    conditions = found.conditions
    assert (conditions.cpus, conditions.cache, conditions.transfers) == (str(one), "warm", None)
    assert (conditions.cuda_graph, conditions.gpu, conditions.evicted_bytes) == (None, None, None)
    assert set(map(frozenset, seen)) == {frozenset({one})}
    assert os.sched_getaffinity(0) == before


def test_network_told_of_one_subject_is_that_of_all(machine):
    calls = {name: machine.work(name, 1.0) for name in ("dense", "ticket")}
    found = profile(calls, facts={"ticket": Facts(network="vgg16")}, clock=machine.clock, **FAST)
    assert [record.network for record in found.records] == ["vgg16", "vgg16"]


def test_precision_is_the_engines_own_before_the_callers_word(machine, engines):
    for engine in engines.values():
        engine.precision = {"asked": "fp32", "built": "fp32", "tf32": True}
    found = profile(engines, facts={"dense": Facts(precision="int8")}, clock=machine.clock, **FAST)
    assert [record.precision for record in found.records] == ["tf32", "tf32"]


def test_engine_that_cannot_run_states_no_way_of_timing(engines, monkeypatch):
    for engine in engines.values():
        monkeypatch.setattr(engine, "runnable", lambda: "no NVIDIA GPU", raising=False)
    record = profile(engines).records[0]
    assert (record.conditions.cache, record.conditions.transfers, record.conditions.cpus) == (None, None, None)
    assert record.precision == "fp16"


@pytest.mark.parametrize("wrong", [{"sparsity": 80}, {"accuracy": 97.8}])
def test_facts_in_percent_are_refused_before_timing(wrong):
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Facts(**wrong)
