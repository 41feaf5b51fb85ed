"""Refill: an unstructured ticket becomes a channel-wise one (Chen et al. 2022, section 3.2 and Algorithm 2).

The kept channels are filled up whole, the others vanish. A pure function of the round's masks and trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ..errors import ConfigError, TicketError
from ..structure import ChannelGroup, Masks, Producer, Slice
from .scores import channel_l1, top

Coupling = Literal["layer", "group"]


def refill(
    masks: Masks,
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[ChannelGroup],
    *,
    coupling: Coupling = "layer",
    multiple: int = 1,
) -> dict[str, torch.Tensor]:
    """Channel-wise masks at the density of the given ones.

    A layer of c_out channels with n weights each and N survivors keeps max(1, ⌈N / n⌉) channels: those with the
    largest ℓ1 norm of surviving weights, ties by index. The masks are *silent*: with a channel's row go its bias and
    the scale and shift of its norm, and, once every layer writing the channel dropped it, the columns that read it. So
    the channel is zero everywhere and can be cut out without changing the function.

    Args:
        masks: an IMP round's masks; only layers with a mask lose channels.
        weights: the same round's trained weights.
        groups: the network's channel groups.
        coupling: ``"layer"``, the paper's rule: each layer chooses its own channels, so a residual stream keeps the
            union of what its layers keep. ``"group"``: layers that write one residual stream choose together, by the
            sum of their scores and at their common density, so that the stream itself gets narrower.
        multiple: round the number of kept channels up to this multiple (never above c_out); 1 is the paper's rule.

    Returns:
        masks by parameter name for weights, biases and norms. Every row is empty, or whole but for the input channels
        that their producers let go.

    Raises:
        TicketError: a mask that belongs to no producer of any group.
        ConfigError: ``multiple`` below 1.
    """
    if multiple < 1:
        raise ConfigError(f"multiple {multiple}", expected="1 or more", fix="use 1 for the paper's rule")
    _refuse_unknown(masks, groups)
    result = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in masks}
    for group in groups:
        if group.pinned is not None:
            continue
        kept = [_kept_channels(p, group, masks, weights, multiple) for p in group.producers]
        if coupling == "group":
            kept = [_kept_together(group, masks, weights, multiple)] * len(kept)
        for producer, channels in zip(group.producers, kept, strict=True):
            for part in (producer.weight, producer.bias, *producer.norms):
                _drop_(result, weights, part, ~channels)
        dead = ~torch.stack(kept).any(dim=0)  # [size]: every producer let it go
        for part in (*group.shared, *group.consumers):
            _drop_(result, weights, part, dead)
    return result


def _kept_channels(
    producer: Producer, group: ChannelGroup, masks: Masks, weights: Mapping[str, torch.Tensor], multiple: int
) -> torch.Tensor:
    name = producer.weight.name
    if name not in masks:
        return torch.ones(group.size, dtype=torch.bool)
    mask = masks[name]
    survivors, per_channel = int(mask.sum()), mask[0].numel()
    scores = _by_channel(channel_l1(weights[name], mask), producer.weight, group.size)
    return top(scores, _budget(survivors, per_channel, group.size, multiple))


def _kept_together(
    group: ChannelGroup, masks: Masks, weights: Mapping[str, torch.Tensor], multiple: int
) -> torch.Tensor:
    if any(p.weight.name not in masks for p in group.producers):
        return torch.ones(group.size, dtype=torch.bool)  # a layer that must stay dense keeps the whole stream
    scores = torch.zeros(group.size, dtype=torch.float64)
    survivors = per_channel = 0
    for producer in group.producers:
        mask = masks[producer.weight.name]
        scores += _by_channel(channel_l1(weights[producer.weight.name], mask), producer.weight, group.size)
        survivors, per_channel = survivors + int(mask.sum()), per_channel + mask[0].numel()
    return top(scores, _budget(survivors, per_channel, group.size, multiple))


def _budget(survivors: int, per_channel: int, size: int, multiple: int) -> int:
    channels = max(1, -(-survivors // per_channel))  # max(1, ⌈density · c_out⌉) without rounding errors
    return min(size, -(-channels // multiple) * multiple)


def _by_channel(scores: torch.Tensor, rows: Slice, size: int) -> torch.Tensor:
    """Scores by row ``[c_out]`` as scores by the group's channel ``[size]``."""
    channels = torch.tensor(rows.channels)
    own = channels >= 0
    return torch.zeros(size, dtype=scores.dtype).index_add_(0, channels[own], scores[own])


def _drop_(
    result: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], part: Slice | None, dropped: torch.Tensor
) -> None:
    if part is None or not bool(dropped.any()):
        return
    mask = result.setdefault(part.name, torch.ones_like(weights[part.name], dtype=torch.bool))
    channels = torch.tensor(part.channels)  # [positions along dim]
    positions = ((channels >= 0) & dropped[channels.clamp(min=0)]).nonzero().flatten()
    mask.index_fill_(part.dim, positions, False)


def _refuse_unknown(masks: Masks, groups: Sequence[ChannelGroup]) -> None:
    produced = {producer.weight.name for group in groups for producer in group.producers}
    for name in masks:
        if name not in produced:
            raise TicketError(
                f"mask {name!r} belongs to no layer that writes channels of the traced network",
                expected=f"masks of {', '.join(sorted(produced)[:4])} …",
                fix="use masks and channel groups of the same network",
            )
