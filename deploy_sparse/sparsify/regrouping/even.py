"""Blocks of equal sizes: over columns that others read too (a gather and one grouped convolution), or disjoint ones."""

from __future__ import annotations

import torch

from .columns import equally_dense_columns, rounded, shared_out, widest_columns
from .free import needed_nonzeros, nothing_accepted, nothing_dense, ratio_widths
from .partition import Choice, group_sums, partition
from .rule import RegroupRule
from .sizes import disjoint_parts, equal_parts, equal_rows, equal_shares
from .table import Found, Limits, Table, blocks_of


def equal_blocks(table: Table, alive: torch.Tensor, rule: RegroupRule, limits: Limits) -> Found:
    """As many equal groups as the limits allow, all at the width the rule gives them together.

    The paper's rule goes on as long as the next columns of all groups have t2 non-zeros on average, once: rows left
    over could only make blocks of another size. The program's rule takes the width at which every group is accepted.
    """
    parts = equal_parts(len(alive), len(table.counts), limits.rows, rule)
    rows = _filled_up(table, alive, parts, rule, limits)
    sizes, values = [len(rows) // parts] * parts, table.values(rows, rule)
    if rule.rule == "code":
        labels = partition(values, sizes)
        widths = ratio_widths(values, labels, sizes, table.taps, rule.ratio)
        if int(widths.min()) < limits.columns:
            return Found((), nothing_accepted(sizes, rule, limits))
        width = int(rounded(widths.max(), limits.multiple, values.shape[1]))
        return Found(blocks_of(rows, labels, widest_columns(group_sums(values, labels, parts), width).chosen))
    needed = needed_nonzeros(sizes, table.taps, rule)
    width = _affordable(len(rows), table, rule, limits)

    def choose(sums: torch.Tensor, _: torch.Tensor | None, narrowest: int = 1) -> Choice:
        if not needed.any():
            return widest_columns(sums, width)
        return equally_dense_columns(sums, needed, narrowest=narrowest, multiple=limits.multiple)

    labels = partition(table.values(rows, rule, factors=2), sizes, choose)
    blocks = blocks_of(rows, labels, choose(group_sums(values, labels, parts), None, limits.columns).chosen)
    return Found(blocks, "" if blocks else nothing_dense(limits))


def disjoint_blocks(table: Table, alive: torch.Tensor, rule: RegroupRule, limits: Limits) -> Found:
    """Rows and input channels both shared out among the blocks; of equal sizes where some number divides both."""
    parts = disjoint_parts(len(alive), table, limits, rule)
    rows = _filled_up(table, alive, parts, rule, limits)
    sizes, widths = equal_shares(len(rows), parts), equal_shares(table.counts.shape[1], parts)

    def choose(sums: torch.Tensor, previous: torch.Tensor | None) -> Choice:
        return shared_out(sums, widths, previous)

    labels = partition(table.values(rows, rule, factors=2), sizes, choose)
    return Found(blocks_of(rows, labels, choose(group_sums(table.values(rows, rule), labels, parts), None).chosen))


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
