"""How a block convolution is laid out: nothing lost, runs found, mistakes named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.engine.blocks.layout import BlockLayout, prepare
from deploy_sparse.errors import ConfigError


def unpacked(layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weight ``[out_channels, in_channels, taps]`` and bias, read back the way the kernel reads them."""
    shape = layout.shape
    taps = shape.kernel[0] * shape.kernel[1]
    dense = torch.zeros(shape.out_channels, shape.in_channels, taps, dtype=layout.weight.dtype)
    bias = torch.full((shape.out_channels,), torch.nan)
    for rows, columns, at_weight, at_columns, at_rows in layout.table.tolist():
        block = layout.weight[at_weight : at_weight + rows * taps * columns].reshape(rows, taps, columns)
        places = layout.positions[at_rows : at_rows + rows].long()
        bias[places] = layout.bias[at_rows : at_rows + rows]
        for j, channel in enumerate(layout.columns[at_columns : at_columns + columns].tolist()):
            dense[places, channel] += block[:, :, j]
    return dense, bias


@given(
    owners=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    channels=st.sampled_from([1, 5, 8, 24, 32]),
    tile=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost(owners: list[int], channels: int, tile: int, dtype: torch.dtype, data: st.DataObject) -> None:
    rows = [[row for row, owner in enumerate(owners) if owner == number] for number in range(4)]
    taken = [sorted(data.draw(st.sets(st.integers(0, channels - 1)))) for _ in rows]
    order = data.draw(st.permutations(range(len(owners))))
    weight = torch.randn(len(owners), channels, 2, 1, generator=torch.Generator().manual_seed(len(owners))).to(dtype)
    bias = torch.arange(len(owners)).float()
    layout = prepare(weight, zip(rows, taken, strict=True), bias, order=order, tile=tile)
    mask = torch.zeros(len(owners), channels, dtype=torch.bool)
    for its_rows, its_channels in zip(rows, taken, strict=True):
        mask[torch.tensor(its_rows).long()[:, None], torch.tensor(its_channels).long()] = True
    dense, read_bias = unpacked(layout)
    assert torch.equal(dense, (weight.flatten(2) * mask[:, :, None])[list(order)])
    assert torch.equal(read_bias, bias[list(order)])
    shape = layout.shape
    widths = layout.table[:, 1]
    assert bool((widths % tile == 0).all())
    assert bool((widths % shape.step == 0).all())
    assert bool((layout.table[:, 2:4] % shape.step == 0).all())
    assert (shape.blocks, shape.max_rows, shape.max_columns) == (len(widths), layout.table[:, 0].max(), widths.max())
    for run, list_of, size in (
        (shape.column_run, layout.columns, shape.in_channels),
        (shape.row_run, layout.positions, shape.out_channels),
    ):
        runs = list_of.reshape(-1, run)
        assert size % run == 0
        assert bool((runs[:, 0] % run == 0).all())
        assert torch.equal(runs, runs[:, :1] + torch.arange(run))


def layout_of(
    blocks: list[tuple[list[int], list[int]]], *, dtype: torch.dtype = torch.float16, **options
) -> BlockLayout:
    return prepare(torch.ones(64, 64, 3, 3, dtype=dtype), blocks, **options)


def test_aligned_runs_are_found_and_small_gaps_filled() -> None:
    halves = [(list(range(32)), list(range(32))), (list(range(32, 64)), list(range(32, 64)))]
    assert (layout_of(halves).shape.column_run, layout_of(halves).shape.row_run) == (8, 8)
    assert (layout_of(halves, dtype=torch.float32).shape.column_run) == 4
    gap = [(list(range(64)), [c for c in range(32) if c != 5])]
    assert layout_of(gap).shape.column_run == 8
    assert layout_of(gap).shape.max_columns == 32
    scattered = [(list(range(64)), list(range(0, 64, 2)))]
    assert layout_of(scattered).shape.column_run == 1
    assert layout_of(scattered).shape.max_columns == 32
    interleaved = [(list(range(0, 64, 2)), [0]), (list(range(1, 64, 2)), [1])]
    assert layout_of(interleaved).shape.row_run == 1
    packed = [*range(0, 64, 2), *range(1, 64, 2)]
    assert layout_of(interleaved, order=packed).shape.row_run == 8
    assert layout_of(interleaved, order=packed[::-1]).shape.row_run == 8


def test_moving_keeps_everything() -> None:
    layout = layout_of([(list(range(64)), [1, 2])])
    moved = layout.to("meta")
    assert moved.shape == layout.shape
    assert [t.shape for t in moved.tensors] == [t.shape for t in layout.tensors]
    assert {t.device.type for t in moved.tensors} == {"meta"}


def test_output_size() -> None:
    for stride, padding, dilation in ((1, 0, 1), (2, 1, 1), ((3, 2), (0, 2), (2, 1))):
        shape = layout_of([], stride=stride, padding=padding, dilation=dilation).shape
        image = torch.zeros(1, 64, 11, 9)
        dense = torch.nn.functional.conv2d(image, torch.zeros(1, 64, 3, 3), None, stride, padding, dilation)
        assert shape.out_size(11, 9) == dense.shape[2:]
        assert shape.scalars(5, 11, 9)[:5] == [5 * dense[0, 0].numel(), 11, 9, *dense.shape[2:]]


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([([0, 1], [0]), ([1], [2])], {}, r"row 1 is in block 1 and in an earlier one(.|\n)*each row in at most one block"),
        ([([0, 64], [0])], {}, "block 0 names 64 among its rows\n  expected: distinct rows from 0 to 63"),
        ([([0], [0]), ([1], [3, 3])], {}, "block 1 names 3 among its input channels twice"),
        ([([0], [-1])], {}, "block 0 names -1 among its input channels\n"),
        ([], {"order": [5, 5]}, "order names 5 among its rows twice"),
        ([], {"order": []}, "order is empty"),
        ([], {"tile": 24}, "tile is 24\n  expected: a power of two from 16 on"),
        ([], {"tile": 8}, "tile is 8"),
        ([], {"dtype": torch.float64}, r"torch.float64\n  expected: one of torch.float16, torch.bfloat16, torch.float32"),
        ([], {"stride": 0}, "stride is 0\n  expected: whole numbers from 1 on"),
        ([], {"padding": "same"}, "padding is 'same'(.|\n)*pad the input first"),
        ([], {"dilation": (1, 1, 1)}, r"dilation is \(1, 1, 1\)"),
        ([], {"bias": torch.zeros(3)}, r"the bias has shape \[3\]\n  expected: \[64\]"),
    ],
)  # fmt: skip
def test_mistakes_are_named(blocks: list, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(blocks, **options)


def test_only_convolutions_of_images() -> None:
    with pytest.raises(ConfigError, match=r"the weight has shape \[4, 4\](.|\n)*kernel height"):
        prepare(torch.zeros(4, 4), [])
