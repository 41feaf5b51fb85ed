"""A small residual network, a made-up latency table of it, and machines that are slower than the table says."""

import json
from types import SimpleNamespace

import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.engine.target import load_target
from deploy_sparse.ticket import ModelRef
from deploy_sparse.tune.budget import Timed
from deploy_sparse.tune.latency.shapes import shapes_of

ARGUMENTS = {"widths": [16, 32, 32]}
MODEL = ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8))
X = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


def factory():
    torch.manual_seed(0)
    return zoo.build("resnet_digits", **ARGUMENTS).eval()


class Table:
    """Every layer takes time for its widths' product; the target and batch are any."""

    def __init__(self, multiple=4, batch=1):
        self.layers, self.multiple, self.batch = shapes_of(factory(), X), multiple, batch
        target = load_target("cpu")
        self.target = {"name": target.name, "digest": target.digest, "width_multiple": target.width_multiple}

    def ms(self, path, c_in, c_out):
        return 0.01 + 1e-4 * c_in * c_out

    def network_ms(self, widths):
        return 0.05 + sum(self.ms(path, *counts) for path, counts in widths.items())

    @property
    def dense_ms(self):
        return self.network_ms({path: (shape.c_in, shape.c_out) for path, shape in self.layers.items()})

    def save(self, path):
        path.write_text(json.dumps({"digest": "feed"}))


def widths_of(module):
    layers = {path: part for path, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    return {path: (shape.c_in, shape.c_out) for path, shape in shapes_of(module, X).items() if path in layers}


class Machine:
    """Times tickets as a table does, but for a part of the dense network's time that no width shortens."""

    def __init__(self, table, extra=0.0):
        self.table, self.extra, self.calls = table, extra, 0

    def timed(self, predicted_ms):
        self.calls += 1
        dense = self.table.dense_ms * (1 + self.extra)
        own = predicted_ms + self.extra * self.table.dense_ms
        return Timed(own, dense, own / dense, own / dense * 0.99, own / dense * 1.01)


def record(name, p50):
    return SimpleNamespace(subject=name, stats=SimpleNamespace(p50=p50))
