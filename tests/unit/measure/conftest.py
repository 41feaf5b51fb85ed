"""A clock that only moves when a fake call works, and records made from it."""

import gc
from datetime import UTC, datetime

import numpy as np
import pytest

from deploy_sparse.measure.record import Conditions, LatencyRecord
from deploy_sparse.measure.timing import Clock, summarise


class FakeMachine:
    """Wall and CPU time in ns that advance when a call made by :meth:`work` runs; ``log`` names the calls in order."""

    def __init__(self, seed=0):
        self.wall = self.cpu = 0
        self.speed = 1.0
        self.log = []
        self.random = np.random.default_rng(seed)
        self.clock = Clock(lambda: self.wall, lambda: self.cpu)

    def work(self, name, ms, noise=0.0, busy=1.0):
        def call():
            took = int(1e6 * ms * self.speed * (1 + noise * self.random.exponential()))
            self.wall += took
            self.cpu += int(took * busy)
            self.log.append(name)

        return call


@pytest.fixture
def machine():
    return FakeMachine()


def make_record(subject="dense", blocks=None, *, ms=1.0, count=20, timed=True, seed=0, **changes):
    """A record of ``count`` blocks of 5 calls of about ``ms`` ms, or an untimed one."""
    noise = np.random.default_rng(seed).uniform(0, 0.02, (count, 5))
    blocks = blocks or tuple(tuple(float(v) for v in ms * (1 + row)) for row in noise)
    values = {
        "run_id": "run-1",
        "date": datetime(2026, 11, 21, 9, 0, tzinfo=UTC),
        "subject": subject,
        "baseline": "dense",
        "target": "cpu",
        "runtime": "onnxruntime",
        "batch": 1,
        "parameters": 272_474,
        "macs": 40_551_000,
        "engine_bytes": 1_092_000,
        "build_seconds": 3.25,
        "hashes": {"onnx": "ab" * 32},
        "environment": {"python": "3.11", "processor": "a processor"},
        "conditions": Conditions(
            threads=1,
            warmup_ms=200.0,
            duration_s=1.25,
            min_iterations=10,
            block_ms=50.0,
            interleaved_with=tuple({"dense", "ticket"} - {subject}),
        ),
    }
    if timed:
        stats = summarise([sample for block in blocks for sample in block])
        values |= {"status": "timed", "samples_ms": blocks, "stats": stats, "cpu_ms": stats.mean}
    else:
        values |= {"status": "compiled, not timed here", "reason": "no NVIDIA GPU"}
    return LatencyRecord(**{**values, **changes})


@pytest.fixture(name="make_record")
def _make_record():
    return make_record


@pytest.fixture(autouse=True, scope="module")
def _older_objects_are_not_collected():
    """Timing collects garbage first, which takes long in a process that other tests have filled."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
