"""How a block-packed convolution lies in memory for the kernel of :mod:`.kernel`: values and pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from ...errors import ConfigError

Pair = tuple[int, int]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 32  # columns; two instructions of a 16-bit tensor core deep
MAX_STEP = 128  # more tells the compiler nothing
RUNS = (8, 4, 2)
RUN_BYTES = 16  # the widest load of one thread


@dataclass(frozen=True)
class BlockShape:
    """Everything about the kernel's work but the tensors; plain numbers.

    Attributes:
        in_channels, out_channels: of the activations read and written.
        kernel, stride, padding, dilation: height, width.
        blocks: their number; rows in no block count as one without columns.
        max_rows, max_columns: of one block.
        column_run, row_run: channels that are always read, and written, side by side and aligned.
        step: power of two from 16 on that divides every block's columns.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    blocks: int
    max_rows: int
    max_columns: int
    column_run: int
    row_run: int
    step: int

    def out_size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Height and width of the output for an input of that size; zero or less where the kernel does not fit.

        Sizes are numbers, or symbols that take numbers on their right.
        """
        axes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        first, second = ((size + (2 * p - d * (k - 1) - 1)) // s + 1 for size, k, s, p, d in axes)
        return first, second

    def scalars(self, batch: Any, height: Any, width: Any) -> list[Any]:
        """The kernel's integer arguments in order, the number of output pixels first; sizes as in :meth:`out_size`."""
        out_height, out_width = self.out_size(height, width)
        sizes = [batch * out_height * out_width, height, width, out_height, out_width]
        return [*sizes, self.in_channels, self.out_channels, self.blocks, self.max_rows, self.max_columns]

    def row_tiles(self, rows: int) -> int:
        """Programs for one tile of pixels, where a program takes so many rows."""
        return self.blocks * -(-self.max_rows // rows)

    def constants(self, *, relu: bool = False, tf32: bool = False) -> dict[str, Any]:
        """The kernel's compile-time arguments, those of the tile excepted."""
        named = {"KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding, "DILATION": self.dilation}
        pairs = {
            f"{name}_{axis}": value for name, pair in named.items() for axis, value in zip("HW", pair, strict=True)
        }
        runs = {"COLUMN_RUN": self.column_run, "ROW_RUN": self.row_run, "STEP": self.step}
        return {**pairs, **runs, "RELU": relu, "PRECISION": "tf32" if tf32 else "ieee", "WIDEN": False}


@dataclass(frozen=True)
class BlockLayout:
    """A convolution laid out for the kernel; made by :func:`prepare`.

    Attributes:
        shape: what the kernel must know of it.
        weight: per block ``[rows, kernel height · width, columns]``, flattened, one block after another.
        bias: float32, one a row, in the order of the blocks' rows.
        columns: int32, the input channels of each block, filled up to a multiple of the tile with zero weights.
        positions: int32, the output channel of each row.
        table: int32 ``[blocks, 5]``: rows, columns, and where weight, columns and rows of the block begin.
    """

    shape: BlockShape
    weight: torch.Tensor
    bias: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the kernel's order."""
        return self.weight, self.bias, self.columns, self.positions, self.table

    def to(self, device: torch.device | str) -> Self:
        """The same layout on another device."""
        return type(self)(self.shape, *(tensor.to(device) for tensor in self.tensors))


def prepare(
    weight: torch.Tensor,
    blocks: Iterable[tuple[Sequence[int], Sequence[int]]],
    bias: torch.Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    order: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    tile: int = TILE,
) -> BlockLayout:
    """Lay a convolution out for the kernel.

    Args:
        weight: dense, ``[out, in, kernel height, kernel width]``; entries outside the blocks are not read.
        blocks: (rows, input channels) of each block, of any sizes; a row is in at most one block, channels may be in
            several. A row in no block yields its bias.
        bias: ``[out]``.
        order: the dense row that each output channel holds; every row in dense order unless given. Rows left out are
            not computed.
        dtype: number format of weight and activations, the weight's own unless given: float16, bfloat16 or float32.
        tile: each block's columns are padded with zero weights to a multiple of this power of two, at least 16.

    Raises:
        ConfigError: blocks that do not fit the weight or overlap in rows, or an option out of range.
    """
    dtype = dtype or weight.dtype
    _check_weight(weight, bias, dtype, tile)
    rows_out, rows_in = weight.shape[:2]
    order = range(rows_out) if order is None else order
    _check_members("order", order, rows_out, "rows")
    if not order:
        raise ConfigError("order is empty", expected="at least one row", fix="name the rows to compute")
    members = _members(blocks, order, rows_out, rows_in)
    column_run = _column_run(members, rows_in, dtype, tile)
    position = {row: at for at, row in enumerate(order)}
    pieces: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    columns: list[list[int]] = []
    table: list[tuple[int, ...]] = []
    for rows, channels in members:
        taken, own = _padded(channels, column_run, tile)
        piece = weight.detach()[list(rows)][:, taken] * own[:, None, None].to(weight)
        table.append((len(rows), len(taken), *(sum(map(len, parts)) for parts in (pieces, columns, biases))))
        pieces.append(piece.permute(0, 2, 3, 1).flatten().to(dtype))
        biases.append((torch.zeros(rows_out) if bias is None else bias.detach())[list(rows)].float())
        columns.append(taken)
    positions = [[position[row] for row in rows] for rows, _ in members]
    device = weight.device
    shape = BlockShape(
        in_channels=rows_in,
        out_channels=len(order),
        kernel=(weight.shape[2], weight.shape[3]),
        stride=_pair("stride", stride, 1),
        padding=_pair("padding", padding, 0),
        dilation=_pair("dilation", dilation, 1),
        blocks=len(members),
        max_rows=max(map(len, positions)),
        max_columns=max(map(len, columns)),
        column_run=column_run,
        row_run=_row_run(positions, dtype),
        step=min((*(len(taken) & -len(taken) for taken in columns if taken), MAX_STEP)),
    )
    return BlockLayout(
        shape,
        weight=torch.cat(pieces),
        bias=torch.cat(biases).to(device),
        columns=_int32([channel for taken in columns for channel in taken], device),
        positions=_int32([at for places in positions for at in places], device),
        table=_int32(table, device),
    )


def _members(
    blocks: Iterable[tuple[Sequence[int], Sequence[int]]], order: Sequence[int], rows_out: int, rows_in: int
) -> list[tuple[list[int], list[int]]]:
    """Rows in output order and ascending channels of each block that has both; the other rows last, without any."""
    position = {row: at for at, row in enumerate(order)}
    seen: set[int] = set()
    found = []
    for number, (rows, channels) in enumerate(blocks):
        _check_members(f"block {number}", rows, rows_out, "rows")
        _check_members(f"block {number}", channels, rows_in, "input channels")
        if twice := seen & set(rows):
            raise ConfigError(
                f"row {min(twice)} is in block {number} and in an earlier one",
                expected="each row in at most one block",
                fix="merge the blocks, or drop the row from one of them",
            )
        seen |= set(rows)
        wanted = sorted((row for row in rows if row in position), key=position.__getitem__)
        found.append((wanted, sorted(channels)))
    whole = [(rows, channels) for rows, channels in found if rows and channels]
    computed = {row for rows, _ in whole for row in rows}
    rest = [row for row in order if row not in computed]
    return [*whole, *([(rest, [])] if rest else [])]


def _padded(channels: Sequence[int], run: int, tile: int) -> tuple[list[int], torch.Tensor]:
    """Channels to read, in aligned runs and filled up to the tile with the first run; and bool, which are the block's.

    The others are read with zero weights.
    """
    groups = sorted({channel // run for channel in channels})
    taken = [group * run + lane for group in groups for lane in range(run)]
    missing = -len(taken) % tile
    own = torch.zeros(len(taken) + missing, dtype=torch.bool)
    own[: len(taken)] = torch.isin(torch.tensor(taken), torch.tensor(list(channels)))
    return taken + (taken[:run] * (missing // run)), own


def _column_run(members: Sequence[tuple[list[int], list[int]]], rows_in: int, dtype: torch.dtype, tile: int) -> int:
    """The longest run of channels whose extra columns cost at most an eighth more products."""

    def products(run: int) -> int:
        return sum(len(rows) * len(_padded(channels, run, tile)[0]) for rows, channels in members)

    fitting = (run for run in RUNS if run * dtype.itemsize <= RUN_BYTES and rows_in % run == 0)
    return next((run for run in fitting if 8 * products(run) <= 9 * products(1)), 1)


def _row_run(positions: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """The longest run in which every block's rows are written; it divides each block's rows, hence all."""

    def runs(places: Sequence[int], run: int) -> bool:
        starts = places[::run]
        return all(start % run == 0 for start in starts) and list(places) == [s + j for s in starts for j in range(run)]

    def holds(run: int) -> bool:
        return all(runs(places, run) for places in positions)

    return next((run for run in RUNS if run * dtype.itemsize <= RUN_BYTES and holds(run)), 1)


def _check_weight(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, tile: int) -> None:
    given: str | None = None
    if weight.dim() != 4 or not weight.numel():
        given, expected = f"the weight has shape {list(weight.shape)}", "[out, in, kernel height, kernel width]"
    elif bias is not None and bias.shape != weight.shape[:1]:
        given, expected = f"the bias has shape {list(bias.shape)}", f"[{len(weight)}], one entry a row of the weight"
    elif dtype not in DTYPES:
        given, expected = f"the number format is {dtype}", f"one of {', '.join(map(str, DTYPES))}"
    elif tile < 16 or tile & (tile - 1):
        given, expected = f"tile is {tile}", "a power of two from 16 on"
    if given is not None:
        raise ConfigError(given, expected=expected, fix="change it; a number format is chosen with dtype=")


def _check_members(where: str, members: Sequence[int], size: int, what: str) -> None:
    if len(set(members)) != len(members) or any(not 0 <= member < size for member in members):
        odd = next(m for at, m in enumerate(members) if not 0 <= m < size or m in members[:at])
        raise ConfigError(
            f"{where} names {odd} among its {what}" + (" twice" if 0 <= odd < size else ""),
            expected=f"distinct {what} from 0 to {size - 1}",
            fix="correct the list",
        )


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ConfigError(
            f"{name} is {value!r}",
            expected=f"whole numbers from {least} on, one or (height, width)",
            fix="pad the input first where the layer pads by a word or differently at its two ends",
        )
    return pair[0], pair[1]


def _int32(values: Sequence[object], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
