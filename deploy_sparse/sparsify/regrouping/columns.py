"""Which columns the groups of rows take, by rule. Sums are ``[groups, columns]``, what a group holds in each column.

Apart from the ratio rule, each is the best choice there is for its own aim, so that rows and columns can take turns.
"""

from __future__ import annotations

import torch

from .partition import Choice, exchange_

_SWEEPS = 10  # over all pairs of groups


def largest(sums: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Bool like ``sums``: of each group the ``widths[group]`` largest columns, ties by index."""
    order = torch.argsort(sums, dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(sums.shape[1]).expand_as(order))
    return rank < widths[:, None]


def dense_columns(sums: torch.Tensor, needed: torch.Tensor, *, narrowest: int, multiple: int) -> Choice:
    """Algorithm 3: the columns with at least ``needed[group]`` non-zeros, where a group has ``narrowest`` of them."""
    surplus = sums - needed[:, None]
    widths = (surplus >= 0).sum(dim=1)
    widths[widths < narrowest] = 0
    return Choice(largest(sums, rounded(widths, multiple, sums.shape[1])), float(surplus.clamp(min=0).sum()))


def equally_dense_columns(sums: torch.Tensor, needed: torch.Tensor, *, narrowest: int, multiple: int) -> Choice:
    """As :func:`dense_columns` at one width for all: as long as the next columns of all groups together are dense."""
    surplus = (sums.sort(dim=1, descending=True).values - needed[:, None]).sum(dim=0)  # [columns], descending
    width = int((surplus >= 0).sum())
    width = width if width >= narrowest else 0
    widths = rounded(torch.full((len(sums),), width), multiple, sums.shape[1])
    return Choice(largest(sums, widths), float(surplus.clamp(min=0).sum()))


def dense_share(sums: torch.Tensor, sizes: torch.Tensor, area: int) -> float:
    """The share of a group's rows at which the columns that dense cover nearest to ``area`` rows × columns.

    What Algorithm 3's t2 is where it is not given.
    """
    shares, order = (sums / sizes[:, None]).flatten().sort(descending=True)
    covered = sizes[:, None].expand_as(sums).flatten()[order].cumsum(dim=0)
    last = torch.cat([shares[1:] < shares[:-1], torch.tensor([True])]) & (shares > 0)  # all columns as dense as this
    nearest = (covered - area).abs().masked_fill(~last, int(covered[-1]) + area + 1).argmin()
    return float(shares[nearest])


def widest_columns(sums: torch.Tensor, width: int) -> Choice:
    """The ``width`` largest columns of each group."""
    chosen = largest(sums, torch.full((len(sums),), width))
    return Choice(chosen, float(sums[chosen].sum()))


def within_budget(sums: torch.Tensor, sizes: torch.Tensor, area: int, *, narrowest: int, multiple: int) -> Choice:
    """The columns that hold most per position, over all groups together, until ``area`` is spent.

    Columns are taken ``multiple`` at a time, in descending order of what they hold per row: the fractional knapsack
    without the fraction, so no other choice for these groups that covers as much holds more. A group left with fewer
    than ``narrowest`` columns gives its share to the others; the last one gets ``narrowest`` even beyond the budget.

    Args:
        sizes: rows of each group, int64 ``[groups]``.
        area: rows × columns that may be covered.
    """
    closed = torch.zeros(len(sums), dtype=torch.bool)
    while True:
        widths = _spend(sums.masked_fill(closed[:, None], 0), sizes, area, multiple)
        thin = (widths > 0) & (widths < narrowest)
        if int((widths >= narrowest).sum()) == 0 and int(thin.sum()) <= 1:
            best = sums.topk(narrowest, dim=1).values.sum(dim=1) / sizes
            widths = torch.zeros_like(widths)
            widths[best.argmax()] = narrowest
            break
        if not bool(thin.any()):
            break
        held = (sums * largest(sums, widths)).sum(dim=1)
        closed[int(held.masked_fill(~thin, torch.inf).argmin())] = True
    chosen = largest(sums, widths)
    return Choice(chosen, float(sums[chosen].sum()))


def shared_out(sums: torch.Tensor, widths: list[int], previous: torch.Tensor | None) -> Choice:
    """Every column to one group, ``widths[group]`` to each, so that the groups hold much; improves on ``previous``."""
    if previous is None:
        owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))  # [columns]
    else:
        owner = previous.int().argmax(dim=0)
    for _ in range(_SWEEPS):
        if not exchange_(owner, sums.T):
            break
    chosen = owner == torch.arange(len(widths))[:, None]
    return Choice(chosen, float(sums[chosen].sum()))


def ratio_width(counts: torch.Tensor, ratio: float, taps: int) -> int | None:
    """How many columns the program's rule gives a group, or None when it finds no block.

    Columns come in descending order of non-zeros. Accepted is the first width w, below the layer's whole width, with
    ``w > ratio · (non-zeros left out)`` for every row. The published training code counts the non-zeros left out by
    the unsorted column index, a defect that its own inference copy mends; here as there it is the sorted one.

    Args:
        counts: non-zeros ``[rows, columns]`` of the group, over the columns in which the layer has any.
        taps: positions in a column; widths and non-zeros compare as positions.
    """
    order = torch.argsort(counts.sum(dim=0), descending=True, stable=True)
    left_out = counts.sum(dim=1, keepdim=True) - counts[:, order].cumsum(dim=1)  # [rows, columns]
    widths = torch.arange(1, counts.shape[1] + 1) * taps
    accepted = (widths > ratio * left_out.amax(dim=0))[:-1].nonzero()
    return int(accepted[0]) + 1 if len(accepted) else None


def rounded(widths: torch.Tensor, multiple: int, most: int) -> torch.Tensor:
    """Widths rounded up to a multiple, but no wider than the layer."""
    return (-(-widths // multiple) * multiple).clamp(max=most)


def _spend(sums: torch.Tensor, sizes: torch.Tensor, area: int, multiple: int) -> torch.Tensor:
    groups, columns = sums.shape
    chunks = -(-columns // multiple)
    lengths = torch.full((chunks,), multiple)
    lengths[-1] = columns - multiple * (chunks - 1)
    ordered = sums.sort(dim=1, descending=True).values
    ordered = torch.nn.functional.pad(ordered, (0, chunks * multiple - columns))
    held = ordered.reshape(groups, chunks, multiple).sum(dim=2)  # [groups, chunks]
    cost = sizes[:, None] * lengths
    order = torch.argsort((held / cost).flatten(), descending=True, stable=True)
    affordable = (cost.flatten()[order].cumsum(dim=0) <= area) & (held.flatten()[order] > 0)
    taken = torch.zeros(groups * chunks, dtype=torch.bool)
    taken[order[affordable]] = True
    return (taken.reshape(groups, chunks) * lengths).sum(dim=1)
