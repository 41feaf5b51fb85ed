"""Rows with similar columns, grouped: a balanced partition that stands in for the paper's hMETIS (section 3.3).

Two stages improve it step by step. First the graph of row similarities is partitioned by swaps (Kernighan and Lin
1970): a row's own entries do not count towards its group, so rows do not simply stay where they started. Then rows and
columns take turns: every group takes the columns that are best for its rows, and rows move to the groups whose columns
hold most of them. Sums are taken over whole numbers, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

_SWEEPS = 20  # of swaps; a few suffice
_TURNS = 25  # of rows and columns
_STARTS = 2
_MOST_SIMILAR = 8192  # rows; beyond, the similarities [rows, rows] would take more than half a gigabyte


Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Choice:
    """Columns by group: ``chosen`` is bool ``[groups, columns]``; ``worth`` is what the choice was made to enlarge."""

    chosen: torch.Tensor
    worth: float


Chooser = Callable[[torch.Tensor, torch.Tensor | None], Choice]
"""From sums by group ``[groups, columns]`` and the previous choice to the best columns for these sums."""


def partition(values: torch.Tensor, sizes: list[int], choose: Chooser | None = None) -> torch.Tensor:
    """Group rows so that much of what a row holds lies in columns its group shares.

    Args:
        values: ``[rows, columns]`` float64 whole numbers from 0, what a position is worth: how many non-zeros it holds,
            or a magnitude, see :func:`whole_numbers`.
        sizes: rows of each group; they sum to ``rows``.
        choose: the columns a group takes. Without it rows are grouped by similarity alone.

    Returns:
        the group of each row, int64 ``[rows]``. A pure function of the arguments.
    """
    rows, count = len(values), len(sizes)
    if count == 1:
        return torch.zeros(rows, dtype=torch.int64)
    similar = (values @ values.T).fill_diagonal_(0) if rows <= _MOST_SIMILAR else None  # [rows, rows]
    best, most = torch.empty(0, dtype=torch.int64), -math.inf
    for number in range(_STARTS):
        labels = _seeded(values, sizes) if number == 0 else _shuffled(rows, sizes, number)
        worth = _swap_similar_(labels, similar, count) if similar is not None else 0.0
        if choose is not None:
            worth = _take_turns_(labels, values, count, choose)
        if worth > most:
            best, most = labels, worth
    return best


def whole_numbers(values: torch.Tensor, terms: int, factors: int = 1) -> torch.Tensor:
    """Values of at least 0, scaled and rounded to whole numbers as large as exact arithmetic in float64 allows.

    Args:
        terms: how many numbers will be added up.
        factors: how many values are multiplied to make one of them.
    """
    bits = (53 - math.ceil(math.log2(max(2, terms)))) // factors
    largest = float(values.max())
    return (values.double() * (2.0**bits / largest)).round() if largest > 0 else values.double()


def group_sums(values: torch.Tensor, labels: torch.Tensor, groups: int) -> torch.Tensor:
    """Column sums of each group: ``[rows, columns]`` to ``[groups, columns]``."""
    return _members(labels, groups, values.dtype).T @ values


def exchange_(labels: torch.Tensor, affinity: torch.Tensor) -> bool:
    """Give rows to the groups they fit best; sizes stay. Each pair of groups in turn is split anew, which is exact.

    Args:
        labels: the group of each row, changed in place.
        affinity: ``[rows, groups]``, whole numbers.

    Returns:
        whether anything got better.
    """
    group, fits = labels.numpy(), affinity.T.contiguous().numpy()  # views: what follows is many small steps
    better = False
    for a, b in combinations(range(len(fits)), 2):
        rows = ((group == a) | (group == b)).nonzero()[0]
        in_a = group[rows] == a
        prefers_a = fits[a, rows] - fits[b, rows]
        first = (-prefers_a).argsort(kind="stable")[: in_a.sum()]
        if prefers_a[first].sum() > prefers_a[in_a].sum():
            group[rows] = b
            group[rows[first]] = a
            better = True
    return better


def _take_turns_(labels: torch.Tensor, values: torch.Tensor, groups: int, choose: Chooser) -> float:
    choice = choose(group_sums(values, labels, groups), None)
    for _ in range(_TURNS):
        if not exchange_(labels, values @ choice.chosen.T.to(values.dtype)):
            break
        choice = choose(group_sums(values, labels, groups), choice.chosen)
    return choice.worth


def _swap_similar_(labels: torch.Tensor, similar: torch.Tensor, groups: int) -> float:
    """Swap rows between groups while the similarity within groups grows; returns that similarity."""
    pull = _members(labels, groups, similar.dtype).T @ similar  # [groups, rows], a row's own entries left out
    changed = list(range(groups))
    for _ in range(_SWEEPS):
        pairs = [(a, b) for a, b in combinations(range(groups), 2) if a in changed or b in changed]
        swapped = [pair for pair in pairs if _swap_pair_(labels.numpy(), pull.numpy(), similar.numpy(), *pair)]
        changed = sorted({group for pair in swapped for group in pair})
        if not changed:
            break
    return float((pull.T * _members(labels, groups, similar.dtype)).sum())


def _swap_pair_(group: Numbers, pull: Numbers, similar: Numbers, a: int, b: int) -> bool:
    prefers_b = pull[b] - pull[a]  # [rows]
    out, into = (group == a).nonzero()[0], (group == b).nonzero()[0]
    out = out[(-prefers_b[out]).argsort(kind="stable")]
    into = into[prefers_b[into].argsort(kind="stable")]
    pairs = min(len(out), len(into))
    gains = prefers_b[out[:pairs]] - prefers_b[into[:pairs]] - 2 * similar[out[:pairs], into[:pairs]]
    count = (int((gains > 0).sum()) + 1) // 2  # rows that move together also lose each other: try half, then fewer
    while count:
        out, into = out[:count], into[:count]
        shift = similar[into].sum(axis=0) - similar[out].sum(axis=0)  # [rows]: how pull[a] would change
        if (prefers_b[out] + shift[into]).sum() > (prefers_b[into] + shift[out]).sum():
            group[out], group[into] = b, a
            pull[a] += shift
            pull[b] -= shift
            return True
        count //= 2
    return False


def _members(labels: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, groups).to(dtype)  # [rows, groups]


def _shuffled(rows: int, sizes: list[int], seed: int) -> torch.Tensor:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]


def _seeded(values: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Groups around rows that are least alike: each next seed is the row farthest from those before it."""
    alike = values / values.norm(dim=1, keepdim=True).clamp(min=1)  # cosine
    alike = (alike * 2**20).round()  # whole numbers again
    nearest = alike @ alike.sum(dim=0)  # the first seed is the least typical row
    near: list[torch.Tensor] = []
    for _ in sizes:
        near.append(alike @ alike[int(nearest.argmin())])  # [rows]
        nearest = torch.stack(near).amax(dim=0)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    exchange_(labels, torch.stack(near, dim=1))
    return labels
