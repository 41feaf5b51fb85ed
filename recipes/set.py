"""SET: dynamic sparse training that grows at random, then a deployed engine.

Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity":

1. Start from random masks that leave ``sparse.density`` of all convolution and Linear weights, spread by ERK.
2. Once an epoch (``explore.interval`` steps), in each layer: drop the share ``explore.fraction`` of the weights with
   the smallest magnitude, and grow as many at random. New weights start at zero. No dense gradient is ever needed.
3. Keep the epoch with the best *validation* accuracy and deploy it beside the dense network.

An engine that runs dense layers gains nothing from single zero weights, and the report says so: it is the reference
that ``chase``, which removes channels, is to be compared with.

What to turn:

* ``explore.preset``: ``set`` (50 % once an epoch) or ``set-itop`` (Liu et al. 2021: 50 % every 1500 steps, falling by
  a cosine); ``mest`` has a soft bound. ``explore.*`` overrides single settings of a preset.
* ``sparse.distribution = "uniform"`` with ``sparse.exclude`` for the first layer is the uniform variant.
* ``sparse.baseline = "untrained"`` saves the dense training; the dense network is then timed without an accuracy.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run set --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deploy_sparse.train.run import Run
from deploy_sparse.workflow import dst
from deploy_sparse.workflow.dst_config import SetConfig, check_dst
from deploy_sparse.workflow.finish import deploy
from deploy_sparse.workflow.prepare import prepare


class RecipeConfig(SetConfig):
    """All of the recipe's configuration."""


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_dst(config)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="set")
    method = dst.dynamic_masks(work, config)
    dense, start = dst.baseline(work, config)
    ticket = dst.sparse_ticket(work, config, method, start)
    said = dst.explained(work, config, ticket)
    return deploy(work, dense, ticket, "SET", [], plots=said.plots, explain=said.explain)


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
