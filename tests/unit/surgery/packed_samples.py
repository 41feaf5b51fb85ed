"""Random packings and layers to pack."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.structure import Block
from deploy_sparse.surgery.packed import Packing


def block(rows: Sequence[int], reads: Sequence[int], taps: int) -> Block:
    """A block of rows and whole input channels."""
    columns = [channel * taps + tap for channel in sorted(reads) for tap in range(taps)]
    return Block(tuple(sorted(rows)), tuple(columns))


def packing(out, channels, kernel, form, blocks, **options) -> Packing:
    """A packing of ``(rows, input channels)`` pairs."""
    taps = kernel[0] * kernel[1] if kernel else 1
    return Packing(out, channels, kernel, form, tuple(block(*pair, taps) for pair in blocks), **options)


@st.composite
def packings(draw, *, linear=False, forms=("disjoint", "equal", "free", "positions"), orders=False) -> Packing:
    """Any packing of a small weight; ``orders``: a disjoint one without spare channels, with either order left open."""
    numbers = random.Random(draw(st.integers(0, 2**32)))
    form = draw(st.sampled_from([form for form in forms if not (linear and form == "positions")]))
    kernel = () if linear else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    taps = kernel[0] * kernel[1] if kernel else 1
    count, tile = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    spare_rows, spare_channels = (0, 0) if orders else (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    if form == "equal":  # sizes that agree once padded
        tall, wide = (tile * draw(st.integers(1, 2)) for _ in range(2))
        sizes = [(numbers.randint(tall - tile + 1, tall), numbers.randint(wide - tile + 1, wide)) for _ in range(count)]
    elif form == "disjoint":
        sizes = [(draw(st.integers(1, 4)), draw(st.integers(1, 4)))] * count
    else:
        sizes = [(numbers.randint(1, 5), numbers.randint(1, 5)) for _ in range(count)]
    out = max(sum(rows for rows, _ in sizes) + spare_rows, tall if form == "equal" else 1)
    if form == "disjoint":
        channels = sum(reads for _, reads in sizes) + spare_channels
    else:
        channels = max(reads for _, reads in sizes) + spare_channels + (tile if form == "equal" else 0)
    rows, columns = numbers.sample(range(out), out), numbers.sample(range(channels), channels)
    blocks = []
    for tall, wide in sizes:
        mine, rows = rows[:tall], rows[tall:]
        if form == "positions":
            chosen = numbers.sample(range(channels * taps), min(wide * taps, numbers.randint(1, channels * taps)))
            blocks.append(Block(tuple(sorted(mine)), tuple(sorted(chosen))))
            continue
        if form == "disjoint":
            reads, columns = columns[:wide], columns[wide:]
        else:
            reads = numbers.sample(range(channels), wide)
        blocks.append(block(mine, reads, taps))
    gather, restore = (draw(st.booleans()), draw(st.booleans())) if orders else (True, True)
    return Packing(out, channels, kernel, form, tuple(blocks), tile, gather, restore)


def mask_of(packing: Packing) -> torch.Tensor:
    """Bool, shaped like the dense weight."""
    mask = torch.zeros(packing.out_channels, packing.in_channels * packing.taps, dtype=torch.bool)
    for each in packing.blocks:
        mask[torch.tensor(each.rows).unsqueeze(1), torch.tensor(each.columns)] = True
    return mask.view(packing.out_channels, packing.in_channels, *packing.kernel)


def dense_conv(packing: Packing, *, dtype=torch.float64, seed=0, **options) -> nn.Conv2d:
    """A convolution with weights everywhere."""
    torch.manual_seed(seed)
    return nn.Conv2d(packing.in_channels, packing.out_channels, packing.kernel, dtype=dtype, **options)


def dense_linear(packing: Packing, *, dtype=torch.float64, seed=0, **options) -> nn.Linear:
    """A linear layer with weights everywhere."""
    torch.manual_seed(seed)
    return nn.Linear(packing.in_channels, packing.out_channels, dtype=dtype, **options)


def masked_(layer: nn.Module, packing: Packing) -> nn.Module:
    """The layer without the weights outside of the blocks."""
    with torch.no_grad():
        layer.weight.mul_(mask_of(packing))
    return layer


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
