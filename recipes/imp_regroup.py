"""IMP + regroup: iterative magnitude pruning with rewinding, then dense blocks, then a deployed engine.

Chen et al. 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", Algorithms 1 and 3:

1. Train the dense network; remember an early epoch i (``imp.rewind_fraction`` of the training): weights, BatchNorm,
   optimizer.
2. IMP: prune the 20 % of the surviving weights with the smallest magnitude, over all layers but the head; go back to
   the rewind point; train the remaining t - i epochs; repeat for ``imp.rounds`` rounds.
3. Regroup: in each layer, group rows (output channels) whose non-zeros lie in similar columns, make (rows × columns
   dense enough in them) a block, every position of which survives, and prune everything outside blocks.
4. Train each structural ticket from the rewind point. With several ``regroup.rounds``, the sparsest ticket whose
   *validation* accuracy is within ``regroup.tolerance`` of the dense network's is taken (the best one if none is).
5. Deploy: cut what no block uses out of the network, run the blocks as small dense layers, verify that the rest
   computes the same function, export it, compile engines for ``deploy.targets``, and time dense and ticket
   interleaved. With ``deploy.format = "auto"`` each layer is packed only where that is faster on the first target, and
   the whole network stays dense where nothing is. *Test* accuracy is the deployed engine's. The report lists each
   layer's blocks, how full they are, and how many of the survivors they hold.

What to turn:

* ``regroup.rule``: ``paper`` (Algorithm 3 with t1 = ``parts``, t2 = ``min_nonzeros``, b1 = ``min_rows``,
  b2 = ``min_columns``, iterated; the paper prints no values, 0 derives them from the layer), ``code`` (the public
  program's ratio rule), or ``budget`` (the blocks that hold most magnitude at a given density).
* ``regroup.columns``: ``position`` (single kernel positions, as published) or ``channel`` (whole input channels).
* ``regroup.blocks``: ``free``; ``equal``, so that a layer is one gather and one grouped convolution; ``disjoint``, so
  that the gather is a permutation.
* ``regroup.coupling``: with ``group`` the layers that write into one residual stream divide their rows alike, so that
  none of them has to put its rows back into order; for blocks of equal sizes.
* ``regroup.tile``: rows of a block come in multiples of 16, 32 or 64. ``regroup.empty``: a layer that finds no block
  stays ``dense``, or ``prune`` leaves it its smallest block.
* ``imp.source``, ``imp.group_aware``, ``imp.rewind``, ``imp.retrain``: as for ``imp_refill``.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run imp_regroup --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from deploy_sparse.config import Config
from deploy_sparse.measure.table import Table
from deploy_sparse.sparsify.regroup import Regrouped, RegroupRule, grouped_convolutions, layer_table, regroup
from deploy_sparse.structure import Masks
from deploy_sparse.train.run import Run
from deploy_sparse.workflow.config import ImpConfig, StudyConfig, check_imp, check_study
from deploy_sparse.workflow.finish import choose, deploy, rounds_table
from deploy_sparse.workflow.prepare import prepare
from deploy_sparse.workflow.rounds import Round, mask_rounds, structural_ticket, train_dense

BLOCKS = (
    "Density: share of the layer's weights before and after. In blocks: share of the mask's survivors that lie in "
    "blocks. Fill: share of the blocks' positions that had survived. Magnitude: share of the survivors' ℓ1 norm that "
    "is kept. A dense layer has no blocks and is not pruned; the total is denser than the mask where many stay dense. "
    "Which layers run as blocks is said with the layers after surgery."
)


class RegroupConfig(Config):
    """From an unstructured mask to dense blocks."""

    rounds: tuple[int, ...] = Field((), description="rounds to regroup; empty for the last one")
    rule: Literal["paper", "code", "budget"] = Field("paper", description="how blocks are found")
    columns: Literal["position", "channel"] = Field("position", description="what a block's columns are")
    blocks: Literal["free", "equal", "disjoint"] = Field("free", description="sizes and sharing of the blocks")
    parts: int = Field(0, ge=0, description="t1, groups of rows in a layer; 0: derived")
    min_nonzeros: int = Field(0, ge=0, description="t2 of the paper's rule: non-zeros a column needs; 0: derived")
    min_rows: int = Field(0, ge=0, description="b1, least rows of a block; 0: derived")
    min_columns: int = Field(0, ge=0, description="b2, least columns of a block; 0: derived")
    ratio: float = Field(1.5, gt=0, description="of the code's rule: block width against what a row leaves out")
    density: float = Field(0.0, ge=0, le=1, description="of the budget rule: density of every layer; 0: its mask's")
    tile: Literal[16, 32, 64] = Field(32, description="rows of a block come in multiples of this")
    multiple: int = Field(1, ge=1, description="columns of a block come in multiples of this")
    empty: Literal["dense", "prune"] = Field("dense", description="what becomes of a layer without a block")
    coupling: Literal["layer", "group"] = Field("layer", description="group: residual streams divide their rows alike")
    silent: bool = Field(True, description="false: leave BatchNorm and the readers of empty rows live")
    tolerance: float = Field(
        0.005, ge=0, lt=1, description="validation accuracy that may be lost when choosing a round"
    )

    def block_rule(self) -> RegroupRule:
        """The rule these keys describe.

        Raises:
            ConfigError: keys that do not go together.
        """
        return RegroupRule(**self.model_dump(exclude={"rounds", "silent", "tolerance"}))


class RecipeConfig(StudyConfig):
    """All of the recipe's configuration."""

    imp: ImpConfig = ImpConfig()
    regroup: RegroupConfig = RegroupConfig()


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_study(config)
    check_imp(config, config.imp, config.regroup.rounds, "regroup.rounds")
    config.regroup.block_rule()


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="imp_regroup")
    rule, wanted = config.regroup.block_rule(), config.regroup.rounds or (config.imp.rounds,)

    made: dict[int, Regrouped] = {}

    grouped = grouped_convolutions(work.trainer.factory())

    def structure(found: Round) -> Masks:
        made[found.number] = regroup(
            found.masks, found.trained.weights, work.groups, rule=rule, silent=config.regroup.silent, dense=grouped
        )
        return made[found.number].masks

    dense = train_dense(work, config.imp)
    rounds, tickets = {}, {}
    for found in mask_rounds(work, dense, config.imp, wanted, structure):  # Algorithm 1
        rounds[found.number] = found.trained
        if found.number in wanted:
            masks = found.masks if config.imp.group_aware else structure(found)  # Algorithm 3
            tickets[found.number] = structural_ticket(work, found, masks)

    chosen = choose(dense, tickets, config.regroup.tolerance)
    note = "Shares of the prunable weights. Positions inside blocks count as used, those outside are pruned."
    columns, rows = layer_table(made[chosen].layers)
    tables = [
        rounds_table("regroup", dense, rounds, tickets, chosen, note),
        Table(f"Blocks of round {chosen}", tuple(columns), tuple(map(tuple, rows)), BLOCKS),
    ]
    return {**deploy(work, dense.best, tickets[chosen], "IMP + regroup", tables), "regroup_round": chosen}


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
