"""Layers whose times are known: what a table should find."""

import math

from deploy_sparse.tune.latency.shapes import LayerShape
from deploy_sparse.tune.latency.store import PointStore

CONV = LayerShape("conv", 256, 512, (3, 3), padding=(1, 1), height=14, width=14)


def staircase(step, floor_ms=0.01):
    """Time in steps of ``step`` channels, in proportion to the multiply-accumulates of whole steps."""

    def ms(shape):
        up = [-(-count // step) * step for count in (shape.c_in, shape.c_out)]
        per_group = 1 if shape.kind == "depthwise" else up[0] / shape.groups
        positions = math.prod(shape.output) * shape.tokens * math.prod(shape.kernel)
        return floor_ms + 1e-7 * per_group * up[1] * positions

    return ms


class Synthetic:
    """A bench with a formula for a clock; ``asked`` is what it was asked to time."""

    def __init__(self, ms, at_once=10_000, poll=lambda: None):
        self.ms, self.at_once, self.poll = ms, at_once, poll
        self.asked = []

    def chunks(self, shapes):
        shapes = list(shapes)
        for first in range(0, len(shapes), self.at_once):
            yield shapes[first : first + self.at_once]

    def times(self, shapes):
        self.poll()
        self.asked += shapes
        return {shape: self.ms(shape) for shape in shapes}


def store(folder=None, **setting):
    return PointStore(folder, {"name": "synthetic", **setting})
