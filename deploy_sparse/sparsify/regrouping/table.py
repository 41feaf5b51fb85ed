"""A layer as regroup sees it, the limits a rule sets for it, and the blocks found in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .partition import whole_numbers
from .rule import RegroupRule

Block = tuple[torch.Tensor, torch.Tensor]
"""Indices of its rows and of its columns, int64."""


@dataclass(frozen=True)
class Table:
    """What a layer holds, by row (output channel) and column (position, or input channel with all its taps).

    Attributes:
        counts: surviving entries, float64 ``[rows, columns]``; 0 to ``taps`` each.
        weights: the weights with 0 where nothing survives, ``[rows, columns, taps]``.
        whole: number of columns of the layer, those besides that blocks may not hold included.
    """

    counts: torch.Tensor
    weights: torch.Tensor
    whole: int

    @property
    def taps(self) -> int:
        """Positions in a column: 1, or the kernel's size when columns are input channels."""
        return self.weights.shape[2]

    @property
    def density(self) -> float:
        """Surviving share."""
        return float(self.counts.sum()) / max(1, self.counts.numel() * self.taps)

    def alive(self) -> torch.Tensor:
        """Indices of the rows in which something survives."""
        return self.counts.any(dim=1).nonzero().flatten()

    def values(self, rows: torch.Tensor, rule: RegroupRule, factors: int = 1) -> torch.Tensor:
        """What the rule looks at, ``[rows, columns]`` whole numbers: non-zeros, or magnitudes for the budget.

        Magnitudes are as precise as exact sums allow: of themselves, or (``factors=2``) of the products of two of them
        in each column over all pairs of rows.
        """
        if rule.rule != "budget":
            return self.counts[rows]
        return self.magnitudes(rows, factors)

    def magnitudes(self, rows: torch.Tensor, factors: int = 1) -> torch.Tensor:
        """ℓ1 norms as whole numbers, see :meth:`values`."""
        norms = self.weights[rows].abs().double().sum(dim=2)  # [rows, columns, taps] -> [rows, columns]
        return whole_numbers(norms, norms.numel() * (len(norms) if factors == 2 else 1), factors)


def joined(tables: Sequence[Table]) -> Table:
    """The columns of layers with equally many rows behind each other, each with its ℓ1 norm for a weight."""
    if len(tables) == 1:
        return tables[0]
    norms = [table.weights.abs().double().sum(dim=2, keepdim=True) for table in tables]  # [rows, columns, 1]
    counts = torch.cat([table.counts for table in tables], dim=1)
    return Table(counts, torch.cat(norms, dim=1), counts.shape[1])


def table_of(
    mask: torch.Tensor, weight: torch.Tensor, usable: torch.Tensor, rule: RegroupRule
) -> tuple[Table, torch.Tensor]:
    """A layer's table, and which of the layer's columns it holds, int64.

    Args:
        mask: bool ``[c_out, c_in, ...]``.
        weight: shaped like it.
        usable: input channels that blocks may hold, bool ``[c_in]``.
    """
    cells = mask.reshape(*mask.shape[:2], -1)  # [c_out, c_in, kh · kw]
    if rule.columns == "position":
        usable = usable.repeat_interleave(cells.shape[2])
        cells = cells.reshape(len(mask), -1, 1)  # [c_out, c_in · kh · kw, 1]
    columns = usable.nonzero().flatten()
    surviving = cells[:, columns]
    weights = weight.reshape(cells.shape)[:, columns] * surviving
    return Table(surviving.sum(dim=2).double(), weights, len(usable)), columns


@dataclass(frozen=True)
class Limits:
    """The numbers a rule leaves open, for one layer.

    Attributes:
        rows: least rows of a block.
        columns: columns a group needs to become a block.
        width: least columns of a block: those, rounded up to the multiple.
        multiple: widths are multiples of it.
        area: rows × columns that blocks are asked to cover.
    """

    rows: int
    columns: int
    width: int
    multiple: int
    area: int

    @classmethod
    def of(cls, table: Table, rule: RegroupRule, rows: int) -> Limits:
        """The limits where ``rows`` rows may be placed."""
        columns = table.counts.shape[1]
        multiple = min(rule.multiple, columns)
        if rule.rule == "code":
            least, narrowest = (rule.min_rows or 16) + 1, rule.min_columns or 1
        else:
            least, narrowest = rule.min_rows or rule.tile, rule.min_columns or max(math.ceil(columns / 64), multiple)
        area = rule.density * len(table.counts) * table.whole or table.density * table.counts.numel()
        return cls(
            rows=min(least, rows),
            columns=min(narrowest, columns),
            width=min(-(-narrowest // multiple) * multiple, columns),
            multiple=multiple,
            area=int(area + 1e-9),
        )


def capped_limits(table: Table, rule: RegroupRule) -> str:
    """Which limits given explicitly are more than the layer has, in brackets, or nothing."""
    rows, (all_rows, all_columns) = len(table.alive()), table.counts.shape
    notes = []
    if rule.min_rows > rows:
        notes.append(f"min_rows = {rule.min_rows}, capped at the layer's {rows}{' left' * (rows < all_rows)}")
    if rule.min_columns > all_columns:
        left = " left" * (all_columns < table.whole)
        notes.append(f"min_columns = {rule.min_columns}, capped at the layer's {all_columns}{left}")
    return f" ({'; '.join(notes)})" if notes else ""


@dataclass(frozen=True)
class Found:
    """The blocks of a layer, or none and why."""

    blocks: tuple[Block, ...]
    reason: str = ""


def blocks_of(rows: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor) -> tuple[Block, ...]:
    """One block for each group with columns.

    Args:
        rows: ``[n]`` indices of rows.
        labels: ``[n]`` group of each.
        chosen: bool ``[groups, columns]``.
    """
    return tuple(
        (rows[labels == group], columns.nonzero().flatten())
        for group, columns in enumerate(chosen)
        if bool(columns.any())
    )
