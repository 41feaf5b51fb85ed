"""Blocks whose sizes come as they come: Algorithm 3, the program's ratio rule, and the best use of a budget."""

from __future__ import annotations

import math

import torch

from .columns import dense_columns, dense_share, largest, ratio_width, rounded, within_budget
from .partition import Choice, Chooser, group_sums, partition
from .rule import RegroupRule
from .sizes import group_sizes
from .table import Block, Found, Limits, Table, blocks_of


def algorithm3(table: Table, alive: torch.Tensor, rule: RegroupRule, limits: Limits) -> Found:
    """The paper's loop: a partition, the columns dense enough in each group, and again with the rows left over."""
    blocks: list[Block] = []
    left, share = alive, 0.0
    while len(left) >= limits.rows:
        sizes, values = group_sizes(len(left), limits.rows, rule), table.values(left, rule)
        needed = needed_nonzeros(sizes, table.taps, rule, share)
        labels = partition(values, sizes, _dense(needed) if needed.any() else _budgeted(sizes, limits))
        sums = group_sums(values, labels, len(sizes))
        if not needed.any():
            share = dense_share(sums, torch.tensor(sizes), limits.area)
            needed = needed_nonzeros(sizes, table.taps, rule, share)
        chosen = dense_columns(sums, needed, narrowest=limits.columns, multiple=limits.multiple).chosen
        found = blocks_of(left, labels, chosen)
        if not found:
            break
        blocks += found
        left = left[~chosen.any(dim=1)[labels]]
    return Found(tuple(blocks), "" if blocks else nothing_dense(limits))


def ratio_rule(table: Table, alive: torch.Tensor, rule: RegroupRule, limits: Limits) -> Found:
    """The program's one pass; a group that is too small or finds no width is left out."""
    sizes = group_sizes(len(alive), limits.rows, rule)
    labels = partition(table.values(alive, rule), sizes)
    found = ratio_blocks(table, alive, labels, sizes, rule, limits)
    return Found(found, "" if found else nothing_accepted(sizes, rule, limits))


def ratio_blocks(
    table: Table, rows: torch.Tensor, labels: torch.Tensor, sizes: list[int], rule: RegroupRule, limits: Limits
) -> tuple[Block, ...]:
    """What the ratio rule makes of a partition of ``rows``, whoever made it: ``labels`` are their groups."""
    values = table.values(rows, rule)
    widths = ratio_widths(values, labels, sizes, table.taps, rule.ratio)
    widths[(torch.tensor(sizes) < limits.rows) | (widths < limits.columns)] = 0
    widths = rounded(widths, limits.multiple, values.shape[1])
    return blocks_of(rows, labels, largest(group_sums(values, labels, len(sizes)), widths))


def best_of_budget(table: Table, alive: torch.Tensor, rule: RegroupRule, limits: Limits) -> Found:
    """The columns of all groups that hold most, for the positions there are to spend."""
    sizes = group_sizes(len(alive), limits.rows, rule)
    labels = partition(table.values(alive, rule, factors=2), sizes, _budgeted(sizes, limits))
    sums = group_sums(table.values(alive, rule), labels, len(sizes))
    return Found(blocks_of(alive, labels, _budgeted(sizes, limits, final=True)(sums, None).chosen))


def needed_nonzeros(sizes: list[int], taps: int, rule: RegroupRule, share: float = 0.0) -> torch.Tensor:
    """Non-zeros a column needs in each group, float64 ``[groups]``: t2 in each of its positions, or ``share`` of a row.

    0 where neither is known.
    """
    if rule.min_nonzeros:
        return torch.tensor([min(rule.min_nonzeros, size) for size in sizes], dtype=torch.float64) * taps
    return torch.tensor([math.ceil(share * size - 1e-6) for size in sizes], dtype=torch.float64)


def ratio_widths(values: torch.Tensor, labels: torch.Tensor, sizes: list[int], taps: int, ratio: float) -> torch.Tensor:
    """The width of each group by the ratio rule, int64 ``[groups]``, 0 where it finds none."""
    counts = values[:, values.any(dim=0)]
    return torch.tensor([ratio_width(counts[labels == group], ratio, taps) or 0 for group in range(len(sizes))])


def nothing_dense(limits: Limits) -> str:
    """Why Algorithm 3 found no block."""
    return f"no {limits.rows} or more rows share {limits.columns} or more columns that are dense enough"


def nothing_accepted(sizes: list[int], rule: RegroupRule, limits: Limits) -> str:
    """Why the ratio rule found no block."""
    if max(sizes) < limits.rows:
        return f"each of {len(sizes)} parts has fewer than {limits.rows} rows"
    return f"no part of {limits.rows} or more rows has a width above {rule.ratio} times what each row leaves out"


def _dense(needed: torch.Tensor) -> Chooser:
    def choose(sums: torch.Tensor, _: torch.Tensor | None) -> Choice:
        return dense_columns(sums, needed, narrowest=1, multiple=1)

    return choose


def _budgeted(sizes: list[int], limits: Limits, final: bool = False) -> Chooser:
    """Limits on a block's columns wait for the ``final`` choice: until then they would keep rows where they are."""
    rows = torch.tensor(sizes)

    def choose(sums: torch.Tensor, _: torch.Tensor | None) -> Choice:
        return within_budget(sums, rows, limits.area, narrowest=limits.width if final else 1, multiple=limits.multiple)

    return choose
