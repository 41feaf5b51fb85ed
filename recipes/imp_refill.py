"""IMP + refill: iterative magnitude pruning with rewinding, then whole channels, then a deployed engine.

Chen et al. 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", Algorithms 1 and 2:

1. Train the dense network; remember an early epoch i (``imp.rewind_fraction`` of the training): weights, BatchNorm,
   optimizer.
2. IMP: prune the 20 % of the surviving weights with the smallest magnitude, over all layers but the head; go back to
   the rewind point; train the remaining t - i epochs; repeat for ``imp.rounds`` rounds. ``imp.source`` takes the masks
   from elsewhere instead: ``random``, one-shot ``magnitude``, ``snip``, ``grasp``, ``synflow`` (section 5).
3. Refill: in each layer keep max(1, ⌈density · c_out⌉) channels, those with the highest ``refill.criterion`` on the
   round's own trained weights, fill them up whole and silence the others.
4. Train each structural ticket from the rewind point. With several ``refill.rounds``, the sparsest ticket whose
   *validation* accuracy is within ``refill.tolerance`` of the dense network's is taken (the best one if none is).
5. Deploy: cut the ticket into a smaller network, verify that it computes the same function, export it to ONNX, compile
   engines for ``deploy.targets``, and time dense and ticket interleaved. *Test* accuracy is the deployed engine's.

What to turn:

* ``refill.criterion``: ``l1`` (the paper's choice), ``survivors``, ``activation_l1``, ``activation_l2``, ``saliency``.
* ``refill.coupling = "group"`` makes the layers that write one residual stream choose together, so that the stream
  itself gets narrower; ``"layer"`` is the paper's rule.
* ``refill.multiple`` rounds widths up to what the hardware works in (8, 16, 32); 1 is exact.
* ``refill.extra`` takes that share of the dropped channels back (refill+; the recipe ``imp_refill_plus``).
* ``refill.silent = false`` is the published variant: only the rows are masked, BatchNorm stays live behind them.
* ``refill.budget = "code"`` keeps ⌊q⌋ + 1 channels as the public code does, one more than the paper's rule where the
  survivors fill q whole channels exactly.
* ``refill.budget = "latency"`` keeps the channels worth the most within ``refill.latency`` (``"0.5x"`` of the dense
  network's, or ``"3.2ms"``) on the first of ``deploy.targets``, at the first of ``deploy.batches``; with
  ``refill.coupling = "group"``.
* ``imp.group_aware = true`` structures the masks after every round (Algorithm 4; worse in the paper).
* ``imp.exclude`` leaves layers dense (the public code spares a ResNet's stem), ``imp.linear = false`` prunes
  convolutions only, ``imp.distribution`` spreads a one-shot source's density over the layers.
* ``imp.rewind = "lt"`` goes back to the initialisation, ``"finetune"`` trains on; ``imp.retrain = "full"`` restarts
  optimizer and schedule as the public code does.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run imp_refill --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from deploy_sparse.train.run import Run
from deploy_sparse.workflow.budgeted import delivered
from deploy_sparse.workflow.config import ImpConfig, StudyConfig, check_imp, check_study
from deploy_sparse.workflow.finish import choose, deploy, rounds_table
from deploy_sparse.workflow.prepare import prepare
from deploy_sparse.workflow.refilled import (
    NOTE,
    RefillConfig,
    channels_table,
    check_refill,
    refilled,
    require_reachable,
)
from deploy_sparse.workflow.rounds import mask_rounds, masks_of, structural_ticket, train_dense


class RecipeConfig(StudyConfig):
    """All of the recipe's configuration."""

    imp: ImpConfig = ImpConfig()
    refill: RefillConfig = RefillConfig()


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_study(config)
    check_imp(config, config.imp, config.refill.rounds, "refill.rounds")
    check_refill(config, config.imp, config.refill)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="imp_refill")
    rule = config.refill
    wanted = rule.rounds or (config.imp.rounds,)
    structure = partial(refilled, work, rule)

    require_reachable(work, rule, masks_of(work, config.imp))
    dense = train_dense(work, config.imp)
    rounds, tickets, tables = {}, {}, {}
    for found in mask_rounds(work, dense, config.imp, wanted, structure):  # Algorithm 1
        rounds[found.number] = found.trained
        if found.number in wanted:
            masks = found.masks if config.imp.group_aware else structure(found)  # Algorithm 2
            tickets[found.number] = structural_ticket(work, found, masks)
            tables[found.number] = channels_table(found.masks, masks, found.number)

    chosen = choose(dense, tickets, rule.tolerance)
    summary = rounds_table("refill", dense, rounds, tickets, chosen, NOTE)
    result = deploy(work, dense.best, tickets[chosen], "IMP + refill", [summary, tables[chosen]])
    return {**delivered(work, rule, result, rule.budget == "latency"), "refill_round": chosen}


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
