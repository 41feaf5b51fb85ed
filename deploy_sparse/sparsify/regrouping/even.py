"""Blocks of equal sizes: over columns that others read too (a gather and one grouped convolution), or disjoint ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .columns import equally_dense_columns, rounded, shared_out, widest_columns
from .free import needed_nonzeros, nothing_accepted, nothing_dense, ratio_widths
from .partition import Choice, Chooser, group_sums, partition
from .rule import RegroupRule
from .sizes import disjoint_parts, equal_parts, equal_rows, equal_shares
from .table import Found, Limits, Table, blocks_of, joined


@dataclass(frozen=True)
class Division:
    """Which rows go together.

    Attributes:
        rows: indices of the rows divided, ``[n]``.
        labels: the group of each, ``[n]``.
        sizes: rows of each group.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    sizes: list[int]


def divided(tables: Sequence[Table], rule: RegroupRule) -> Division | None:
    """Groups of rows, alike in all of ``tables``; None where nothing survives.

    Args:
        tables: of one layer, or of layers with equally many rows, whose columns count together.
        rule: with equal or disjoint blocks.
    """
    together = joined(tables)
    alive = together.alive()
    if not len(alive):
        return None
    limits = [Limits.of(table, rule, len(alive)) for table in tables]
    if rule.blocks == "disjoint":
        parts = disjoint_parts(len(alive), tables, limits, rule)
    else:
        parts = equal_parts(len(alive), len(together.counts), limits[0].rows, rule)
    rows = _filled_up(together, alive, parts, rule, limits[0])
    sizes = equal_shares(len(rows), parts)
    if rule.rule == "code" and rule.blocks == "equal":  # by similarity alone
        return Division(rows, partition(together.values(rows, rule), sizes), sizes)
    chosen = [_chooser(t, len(rows), sizes, rule, own) for t, own in zip(tables, limits, strict=True)]
    choose = _side_by_side(chosen, [table.counts.shape[1] for table in tables])
    return Division(rows, partition(together.values(rows, rule, factors=2), sizes, choose), sizes)


def even_blocks(table: Table, division: Division, rule: RegroupRule, limits: Limits) -> Found:
    """The columns that the groups of a division take in one layer: all equally many.

    Disjoint blocks share all columns out among them. Otherwise the paper's rule goes on as long as the next columns of
    all groups have t2 non-zeros on average, once: rows left over could only make blocks of another size. The program's
    rule takes the width at which every group is accepted.
    """
    rows, labels, sizes = division.rows, division.labels, division.sizes
    values = table.values(rows, rule)
    sums = group_sums(values, labels, len(sizes))
    if rule.rule == "code" and rule.blocks == "equal":
        widths = ratio_widths(values, labels, sizes, table.taps, rule.ratio)
        if int(widths.min()) < limits.columns:
            return Found((), nothing_accepted(sizes, rule, limits))
        width = int(rounded(widths.max(), limits.multiple, values.shape[1]))
        return Found(blocks_of(rows, labels, widest_columns(sums, width).chosen))
    choose = _chooser(table, len(rows), sizes, rule, limits, narrowest=limits.columns)
    blocks = blocks_of(rows, labels, choose(sums, None).chosen)
    return Found(blocks, "" if blocks else nothing_dense(limits))


def _chooser(
    table: Table, rows: int, sizes: list[int], rule: RegroupRule, limits: Limits, narrowest: int = 1
) -> Chooser:
    """The columns of one layer for groups of these sizes; ``narrowest``: fewer are none."""
    shares = equal_shares(table.counts.shape[1], len(sizes))
    needed, width = needed_nonzeros(sizes, table.taps, rule), _affordable(rows, table, rule, limits)

    def choose(sums: torch.Tensor, previous: torch.Tensor | None) -> Choice:
        if rule.blocks == "disjoint":
            return shared_out(sums, shares, previous)
        if not needed.any():
            return widest_columns(sums, width)
        return equally_dense_columns(sums, needed, narrowest=narrowest, multiple=limits.multiple)

    return choose


def _side_by_side(choosers: Sequence[Chooser], widths: list[int]) -> Chooser:
    """One choice for layers whose columns lie behind each other, each by its own chooser."""

    def choose(sums: torch.Tensor, previous: torch.Tensor | None) -> Choice:
        own = torch.split(sums, widths, dim=1)
        before = [None] * len(widths) if previous is None else torch.split(previous, widths, dim=1)
        made = [chooser(mine, last) for chooser, mine, last in zip(choosers, own, before, strict=True)]
        return Choice(torch.cat([choice.chosen for choice in made], dim=1), sum(choice.worth for choice in made))

    return choose


def _affordable(rows: int, table: Table, rule: RegroupRule, limits: Limits) -> int:
    """The width of ``rows`` rows that covers the area: at most it for a budget, else next to it."""
    half = 0 if rule.rule == "budget" else rows * limits.multiple // 2
    width = (limits.area + half) // (rows * limits.multiple) * limits.multiple
    return min(max(width, limits.width), table.counts.shape[1])


def _filled_up(table: Table, alive: torch.Tensor, parts: int, rule: RegroupRule, limits: Limits) -> torch.Tensor:
    """The surviving rows and as many empty ones, by index, as equal groups need."""
    each = equal_rows(len(alive), len(table.counts), parts, limits.rows, rule.tile)
    if each is None:
        return alive
    others = torch.ones(len(table.counts), dtype=torch.bool)
    others[alive] = False
    return torch.cat([alive, others.nonzero().flatten()[: each * parts - len(alive)]]).sort().values
