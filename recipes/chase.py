"""Chase: one sparse training that ends with fewer channels, then a deployed engine.

Yin et al. 2023, "Dynamic Sparsity Is Channel-Level Sparsity Learner":

1. Start from random masks that leave ``sparse.density`` of all convolution and Linear weights, spread by ERK.
2. Explore (``[explore]``): every ``interval`` steps drop the smallest weights over all layers down to the budget, and
   grow new ones where the dense gradient is largest, up to the budget and a surplus (the soft memory bound, 5 % of all
   weights at first) that falls to nothing at ``surplus_until`` of the training. After that a falling share of the
   budget is dropped and grown again, to the last epoch.
3. Remove channels (``[channels]``): half an exploration interval away from that, the channels with the lowest score
   go, for good, as many as a cubic schedule asks; at ``until`` of the training exactly ``sparsity`` of the prunable
   channels are gone. The weights they held grow elsewhere: the budget stays.
4. Keep the epoch with the best *validation* accuracy among those after all channels and the surplus are gone.
5. Deploy: cut the removed channels out, verify that the smaller network computes the same function, export, compile
   engines, time dense and ticket interleaved. Single weights that are zero in the channels that stay bring an engine
   nothing; the report says how much of the sparsity that is.

What to turn:

* ``channels.sparsity`` is S_c, relative to the prunable channels; 0 is dynamic sparse training alone.
  ``channels.coupling``: ``internal`` takes the channels between the layers of a block, as released; ``prune_skip``
  also those of the residual streams, whose channels go in all layers that write them together, scored by the mean of
  these layers.
* ``channels.budget = "latency"`` removes channels until the network takes ``channels.latency`` (``"0.5x"`` of the dense
  one's time, or ``"3.2ms"``) on the first of ``deploy.targets`` at the first of ``deploy.batches``: at every step those
  stay that are worth the most within the time that the schedule leaves.
* ``channels.criterion``: ``umm`` (mean magnitude of all weights of a channel, zeros included),
  ``surviving_magnitude``, ``connections``, ``kernels``. ``channels.floor`` is β: a layer keeps that share of its even
  part.
* ``explore.scope = "layer"`` explores layer by layer, as the published ImageNet command does.
  ``explore.gradient_batches`` averages the gradient for growth over several batches.
* ``sparse.density`` should leave weights for the channels that stay: at 0.1 an engine still runs mostly zeros. A
  density near the share of weights in kept channels gives a small network that is nearly dense.
* ``sparse.reestimate`` re-estimates BatchNorm's statistics after the training. It changes the ticket, not surgery.
* ``sparse.baseline = "untrained"`` saves the dense training; the dense network is then timed without an accuracy.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run chase --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deploy_sparse.train.run import Run
from deploy_sparse.workflow import dst
from deploy_sparse.workflow.budgeted import delivered
from deploy_sparse.workflow.dst_config import ChaseConfig, check_dst
from deploy_sparse.workflow.finish import deploy
from deploy_sparse.workflow.prepare import prepare


class RecipeConfig(ChaseConfig):
    """All of the recipe's configuration."""


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_dst(config)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="chase")
    pools = dst.pools_of(work, config)
    method = dst.chase(work, config, pools)
    dense, start = dst.baseline(work, config)
    ticket = dst.sparse_ticket(work, config, method, start)
    said = dst.explained(work, config, ticket, pools)
    result = deploy(work, dense, ticket, "Chase", [], plots=said.plots, explain=said.explain)
    return delivered(work, config.channels, result, config.channels.budget == "latency")


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
