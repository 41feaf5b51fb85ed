"""The Triton kernel behind :mod:`.kernel` and :mod:`.plugin`: the only module that imports Triton, and only when asked.

Importing this module imports Triton. ``TRITON_INTERPRET=1`` in the environment before that makes the kernel run on the
CPU, in Triton's interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...errors import EngineError

INTERPRETED: bool = triton.knobs.runtime.interpret
INPUTS = ("x", "weight", "bias", "columns", "positions", "table")
SCALARS = (
    *("pixels", "height", "width", "out_height", "out_width", "in_channels", "out_channels"),
    *("blocks", "max_rows", "max_columns"),
)


@triton.jit(do_not_specialize=list(SCALARS))  # type: ignore[untyped-decorator]
def block_conv2d_kernel(  # type: ignore[no-untyped-def]
    x,  # [batch, height, width, in_channels]
    weight,  # per block [rows, taps, columns], one block after another
    bias,  # float32 [rows of all blocks]
    columns,  # int32 [columns of all blocks]: input channels
    positions,  # int32 [rows of all blocks]: output channels
    table,  # int32 [blocks, 5]: rows, columns, and where weight, columns and rows of the block begin
    pixels,  # batch · out_height · out_width
    height,
    width,
    out_height,
    out_width,
    in_channels,
    out_channels,
    blocks,
    max_rows,  # of a block
    max_columns,  # of a block; only tells layers apart when tiles are timed
    y,  # [batch, out_height, out_width, out_channels]
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    COLUMN_RUN: tl.constexpr,  # columns come in aligned runs of this many channels, and divides in_channels
    ROW_RUN: tl.constexpr,  # rows go to aligned runs of this many channels, and divides out_channels
    STEP: tl.constexpr,  # divides every block's columns
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to float32 first: the interpreter cannot multiply bfloat16
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # rows
    BLOCK_K: tl.constexpr,  # columns, all of one tap; divides STEP
):
    """One program computes one tile of output pixels for one tile of a block's rows.

    Tiles of rows vary fastest, so that the programs that run together read the same pixels.
    """
    tl.static_assert(STEP % BLOCK_K == 0)
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    row_tiles = (max_rows + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (blocks * row_tiles)
    pixel_tile = tl.program_id(0) // (blocks * row_tiles)
    entry = table + (tile // row_tiles) * 5
    rows = tl.multiple_of(tl.load(entry), ROW_RUN)
    first = (tile % row_tiles) * BLOCK_N
    if first >= rows:  # a smaller block than the largest
        return
    taken = tl.multiple_of(tl.load(entry + 1), STEP)
    weight += tl.multiple_of(tl.load(entry + 2), STEP)
    columns += tl.multiple_of(tl.load(entry + 3), STEP)
    row_start = tl.load(entry + 4)
    in_channels = in_channels // COLUMN_RUN * COLUMN_RUN  # no change; tells the compiler what divides it
    out_channels = out_channels // ROW_RUN * ROW_RUN

    m = pixel_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    out_w = m % out_width
    out_h = (m // out_width) % out_height
    image = m // (out_width * out_height)
    top = out_h * STRIDE_H - PADDING_H
    left = out_w * STRIDE_W - PADDING_W
    # Only the start of an image needs 64 bits; within one, 32 do.
    corner = x + image.to(tl.int64) * (height * width * in_channels) + (top * width + left) * in_channels

    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    wanted = n < rows
    filters = weight + k[:, None] + n[None, :] * (TAPS * taken)
    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for step in range(0, (taken // BLOCK_K) * TAPS):  # the taps of one run of columns share cache lines
        tap = step % TAPS
        start = (step // TAPS) * BLOCK_K
        down = (tap // KERNEL_W) * DILATION_H
        right = (tap % KERNEL_W) * DILATION_W
        channel = tl.load(columns + start + k)
        channel = tl.max_contiguous(tl.multiple_of(channel, COLUMN_RUN), COLUMN_RUN)
        rows_inside = (top + down >= 0) & (top + down < height)
        seen = inside & rows_inside & (left + right >= 0) & (left + right < width)
        patch = corner + (down * width + right) * in_channels
        a = tl.load(patch[:, None] + channel[None, :], mask=seen[:, None], other=0.0)
        b = tl.load(filters + (tap * taken + start), mask=wanted[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    total += tl.load(bias + row_start + n, mask=wanted, other=0.0)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # unlike a maximum, lets NaN through
    channel = tl.load(positions + row_start + n, mask=wanted, other=0)
    channel = tl.max_contiguous(tl.multiple_of(channel, ROW_RUN), ROW_RUN)
    target = y + m.to(tl.int64)[:, None] * out_channels + channel[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@dataclass(frozen=True)
class Tile:
    """How a program cuts its work: pixels, rows and columns at a time, warps, and stages of the load pipeline.

    The channel list is itself loaded, so two stages buy one more pair of operand tiles in flight.
    """

    pixels: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 5

    def blocks(self) -> dict[str, int]:
        """The kernel's arguments."""
        return {"BLOCK_M": self.pixels, "BLOCK_N": self.rows, "BLOCK_K": self.columns}

    def shared_bytes(self, element_bytes: int) -> int:
        """Shared memory of the operand tiles in flight on Hopper, where it is largest; Ada needs one pair fewer."""
        return (self.pixels + self.rows) * self.columns * element_bytes * ((self.stages + 1) // 2)


# From small to large; the first fits every layout.
TILES = (
    Tile(64, 16, 16),
    Tile(64, 32, 16),
    Tile(128, 64, 16),
    Tile(128, 16, 32),
    Tile(64, 32, 32),
    Tile(128, 32, 32),
    Tile(64, 64, 32),
    Tile(128, 64, 32),
    Tile(128, 128, 32, warps=8),
    Tile(128, 32, 64),
    Tile(64, 64, 64),
    Tile(128, 64, 64, stages=3),
    Tile(128, 64, 64),
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=8),
)
LINE_BYTES = 128  # what one row of an operand tile fills at most: a cache line, and the widest swizzle


