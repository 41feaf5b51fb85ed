"""RigL: dynamic sparse training that grows where the gradient is largest, then a deployed engine.

Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners":

1. Start from random masks that leave ``sparse.density`` of all convolution and Linear weights, spread by ERK.
2. Every ``explore.interval`` steps, in each layer: drop the share ``explore.fraction`` (falling by a cosine) of the
   weights with the smallest magnitude, and grow as many where the dense gradient is largest. New weights start at
   zero.
3. Keep the epoch with the best *validation* accuracy and deploy it beside the dense network.

An engine that runs dense layers gains nothing from single zero weights, and the report says so: it is the reference
that ``chase``, which removes channels, is to be compared with.

What to turn:

* ``explore.preset``: ``rigl`` (30 % every 100 steps, until three quarters of the training) or ``rigl-itop`` (Liu et
  al. 2021: 50 % every 4000 steps, to the end); ``mest`` has a soft bound. ``explore.*`` overrides single settings of a
  preset.
* ``explore.gradient_batches`` averages the gradient for growth, which helps small batches.
* ``sparse.distribution = "uniform"`` with ``sparse.exclude`` for the first layer is the uniform variant.
* ``sparse.baseline = "untrained"`` saves the dense training; the dense network is then timed without an accuracy.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run rigl --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deploy_sparse.train.run import Run
from deploy_sparse.workflow import dst
from deploy_sparse.workflow.dst_config import DstConfig, check_dst
from deploy_sparse.workflow.finish import deploy
from deploy_sparse.workflow.prepare import prepare


class RecipeConfig(DstConfig):
    """All of the recipe's configuration."""


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_dst(config)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="rigl")
    method = dst.dynamic_masks(work, config)
    dense, start = dst.baseline(work, config)
    ticket = dst.sparse_ticket(work, config, method, start)
    said = dst.explained(work, config, ticket)
    return deploy(work, dense, ticket, "RigL", [], plots=said.plots, explain=said.explain)


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
