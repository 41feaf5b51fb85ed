"""A suite of tiny networks, and engines that take a set time without computing anything."""

from dataclasses import dataclass, field

import numpy as np

from deploy_sparse.artifact import digest_of
from deploy_sparse.config import config_from
from deploy_sparse.errors import EngineError
from deploy_sparse.suites.building import Built
from deploy_sparse.suites.config import DENSE, Suite
from deploy_sparse.suites.forms import Made

SMALL = {
    "name": "small",
    "title": "Small",
    "batches": [1, 4],
    "seconds": 0.005,
    "min_iterations": 9,
    "warmup_ms": 0,
    "forms": {
        "half": {"structure": "channels", "keep": 0.5, "multiple": 8},
        "odd": {"structure": "channels", "keep": 0.7, "multiple": 1},
    },
    "networks": [
        {"name": "first", "network": "resnet_digits", "forms": ["half", "odd"]},
        {"name": "second", "network": "vgg_digits", "forms": ["half"]},
    ],
}


def small(**changes):
    return config_from(Suite, SMALL, changes)


@dataclass
class FakeEngine:
    """Answers like an engine of a target; burns ``ms`` a call."""

    target: object
    name: str
    macs: int
    ms: float = 0.05
    reason: str | None = None
    broken: bool = False

    @property
    def manifest(self):
        return {
            "target": {"name": self.target.name, "runtime": self.target.runtime, "threads": 1},
            "target_digest": self.target.digest,
            "digest": digest_of(self.name),
            "precision": {"asked": "fp32", "built": "fp32"},
            "macs": self.macs,
            "parameters": self.macs // 10,
            "bytes": 4096,
            "build_seconds": 0.5,
        }

    def runnable(self):
        return self.reason

    def open(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def sample_inputs(self, batch, seed=0):
        return {"input": np.ones((batch, 2), np.float32)}

    def run(self, feeds):
        if self.broken:
            raise EngineError(f"{self.name} is broken", expected="an engine that runs", fix="build it again")
        return dict(feeds)

    def prepare(self, feeds):
        values = np.ones(1 + int(2e4 * self.ms))
        return lambda: values.sum()


def no_layers(*_):
    """Stands in for ``layers_of``: what a runtime without times of layers raises."""
    raise EngineError("no times of layers", expected="a runtime that tells them", fix="take another")


@dataclass
class FakeBuilds:
    """Stands in for ``Builder.build``; what it was asked for is in ``asked``."""

    asked: list = field(default_factory=list)
    failing: dict = field(default_factory=dict)
    broken: set = field(default_factory=set)
    reason: str | None = None
    shares: dict = field(default_factory=lambda: {DENSE: 1.0, "half": 0.25, "odd": 0.5})
    on_build: object = lambda subject: None

    def __call__(self, builder, subject, target):
        self.asked.append((builder.maker.network.name, subject, target.name))
        self.on_build(subject)
        if subject in self.failing:
            raise self.failing[subject]
        share = self.shares[subject]
        made = Made(None, "made up", int(1e4 * share), int(1e5 * share), 100_000, whole_macs=5000)
        builder.made.setdefault((DENSE,), made)
        engine = FakeEngine(
            target, f"{builder.maker.network.name}-{subject}", made.macs, 2 * share, self.reason, subject in self.broken
        )
        return Built(engine, made, builder.facts(subject, made, target))
