"""A clock that only moves when a fake call works, and records made from it."""

from datetime import UTC, datetime

import numpy as np
import pytest

from deploy_sparse.measure.record import Conditions, LatencyRecord
from deploy_sparse.measure.timing import Clock, summarise

SHARE = {"aligned": 1.0, "unaligned": 0.7}  # of the speed-up that the MACs predict


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


@pytest.fixture
def suite(make_record):
    """A function that makes the records of networks x batches x (dense, forms x sparsities), one run a network."""

    def make(
        networks=("resnet18", "vgg16"),
        batches=(1, 8),
        forms=("aligned", "unaligned"),
        sparsities=(0.5, 0.75),
        share=SHARE,
        **changes,
    ):
        records = []
        for number, network in enumerate(networks):
            subjects = {"dense": (None, 0.0), **{f"{form}-{s:g}": (form, s) for form in forms for s in sparsities}}
            for batch in batches:
                for place, (name, (form, sparsity)) in enumerate(subjects.items()):
                    others = tuple(other for other in subjects if other != name)
                    conditions = make_record().conditions.model_copy(update={"interleaved_with": others})
                    values = {
                        "ms": (number + 1.0) * batch * ((1 - sparsity) / share.get(form, 1.0)),
                        "seed": 7 * place + batch,
                        "macs": round(1e9 * (1 - sparsity)),
                        "conditions": conditions,
                        "accuracy": 0.9 - 0.1 * sparsity,
                        "run_id": f"run-{number}",
                        **changes,
                    }
                    records.append(
                        make_record(name, batch=batch, network=network, form=form, sparsity=sparsity, **values)
                    )
        return tuple(records)

    return make
