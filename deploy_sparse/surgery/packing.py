"""How the surviving blocks of a weight become one or few dense computations: a value without weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args

import torch
from pydantic import BeforeValidator, PlainSerializer

from ..errors import SurgeryError, nearest
from ..structure import MIN_BLOCK_ROWS, Block, row_blocks
from ._positions import positions, ranges

Form = Literal["disjoint", "equal", "free", "positions"]
_PADDING_WORTH_TIMING = 1.25


def _block_of(value: object) -> object:
    return {name: positions(text) for name, text in value.items()} if isinstance(value, dict) else value


def _json_of(block: Block) -> dict[str, str]:
    return {"rows": ranges(block.rows), "columns": ranges(block.columns)}


PackedBlock = Annotated[Block, BeforeValidator(_block_of), PlainSerializer(_json_of, return_type=dict[str, str])]
"""A block; in JSON its rows and columns are short texts like ``"0-15,18"``."""


@dataclass(frozen=True)
class Packing:
    """The format of a block-packed layer.

    Forms, from the fastest on:

    * ``"disjoint"``: blocks of one size, no input channel in two of them; one grouped convolution.
    * ``"equal"``: blocks of one size once padded to ``tile``; their input channels are looked up, then one grouped
      convolution.
    * ``"free"``: blocks of any sizes; one look-up and one convolution for each.
    * ``"positions"``: columns are single positions of the kernel; as ``"free"``, on the unrolled input.

    Padded columns read the block's last column again with weights of zero; padded rows are dropped.

    Attributes:
        out_channels: rows of the dense weight.
        in_channels: input channels of the dense weight.
        kernel: ``(kh, kw)`` of a Conv2d, ``()`` of a Linear.
        form: see above.
        blocks: rows and flattened columns ``[c_in · kh · kw]`` of the dense weight; a row may be in none.
        tile: columns of each block are padded up to a multiple of this, never above the layer's own, and in the form
            ``"equal"`` rows too. The form ``"disjoint"`` pads nothing.
        gather: input channels are looked up; False: the input arrives in the order of ``columns``.
        restore: rows are put back into dense order; False: the output has the order of ``rows``.

    Raises:
        SurgeryError: the blocks do not have that form, or an order that cannot be left to the neighbours.
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    form: Form
    blocks: tuple[PackedBlock, ...]
    tile: int = 1
    gather: bool = True
    restore: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_blocks(self)
        _check_form(self)
        _check_orders(self)

    @property
    def taps(self) -> int:
        """Positions of the kernel; 1 for a Linear."""
        return math.prod(self.kernel)

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """For each block, without padding: dense input channels, or flattened columns in the form ``"positions"``."""
        step = 1 if self.form == "positions" else self.taps
        return tuple(tuple(column // step for column in block.columns[::step]) for block in self.blocks)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns that each block computes, padding included; columns are counted as in :attr:`reads`."""
        available = self.in_channels * (self.taps if self.form == "positions" else 1)
        row_tile = self.tile if self.form == "equal" else 1
        column_tile = 1 if self.form == "disjoint" else self.tile
        return tuple(
            (_padded(len(block.rows), row_tile, self.out_channels), _padded(len(read), column_tile, available))
            for block, read in zip(self.blocks, self.reads, strict=True)
        )

    @property
    def columns(self) -> tuple[int, ...]:
        """The dense input channel at each position the blocks read, one block after the other.

        Flattened columns in the form ``"positions"``.
        """
        return tuple(
            column
            for read, (_, wide) in zip(self.reads, self.sizes, strict=True)
            for column in (*read, *[read[-1]] * (wide - len(read)))
        )

    @property
    def rows(self) -> tuple[int, ...]:
        """The dense row at each position of the packed output; -1 where a row of zeros is.

        There is at least one such position where the dense weight has rows in no block.
        """
        rows = [
            row
            for block, (tall, _) in zip(self.blocks, self.sizes, strict=True)
            for row in (*block.rows, *[-1] * (tall - len(block.rows)))
        ]
        return (*rows, -1) if self.empty_rows and -1 not in rows else tuple(rows)

    @property
    def places(self) -> tuple[int, ...]:
        """For each dense row its position in :attr:`rows`; rows in no block share a row of zeros."""
        place = {row: at for at, row in enumerate(self.rows)}
        return tuple(place[row if row in place else -1] for row in range(self.out_channels))

    @property
    def empty_rows(self) -> bool:
        """Some dense row is in no block."""
        return sum(len(block.rows) for block in self.blocks) < self.out_channels

    @property
    def gathers(self) -> bool:
        """The layer has to look its input channels up: they are asked for, and not in order already."""
        return self.gather and self.columns != tuple(range(self.in_channels))

    @property
    def restores(self) -> bool:
        """The layer has to put its rows back: that is asked for, and they are not in order already."""
        return self.restore and self.rows != tuple(range(self.out_channels))

    def check_weight(self, weight: Iterable[int], bias: Iterable[int] | None = None) -> None:
        """Refuse the shapes of a dense weight and bias that this is not the packing of.

        Raises:
            SurgeryError: it is not.
        """
        expected = [self.out_channels, self.in_channels, *self.kernel]
        shapes = [list(weight), None if bias is None else list(bias)]
        if shapes[0] != expected or shapes[1] not in (None, expected[:1]):
            raise SurgeryError(
                f"a weight of shape {shapes[0]}" + ("" if bias is None else f" and a bias of shape {shapes[1]}"),
                expected=f"the weight of shape {expected} that the packing is for, and a bias of shape {expected[:1]}",
                fix="make the packing of this weight's own mask",
            )


def packing_of(mask: torch.Tensor, *, tile: int = 16, form: Form | None = None) -> Packing:
    """The packing of a mask that is a union of blocks, in the form asked for or the fastest that it has.

    The fastest is ``"disjoint"`` for blocks whose sizes are multiples of ``tile``, then ``"equal"``, ``"free"`` and
    ``"positions"``; which of them beats the dense layer is to be measured.

    Args:
        mask: bool, ``[c_out, c_in]`` or ``[c_out, c_in, kh, kw]``; True survives.
        tile: multiple that sizes are padded up to; vector kernels work on so many at a time.
        form: see :class:`Packing`.

    Raises:
        SurgeryError: no mask of blocks, or not of that form.
    """
    if mask.dtype != torch.bool or mask.dim() not in (2, 4):
        raise SurgeryError(
            f"a mask of dtype {mask.dtype} and shape {list(mask.shape)}",
            expected="a bool mask of a Linear or Conv2d weight, [out, in] or [out, in, kh, kw]",
            fix="pass the mask of one layer's weight, e.g. ticket.masks['layer.weight']",
        )
    blocks = row_blocks(mask)
    if blocks is None:
        raise SurgeryError(
            f"a mask of shape {list(mask.shape)} without blocks ({float(mask.float().mean()):.1%} survives)",
            expected=f"rows that survive in the same columns, at least {MIN_BLOCK_ROWS} rows each time",
            fix="make the ticket with a regroup recipe, or deploy this layer dense",
        )
    cells = mask.flatten(2) if mask.dim() == 4 else mask.unsqueeze(2)  # [c_out, c_in, taps]
    whole = bool((cells.all(dim=2) == cells.any(dim=2)).all())
    out_channels, in_channels, *kernel = mask.shape

    def packed(form: Form, tile: int) -> Packing:
        return Packing(out_channels, in_channels, tuple(kernel), form, blocks, tile)

    if form is not None:
        return packed(form, 1 if form == "disjoint" else tile)
    if not whole:
        return packed("positions", tile)
    free = packed("free", tile)
    heights, widths = {len(block.rows) for block in blocks}, {len(read) for read in free.reads}
    if not _shared(free) and len(heights) == len(widths) == 1:
        aligned = _padded(min(heights), tile, out_channels), _padded(min(widths), tile, in_channels)
        if aligned == (min(heights), min(widths)):
            return packed("disjoint", 1)
    padded = {_padded(height, tile, out_channels) for height in heights}
    return packed("equal", tile) if len(padded) == len({wide for _, wide in free.sizes}) == 1 else free


@dataclass(frozen=True)
class Style:
    """How the blocks of a mask are computed: a form of :class:`Packing`, and what sizes are padded up to."""

    form: Form
    tile: int


def other_style(packing: Packing, *, tile: int = 16) -> Style | None:
    """Another way to compute the blocks of a packing, which may be faster where they run; None: there is none.

    One convolution for each block in place of a grouped one, which not every engine runs well; and blocks of unlike
    sizes as one grouped convolution, padded to one size, where that costs a quarter more at most.
    """
    if packing.form in ("disjoint", "equal"):
        return Style("free", tile) if len(packing.blocks) > 1 else None
    if packing.form == "positions" or len(packing.blocks) == 1:
        return None
    tall, wide = max(len(block.rows) for block in packing.blocks), max(map(len, packing.reads))
    for common in range(tile, max(tall, wide) + tile, tile):
        sizes = {
            (_padded(len(block.rows), common, packing.out_channels), _padded(len(read), common, packing.in_channels))
            for block, read in zip(packing.blocks, packing.reads, strict=True)
        }
        if len(sizes) == 1:
            area = math.prod(next(iter(sizes))) * len(packing.blocks)
            least = sum(rows * columns for rows, columns in packing.sizes)
            return Style("equal", common) if area <= _PADDING_WORTH_TIMING * least else None
    return None


def _padded(size: int, tile: int, most: int) -> int:
    return max(size, min(-(-size // tile) * tile, most))


def _shared(packing: Packing) -> list[int]:
    """Input channels that several blocks read."""
    counts = Counter(channel for channels in packing.reads for channel in channels)
    return sorted(channel for channel, count in counts.items() if count > 1)


def _check_sizes(packing: Packing) -> None:
    if packing.form not in get_args(Form):
        raise SurgeryError(
            f"the form {packing.form!r}",
            expected="one of " + ", ".join(map(repr, get_args(Form))),
            fix=f"{nearest(str(packing.form), get_args(Form))}leave it to packing_of(mask)",
        )
    sizes = (packing.out_channels, packing.in_channels, *packing.kernel, packing.tile)
    if len(packing.kernel) not in (0, 2) or min(sizes) < 1:
        raise SurgeryError(
            f"a weight of {packing.out_channels} rows, {packing.in_channels} input channels, kernel {packing.kernel} "
            f"and tile {packing.tile}",
            expected="positive sizes, and the kernel (kh, kw) of a Conv2d or () of a Linear",
            fix="leave the packing to packing_of(mask)",
        )
    if packing.form == "positions" and not packing.kernel:
        raise SurgeryError(
            "the form 'positions' for a Linear", expected="a Conv2d, whose kernel has positions", fix="use form 'free'"
        )


def _check_blocks(packing: Packing) -> None:
    width = packing.in_channels * packing.taps
    seen: set[int] = set()
    for number, block in enumerate(packing.blocks):
        ordered = _ascends(block.rows, packing.out_channels) and _ascends(block.columns, width)
        if not ordered or seen.intersection(block.rows):
            raise SurgeryError(
                f"block {number} has the rows {ranges(block.rows) or 'none'} and the columns "
                f"{ranges(block.columns) or 'none'}" + (", rows of an earlier block" if ordered else ""),
                expected=f"ascending rows below {packing.out_channels} that are in no other block, and ascending "
                f"columns below {width}",
                fix="leave the packing to packing_of(mask)",
            )
        seen.update(block.rows)
    if not packing.blocks:
        raise SurgeryError("a packing without blocks", expected="at least one block", fix="remove the layer instead")


def _ascends(values: tuple[int, ...], limit: int) -> bool:
    return bool(values) and values[0] >= 0 and values[-1] < limit and all(a < b for a, b in pairwise(values))


def _check_form(packing: Packing) -> None:
    if packing.form == "positions":
        return
    step = packing.taps
    for number, (block, read) in enumerate(zip(packing.blocks, packing.reads, strict=True)):
        whole = tuple(channel * step + tap for channel in read for tap in range(step))
        if block.columns != whole:
            raise SurgeryError(
                f"block {number} has single positions of a {'×'.join(map(str, packing.kernel))} kernel for columns",
                expected=f"whole input channels, all {step} positions of each, in the form {packing.form!r}",
                fix="use form 'positions', or regroup by input channels",
            )
    if packing.form == "free":
        return
    if len(set(packing.sizes)) > 1:
        unpadded = packing.form == "disjoint" or packing.tile == 1
        raise SurgeryError(
            f"blocks of {_texts(packing.sizes)} rows × input channels"
            + ("" if unpadded else f" once padded to multiples of {packing.tile}"),
            expected=f"blocks of one size in the form {packing.form!r}",
            fix="use form 'free'",
        )
    if packing.form == "disjoint" and (shared := _shared(packing)):
        raise SurgeryError(
            f"input channels {ranges(shared)} are read by several blocks",
            expected="each input channel in one block at most in the form 'disjoint'",
            fix="use form 'equal'",
        )


def _texts(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{tall}×{wide}" for tall, wide in sizes)


def _check_orders(packing: Packing) -> None:
    if not packing.gather and (
        packing.form != "disjoint" or sorted(packing.columns) != list(range(packing.in_channels))
    ):
        raise SurgeryError(
            f"gather=False in the form {packing.form!r}, whose blocks read {len(set(packing.columns))} of "
            f"{packing.in_channels} input channels",
            expected="the form 'disjoint', and every input channel in one block",
            fix="use gather=True",
        )
    if not packing.restore and sorted(packing.rows) != list(range(packing.out_channels)):
        raise SurgeryError(
            f"restore=False, and the packed layer computes {packing.out_channels - len(set(packing.rows) - {-1})} "
            f"rows of its {packing.out_channels} not at all and {packing.rows.count(-1)} as padding",
            expected="every dense row in one block, and no padded rows",
            fix="use restore=True",
        )
