"""Block convolutions to try, as JSON values; what they should give, and how far from it arithmetic may stray.

Run as a program, with TRITON_INTERPRET=1, it says whether Triton is loaded already and answers one case a line: Triton
decides when it is imported whether it interprets, so that other tests in the same process would feel it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import conv2d

from deploy_sparse.engine.blocks.kernel import block_conv2d
from deploy_sparse.engine.blocks.layout import BlockLayout, prepare


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    rows: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    blocks: list[tuple[list[int], list[int]]]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "float32"
    bias: bool = True
    relu: bool = False
    tf32: bool = False
    channels_last: bool = True
    nan: bool = False  # one input is not a number; every block must read it, as the dense layer does
    order: list[int] | None = None
    column_tile: int = 16
    tile: tuple[int, ...] | None = None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Input and weight in the case's format, bias in float32; the same each time."""
        generator = torch.Generator().manual_seed(self.rows * 100 + self.channels)
        dtype = getattr(torch, self.dtype)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator).to(dtype)
        weight = torch.randn(self.rows, self.channels, *self.kernel, generator=generator).to(dtype)
        bias = torch.randn(self.rows, generator=generator) if self.bias else None
        if self.nan:
            x[0, self.blocks[0][1][0], 0, 0] = torch.nan
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x, weight, bias

    def layout(self) -> BlockLayout:
        _, weight, bias = self.tensors()
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return prepare(weight, self.blocks, bias, order=self.order, tile=self.column_tile, **geometry)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64: the masked dense convolution, and the error that the formats allow at each output."""
        x, weight, bias = self.tensors()
        mask = torch.zeros(weight.shape[:2], dtype=torch.float64)
        for rows, channels in self.blocks:
            mask[torch.tensor(rows, dtype=torch.int64)[:, None], torch.tensor(channels, dtype=torch.int64)] = 1
        masked = weight.double() * mask[:, :, None, None]
        bias = torch.zeros(self.rows) if bias is None else bias
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        exact = conv2d(x.double(), masked, bias.double(), **geometry)
        size = conv2d(x.double().abs(), masked.abs(), bias.double().abs(), **geometry)
        terms = 1 + self.kernel[0] * self.kernel[1] * max((len(c) for _, c in self.blocks), default=0)
        sums = 2**-24 if self.dtype == "float32" else 2**-22  # tensor cores truncate what they add
        summed = size * (terms * sums + (2 * 2**-10 if self.tf32 else 0))  # TF32 keeps 10 bits of each operand
        info = torch.finfo(x.dtype)
        stored = (
            0.0 if self.dtype == "float32" else info.eps
        )  # the interpreter truncates to bfloat16, hence not eps / 2
        allowed = 1.01 * summed + stored * (exact.abs() + summed) + info.smallest_normal * info.eps
        exact = exact.relu() if self.relu else exact
        order = torch.tensor(range(self.rows) if self.order is None else self.order)
        return exact[:, order], allowed[:, order]


def try_case(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Worst error over the allowed one, and what came out besides."""
    from deploy_sparse.engine.blocks.triton_kernel import Tile

    x, layout = case.tensors()[0], case.layout()
    tile = None if case.tile is None else Tile(*case.tile)
    y = block_conv2d(x.to(device), layout.to(device), relu=case.relu, tf32=case.tf32, tile=tile).cpu()
    exact, allowed = case.expected()
    known = ~exact.isnan()
    return {
        "worst": float(((y.double() - exact).abs() / allowed)[known].max()) if y.numel() else 0.0,
        "finite": bool(y[known].isfinite().all() and y[~known].isnan().all()),
        "shape": list(y.shape) if y.shape == exact.shape and y.dtype == x.dtype else None,
        "channels_last": y.is_contiguous(memory_format=torch.channels_last),
    }


def case_of(values: dict[str, Any]) -> Case:
    return Case(**{name: tuple(v) if isinstance(v, list) and name != "blocks" else v for name, v in values.items()})


def main() -> None:
    print(json.dumps("triton" in sys.modules), flush=True)
    for line in sys.stdin:
        try:
            answer = try_case(case_of(json.loads(line)))
        except Exception as problem:
            answer = {"problem": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
