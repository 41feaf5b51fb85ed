"""Block-packed convolutions as one Triton kernel: an implicit GEMM that reads its input channels through a list.

Each block of rows reads its own input channels and nothing else; nothing is gathered into memory first, and each
output goes to its place. The forward only. Whether it is faster than a dense layer is for the caller to time:
``benchmarks/block_kernel.py`` does.

Activations are channels-last. The kernel moves 16 bytes at a time where a block's channels come in aligned runs (of 8
for 16-bit formats); single scattered channels of 16-bit formats are not even loaded ahead, so order channels by the
blocks that read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...errors import EngineError, MissingDependencyError
from .layout import BlockLayout

if TYPE_CHECKING:
    from .triton_kernel import Tile

MOST = 2**31 - 2**10  # 32-bit indices, the last tile included


def block_conv2d(
    x: torch.Tensor, layout: BlockLayout, *, relu: bool = False, tf32: bool = False, tile: Tile | None = None
) -> torch.Tensor:
    """Run the convolution, sums in float32.

    The first call with new shapes on a GPU times several tiles, so it must not be captured in a CUDA graph.

    Args:
        x: ``[batch, in_channels, height, width]`` of the layout's type and device; copied unless channels-last.
        relu: clamp the result below at zero.
        tf32: let tensor cores round float32 operands to TF32.
        tile: how programs cut the work; timed and chosen unless given.

    Returns:
        ``[batch, out_channels, out height, out width]``, channels-last, of x's type.

    Raises:
        MissingDependencyError: Triton is not installed.
        EngineError: an input that does not fit, that wants gradients, or on the CPU without Triton's interpreter.
    """
    _check_input(x, layout, tile)
    triton = triton_kernel()
    if x.device.type == "cpu" and not triton.INTERPRETED:
        raise EngineError(
            "the block kernel got a tensor on the CPU",
            expected="a tensor on an NVIDIA GPU",
            fix="move layout and input to a GPU, or set TRITON_INTERPRET=1 before Python starts: slow, for tests",
        )
    batch, _, height, width = x.shape
    shape = layout.shape
    y = x.new_empty(batch, *shape.out_size(height, width), shape.out_channels)
    if not y.numel():
        return y.permute(0, 3, 1, 2)
    constants = shape.constants(relu=relu, tf32=tf32)
    if triton.INTERPRETED:
        constants["WIDEN"] = x.dtype == torch.bfloat16
        tile = tile or triton.fitting(shape.max_rows, shape.step, x.element_size())[0]  # nothing to time
    numbers = shape.scalars(batch, height, width)
    arguments = (x.permute(0, 2, 3, 1).contiguous(), *layout.tensors, *numbers, y)

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (-(-numbers[0] // chosen["BLOCK_M"]) * shape.row_tiles(chosen["BLOCK_N"]),)

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if tile is None:
            triton.tuned_kernel[grid](*arguments, **constants)
        else:
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            triton.block_conv2d_kernel[grid](*arguments, **constants, **tile.blocks(), **options)
    return y.permute(0, 3, 1, 2)


def triton_kernel() -> Any:
    """The module with the kernel, :mod:`.triton_kernel`.

    Raises:
        MissingDependencyError: Triton is not installed, or does not load.
    """
    try:
        from . import triton_kernel as module
    except ImportError as problem:
        raise MissingDependencyError(
            f"triton is not there ({problem})",
            expected="Triton, which comes with PyTorch for Linux",
            fix="pip install triton, or run the layer in its native form: gathered and grouped convolutions",
        ) from problem
    return module


def _check_input(x: torch.Tensor, layout: BlockLayout, tile: Tile | None) -> None:
    shape = layout.shape
    given: str | None = None
    if x.dim() != 4 or x.shape[1] != shape.in_channels:
        given, expected = f"the input has shape {list(x.shape)}", f"[batch, {shape.in_channels}, height, width]"
    elif min(shape.out_size(*x.shape[2:])) < 1:
        given = f"the input is {x.shape[2]} × {x.shape[3]}"
        expected = f"at least the extent of the {shape.kernel[0]} × {shape.kernel[1]} kernel, padding included"
    elif max(x[:1].numel(), shape.scalars(x.shape[0], *x.shape[2:])[0]) >= MOST:
        given, expected = f"the input has shape {list(x.shape)}", f"under {MOST} numbers an image and output pixels"
    elif (x.dtype, x.device) != (layout.weight.dtype, layout.weight.device):
        given = f"the input is {x.dtype} on {x.device}"
        expected = f"{layout.weight.dtype} on {layout.weight.device}, like the layout"
    elif torch.is_grad_enabled() and x.requires_grad:
        given, expected = "the input wants gradients", "inference: the kernel has no backward"
    elif tile is not None and shape.step % tile.columns:
        given, expected = f"the tile takes {tile.columns} columns", f"a divisor of the layout's step, {shape.step}"
    if given is not None:
        raise EngineError(
            given, expected=expected, fix="change what is given; inference runs in torch.inference_mode()"
        )
