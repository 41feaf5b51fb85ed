"""IMP + refill+: like imp_refill, but an extra share of the dropped channels is taken back.

Chen et al. 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", section 3.2: refill keeps
as many whole channels as a layer's surviving weights would fill; refill+ is softer and re-activates a share
``refill.extra`` of the channels that refill drops: ⌈q + extra · (c_out - q)⌉ of c_out channels stay when the survivors
fill q of them.

The paper does not print the share. Its remaining weights for VGG-16 on CIFAR-10 (32.84 % with refill, 46.41 % with
refill+) fit 0.2, which is the default here; the fit is our inference.

Every step and every other key is that of ``imp_refill``: see ``deploy-sparse cat imp_refill`` and its docstring for
IMP, the criteria, the coupling of residual streams, width multiples, and what is deployed and timed.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run imp_refill_plus --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field

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


class RefillPlusConfig(RefillConfig):
    """Refill with an extra share of channels."""

    extra: float = Field(0.2, ge=0, le=1, description="share of the dropped channels to take back")


class RecipeConfig(StudyConfig):
    """All of the recipe's configuration."""

    imp: ImpConfig = ImpConfig()
    refill: RefillPlusConfig = RefillPlusConfig()


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_study(config)
    check_imp(config, config.imp, config.refill.rounds, "refill.rounds")
    check_refill(config, config.imp, config.refill)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="imp_refill_plus")
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
    summary = rounds_table("refill+", dense, rounds, tickets, chosen, NOTE)
    result = deploy(work, dense.best, tickets[chosen], "IMP + refill+", [summary, tables[chosen]])
    return {**delivered(work, rule, result, rule.budget == "latency"), "refill_round": chosen}


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
