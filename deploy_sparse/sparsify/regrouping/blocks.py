"""Dense blocks in one layer: which rows go together and which columns they keep (Chen et al. 2022, section 3.3).

Every row is in at most one block, our reading of Algorithm 3: then each output is written by one block, and a layer
runs as a few small convolutions.
"""

from __future__ import annotations

import torch

from .even import Division, divided, even_blocks
from .free import algorithm3, best_of_budget, ratio_rule
from .rule import RegroupRule
from .sizes import up_to
from .table import Block, Found, Limits, Table


def find_blocks(table: Table, rule: RegroupRule, division: Division | None = None) -> Found:
    """The blocks of a layer by ``rule``, or none and why. A pure function of its arguments.

    Args:
        division: of the rows, where it is not the layer's alone; for equal and disjoint blocks.
    """
    alive = table.alive()
    if not len(alive):
        return Found((), "nothing survives in it")
    limits = Limits.of(table, rule, len(alive))
    if rule.blocks != "free":
        division = division or divided([table], rule)
        assert division is not None
        return even_blocks(table, division, rule, limits)
    find = {"paper": algorithm3, "code": ratio_rule, "budget": best_of_budget}[rule.rule]
    return find(table, alive, rule, limits)


def smallest_block(table: Table, rule: RegroupRule) -> Block:
    """The smallest block the rule allows: the best columns of the layer, and the rows that hold most in them."""
    limits = Limits.of(table, rule, len(table.counts))
    held = table.magnitudes(torch.arange(len(table.counts)))
    columns = _best(held.sum(dim=0), limits.width)
    rows = _best(held[:, columns].sum(dim=1), min(len(held), up_to(limits.rows, rule.tile)))
    return rows, columns


def _best(held: torch.Tensor, count: int) -> torch.Tensor:
    return torch.argsort(held, descending=True, stable=True)[:count].sort().values
