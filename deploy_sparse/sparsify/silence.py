"""Silence: what belongs to a dropped channel is masked with it, so that removing the channel changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..structure import ChannelGroup, Masks, Slice


def silence(
    masks: Masks, weights: Mapping[str, torch.Tensor], groups: Sequence[ChannelGroup]
) -> dict[str, torch.Tensor]:
    """The masks, with everything masked that an empty row of a weight leaves without a purpose.

    A layer drops a channel when all its rows for it are empty. With it go its bias and the scale and shift of the
    norms that only this layer feeds. Once every layer that writes the channel dropped it, the parameters the channel
    shares (a norm behind a sum, depthwise filters) and the weight columns that read it go too: the channel is zero
    everywhere. Rows that lose their last weight by that are dropped in turn. Channels of pinned groups cannot be
    removed, so nothing is silenced there.

    Args:
        masks: by parameter name; a weight without a mask is dense.
        weights: the tensors the groups name; only their shapes and devices matter.
        groups: the network's channel groups.

    Returns:
        new masks: those given, and those of biases, norms and readers that lost entries.
    """
    result = {name: mask.clone() for name, mask in masks.items()}
    free = [group for group in groups if group.pinned is None]
    while True:
        before = sum(int(mask.sum()) - mask.numel() for mask in result.values())
        for group in free:
            _silence_group_(result, weights, group)
        if before == sum(int(mask.sum()) - mask.numel() for mask in result.values()):
            return result


def _silence_group_(result: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], group: ChannelGroup) -> None:
    everywhere = torch.ones(group.size, dtype=torch.bool)
    for producer in group.producers:
        dropped = ~_written(result, producer.weight, group.size)
        everywhere &= dropped
        for part in (producer.bias, *producer.norms):
            if part is not None:
                _drop_(result, weights, part, dropped)
    for part in (*group.shared, *group.consumers):
        _drop_(result, weights, part, everywhere)


def _written(masks: Masks, rows: Slice, size: int) -> torch.Tensor:
    """Which of the group's channels some row of a layer still writes, bool ``[size]``."""
    channels = torch.tensor(rows.channels)  # [c_out]
    mask = masks.get(rows.name)
    alive = (
        mask.movedim(rows.dim, 0).reshape(mask.shape[rows.dim], -1).any(dim=1).cpu()
        if mask is not None
        else torch.ones(len(channels), dtype=torch.bool)
    )
    found = torch.zeros(size, dtype=torch.bool)
    found[channels[alive & (channels >= 0)]] = True
    return found


def _drop_(
    result: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], part: Slice, dropped: torch.Tensor
) -> None:
    positions = part.positions(dropped)
    if len(positions):
        mask = result.setdefault(part.name, torch.ones_like(weights[part.name], dtype=torch.bool))
        mask.index_fill_(part.dim, positions.to(mask.device), False)