def fitting(max_rows: int, step: int, element_bytes: int) -> tuple[Tile, ...]:
    """The tiles worth timing: rows no wider than need be and columns that divide.

    Args:
        max_rows: rows of the largest block.
        step: divides the columns of every block; a multiple of 16.
        element_bytes: of an activation.
    """
    widest = max(16, 1 << (max_rows - 1).bit_length())
    return tuple(
        tile
        for tile in TILES
        if tile.rows <= widest and step % tile.columns == 0 and tile.columns * element_bytes <= LINE_BYTES
    )


def _config(tile: Tile) -> Any:
    return triton.Config(tile.blocks(), num_warps=tile.warps, num_stages=tile.stages)


def _worth_timing(configs: list[Any], named: Mapping[str, Any], **constants: Any) -> list[Any]:
    tiles = fitting(named["max_rows"], constants["STEP"], named["x"].element_size())
    return [config for config, tile in zip(configs, TILES, strict=True) if tile in tiles]


KEY = (  # what the best tile depends on, and with STEP and max_rows which tiles are right at all
    *(*SCALARS, "STEP", "COLUMN_RUN", "PRECISION"),
    *("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W"),
)
tuned_kernel = triton.autotune(
    [_config(tile) for tile in TILES], key=list(KEY), prune_configs_by={"early_config_prune": _worth_timing}
)(block_conv2d_kernel)


@dataclass(frozen=True)
class Ptx:
    """The kernel compiled for one GPU generation.

    Attributes:
        name: of the entry point; it takes ``INPUTS``, ``SCALARS`` as 32-bit integers, and the output, in this order.
        text: PTX.
        threads: of one program.
        shared_bytes: dynamic shared memory of one program.
    """

    name: str
    text: str
    threads: int
    shared_bytes: int


@cache
def compile_ptx(constants: tuple[tuple[str, Any], ...], element: str, tile: Tile, capability: int) -> Ptx:
    """Compile the kernel without a GPU.

    Args:
        constants: its compile-time arguments, those of the tile excepted, as pairs.
        element: Triton's name of the number format: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        tile: how programs cut the work.
        capability: compute capability, for example 90.
    """
    if INTERPRETED:
        raise EngineError(
            "TRITON_INTERPRET is set", expected="Triton's compiler", fix="unset it and start Python again"
        )
    fixed = {**dict(constants), **tile.blocks()}
    formats = (element, element, "fp32", "i32", "i32", "i32")
    pointers = {name: f"*{kind}" for name, kind in zip(INPUTS, formats, strict=True)}
    signature = {**pointers, **dict.fromkeys(SCALARS, "i32"), "y": f"*{element}", **dict.fromkeys(fixed, "constexpr")}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] == "*"}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it would hold this machine's paths
        compiled = triton.compile(
            ASTSource(block_conv2d_kernel, signature, fixed, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
    about = compiled.metadata
    text = without_parameters_after(compiled.asm["ptx"], len(INPUTS) + len(SCALARS) + 1)
    return Ptx(about.name, text, about.num_warps * 32, about.shared)


def without_parameters_after(ptx: str, count: int) -> str:
    """The PTX with only the first ``count`` parameters of its entry point.

    Triton appends pointers to scratch memory, which this kernel leaves alone; who launches it by hand has none to pass.

    Raises:
        EngineError: a parameter after those is used.
    """
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    parameters = entry[1].split(",") if entry else []
    names = [parameter.split()[-1] for parameter in parameters[count:]]
    if entry is None or len(parameters) < count or any(ptx.count(f"[{name}") for name in names):
        raise EngineError(
            f"Triton {triton.__version__} compiled the kernel to an entry point of {len(parameters)} parameters",
            expected=f"{count} of them, any others unused",
            fix="run the layer in its native form, or take the Triton that comes with a supported PyTorch",
        )
    return ptx[: entry.start(1)] + ",".join(parameters[:count]) + ptx[entry.end(1) :]
