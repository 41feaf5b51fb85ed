"""A layer's weight as matrices: which rows and columns it uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..flags import any_along, nonzero

Part = tuple[int, int] | None


def matrices(weight: torch.Tensor, groups: int, transposed: bool, part: Part = None) -> torch.Tensor:
    """The weight of a convolution or Linear layer as ``[groups, rows, columns, taps]``; a view where possible.

    Args:
        weight: ``[groups · rows, columns, *taps]``, or ``[groups · columns, rows, *taps]`` when ``transposed``.
        groups: of the convolution.
        transposed: whether axis 0 holds the columns.
        part: first and last-but-one position of axis 0 that counts.
    """
    weight = weight if part is None else weight[part[0] : part[1]]
    taps = weight.reshape(*weight.shape[:2], -1)
    blocks = taps.reshape(groups, taps.shape[0] // groups, *taps.shape[1:])
    return blocks.transpose(1, 2) if transposed else blocks


def used(weight: torch.Tensor, groups: int, transposed: bool, part: Part = None) -> torch.Tensor:
    """Which entries are not zero at every tap, bool ``[groups, rows, columns]``."""
    blocks = matrices(weight, groups, transposed, part)
    if weight.is_meta:  # unknown
        return torch.ones(blocks.shape[:3], dtype=torch.bool)
    entries = nonzero(blocks)
    return entries.squeeze(-1) if entries.shape[-1] == 1 else any_along(entries, -1)


@dataclass(frozen=True)
class Usage:
    """Rows and columns of a weight that are all zero: bool ``[groups · rows]`` and ``[groups · columns]``."""

    silent_rows: torch.Tensor
    ignored: torch.Tensor


def usage(weight: torch.Tensor, groups: int, transposed: bool, part: Part = None) -> Usage:
    """What the weight does not use."""
    blocks = matrices(weight, groups, False, part)  # as they lie in memory
    entries = torch.ones(blocks.shape, dtype=torch.bool) if weight.is_meta else nonzero(blocks)
    first, second = any_along(entries, 2, 3), any_along(any_along(entries, 1), -1)
    rows, columns = (second, first) if transposed else (first, second)
    return Usage(~rows.reshape(-1), ~columns.reshape(-1))


def rows_reading(
    weight: torch.Tensor, groups: int, transposed: bool, part: Part, columns: torch.Tensor, silent_rows: torch.Tensor
) -> torch.Tensor:
    """Which rows have a weight that is not zero in any of ``columns``; bool ``[groups · rows]``.

    Args:
        columns: bool ``[groups · columns]``.
        silent_rows: bool ``[groups · rows]``, rows of zeros.
    """
    blocks = matrices(weight, groups, transposed, part)
    chosen = columns.reshape(groups, -1)  # [groups, columns]
    if weight.is_meta:
        return chosen.any(dim=1).repeat_interleave(blocks.shape[1])
    if groups > 1:  # small matrices
        return any_along(nonzero(blocks) & chosen[:, None, :, None], 2, 3).reshape(-1)
    found = torch.zeros_like(silent_rows)
    waiting, places = (~silent_rows).nonzero().flatten(), chosen[0].nonzero().flatten()
    # A few columns decide for nearly all rows, so that the whole weight is rarely looked at.
    for some in (places[:_SAMPLE], places[_SAMPLE:]):
        if len(waiting) and len(some):
            smaller = ((1, some), (0, waiting)) if len(some) < len(waiting) else ((0, waiting), (1, some))
            read = blocks[0]
            for dim, positions in smaller:
                read = read.index_select(dim, positions)
            reads = any_along(nonzero(read), 1, 2)
            found[waiting[reads]] = True
            waiting = waiting[~reads]
    return found


_SAMPLE = 4
_CHUNK = 1 << 22  # numbers converted to float64 at a time


def contribution(
    weight: torch.Tensor, groups: int, transposed: bool, part: Part, constant: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """``Σ_i W[:, i] · c_i`` over columns and taps, float64 ``[groups · rows]``, zero for other rows than ``rows``.

    Args:
        constant: float64 ``[groups · columns]``.
        rows: bool ``[groups · rows]``.
    """
    blocks = matrices(weight, groups, transposed, part)
    total = torch.zeros(blocks.shape[:2], dtype=torch.float64)  # [groups, rows]
    if weight.is_meta:
        return torch.full_like(total, torch.nan).reshape(-1)
    spread = constant.reshape(groups, -1)  # [groups, columns]
    for number in range(groups):
        carried = (spread[number] != 0).nonzero().flatten()
        asked = rows.reshape(groups, -1)[number].nonzero().flatten()
        if not len(carried) or not len(asked):
            continue
        step = max(1, _CHUNK // (len(carried) * blocks.shape[3]))
        for some in torch.split(asked, step):
            chosen = blocks[number][some][:, carried].to("cpu", torch.float64)  # [some rows, carried, taps]
            total[number, some] = chosen.sum(dim=-1) @ spread[number, carried]
    return total.reshape(-1)
