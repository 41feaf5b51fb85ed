"""Networks of block convolutions for the tests of torch engines, as surgery exports its packed layers.

Run as a program, with TRITON_INTERPRET=1, it builds an engine of one for the CPU that asks for the block kernel, and
answers as JSON how it compares with the same engine in its native form.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.target import Target

EXAMPLES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))


class Equal(nn.Module):
    """Equal blocks with shared inputs: a look-up and a grouped convolution; the second block reads a channel twice."""

    def __init__(self, restores: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)
        self.register_buffer("columns", torch.tensor([*range(16), *range(10, 25), 24]))
        self.register_buffer("places", torch.randperm(32) if restores else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.index_select(1, self.columns))
        return y if self.places is None else y.index_select(1, self.places)


class Free(nn.Module):
    """Blocks of different sizes: a look-up and a convolution each, then a concatenation; the look-ups are one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = ((16, 16), (20, 32), (28, 17))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(rows, n, 3, 3) / 9) for rows, n in self.sizes)
        self.bias = nn.Parameter(torch.randn(64))
        reads = [*range(0, 32, 2), *range(32), *range(17)]
        self.register_buffer("columns", torch.tensor(reads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, row, column = [], 0, 0
        for weight, (rows, columns) in zip(self.weights, self.sizes, strict=True):
            read = x.index_select(1, self.columns.narrow(0, column, columns))
            outputs.append(F.conv2d(read, weight, self.bias.narrow(0, row, rows), stride=(2, 1), padding=1))
            row, column = row + rows, column + columns
        return torch.cat(outputs, 1)


class Blocks(nn.Module):
    """Every form behind a dense layer, with norms, and ReLUs in place and not; depthwise and tiny groups between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.equal, self.norm = Equal(), nn.BatchNorm2d(32)
        self.restored, self.depthwise = Equal(restores=True), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.free = Free()
        self.disjoint = nn.Conv2d(64, 32, 1, groups=2)
        self.tiny = nn.Conv2d(32, 32, 1, groups=8)
        self.head = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu_(self.norm(self.equal(x))) + x
        x = self.depthwise(F.relu(self.restored(x)))
        x = F.relu(self.disjoint(self.free(x)))
        return self.head(self.tiny(x).mean((2, 3)))


def make_blocks() -> Blocks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Blocks().eval()
        with torch.no_grad():
            network.norm.running_mean.normal_()
            network.norm.running_var.uniform_(0.5, 2.0)
            network.norm.weight.uniform_(-1.0, 2.0)
            network.norm.bias.normal_()
    return network


def target_of(**values: object) -> Target:
    return Target(name="mine", runtime="torch", **values)


def main(folder: str) -> None:
    answers = {}
    for wanted in ("never", "timed", "always"):
        engine = build_engine(make_blocks(), target_of(block_kernel=wanted), EXAMPLES, Path(folder), name=wanted)
        with engine.open() as runner:
            feeds = runner.sample_inputs(3)
            answers[wanted] = runner.run(feeds)["output"].tolist()
            runner.prepare(feeds)()
            answers[f"{wanted} choices"] = [str(choice) for choice in runner._session.blocks]
    feeds = {"input": torch.from_numpy(feeds["input"])}
    answers["module"] = make_blocks()(feeds["input"]).tolist()
    print(json.dumps(answers))


if __name__ == "__main__":
    np.seterr(all="raise")
    main(sys.argv[1])
