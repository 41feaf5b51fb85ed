"""What structure a network and its masks have. Values and pure functions; nothing here trains or cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Masks = Mapping[str, torch.Tensor]
"""Boolean tensors by parameter name, each shaped like its parameter; True means the entry survives.
A parameter without a mask survives whole."""


@dataclass(frozen=True)
class Slice:
    """Where one channel group lies along one dimension of one tensor of the state dict.

    ``channels[j]`` is the group's channel at position j of dimension ``dim``, or -1 where the position belongs to
    another group. A flattened feature map repeats each channel height × width times.
    """

    name: str
    dim: int
    channels: tuple[int, ...]

    def positions(self, chosen: torch.Tensor) -> torch.Tensor:
        """Int64, on the CPU: positions along ``dim`` of the channels for which ``chosen``, bool ``[size]``, is True."""
        channels = torch.tensor(self.channels)  # [positions along dim]
        return ((channels >= 0) & chosen.cpu()[channels.clamp(min=0)]).nonzero().flatten()


@dataclass(frozen=True)
class Producer:
    """One layer that writes the group's channels: the rows of its weight, its bias, and the norms only it feeds."""

    weight: Slice
    bias: Slice | None = None
    norms: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that exist only together: one axis shared by producers, per-channel parameters and consumers.

    Attributes:
        name: the first producer's weight, for messages.
        size: number of channels.
        producers: who writes the channels; more than one where a residual sum couples them.
        shared: per-channel parameters that belong to no single producer (a norm after the sum, depthwise filters).
        statistics: per-channel buffers (running mean and variance).
        consumers: who reads the channels: weight columns.
        pinned: why the channels must stay, or None when they may be removed.
    """

    name: str
    size: int
    producers: tuple[Producer, ...]
    shared: tuple[Slice, ...] = ()
    statistics: tuple[Slice, ...] = ()
    consumers: tuple[Slice, ...] = ()
    pinned: str | None = None

    def slices(self) -> tuple[Slice, ...]:
        """Every slice of the group."""
        own = [s for p in self.producers for s in (p.weight, p.bias, *p.norms) if s is not None]
        return (*own, *self.shared, *self.statistics, *self.consumers)


@dataclass(frozen=True)
class Dense:
    """Every entry survives."""


@dataclass(frozen=True)
class Channels:
    """Whole output channels survive or vanish; ``kept`` are the surviving row indices, ascending."""

    kept: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Rows that survive in exactly the same columns, so that they run as one small dense layer.

    Attributes:
        rows: output channels, ascending.
        columns: positions in the flattened weight row ``[c_in · kh · kw]``, ascending.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """The mask is a union of blocks; each row is in one of them or vanished. Ordered by the blocks' first rows."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Unstructured:
    """Some row is partly filled and shares its columns with too few others; ``density`` is the surviving share."""

    density: float


Structure = Dense | Channels | Blocks | Unstructured

MIN_BLOCK_ROWS = 8
"""Fewer rows with the same columns than this are no block, unless the layer has no other surviving row."""

MIN_BLOCK_READS = 4
"""Blocks of a layer that reads fewer input channels than this save nothing once padded."""


def structure_of(mask: torch.Tensor) -> Structure:
    """The structure of one mask of shape ``[c_out, ...]``, seen along its output channels.

    Input channels that no surviving output channel uses (their producer let them go) do not make rows partly filled.
    """
    if bool(mask.all()):
        return Dense()
    cells = mask.reshape(*mask.shape[:2], -1) if mask.dim() > 1 else mask[:, None, None]  # [c_out, c_in, taps]
    kept, used = cells.any(dim=(1, 2)), cells.any(dim=(0, 2))  # [c_out], [c_in]
    if bool(used.any()) and bool(cells[kept][:, used].all()):
        return Channels(tuple(kept.nonzero().flatten().tolist()))
    if (blocks := row_blocks(mask)) is not None:
        return Blocks(blocks)
    return Unstructured(float(mask.float().mean()))


def row_blocks(mask: torch.Tensor) -> tuple[Block, ...] | None:
    """The blocks of a mask ``[c_out, ...]``: its surviving rows grouped by equal columns, by first row.

    None when nothing survives, or some group has fewer than ``MIN_BLOCK_ROWS`` rows and is not all that survives.
    """
    cells = mask.reshape(len(mask), -1).cpu()  # [c_out, n]
    alike: dict[bytes, list[int]] = {}
    for row in cells.any(dim=1).nonzero().flatten().tolist():
        alike.setdefault(cells[row].numpy().tobytes(), []).append(row)
    if not alike or (len(alike) > 1 and min(map(len, alike.values())) < MIN_BLOCK_ROWS):
        return None
    return tuple(Block(tuple(rows), tuple(cells[rows[0]].nonzero().flatten().tolist())) for rows in alike.values())


def unused_inputs(mask: torch.Tensor) -> int:
    """Input channels of a weight mask ``[c_out, c_in, ...]`` in which no entry survives."""
    return int((~mask.reshape(*mask.shape[:2], -1).any(dim=2).any(dim=0)).sum())


def row_density(masks: Masks) -> float:
    """Share of weights whose output channel survives, the papers' "remaining weights" of a channel-wise ticket."""
    weights = [m.reshape(len(m), -1) for m in masks.values() if m.dim() > 1]
    total = sum(m.numel() for m in weights)
    return sum(int(m.any(dim=1).sum()) * m.shape[1] for m in weights) / total if total else 1.0


def density(masks: Masks) -> float:
    """Surviving share over all masked weights of two or more dimensions; 1.0 when there are none."""
    weights = [m for m in masks.values() if m.dim() > 1]
    total = sum(m.numel() for m in weights)
    return sum(int(m.sum()) for m in weights) / total if total else 1.0
