"""How Chase scores channels while a network trains: UMM and the released code's three alternatives.

Larger scores stay. Layers are compared without normalisation; initial weights are smaller in wide layers, so those lose
channels first (Yin et al. 2023; released code, ``--mag_wise`` and others).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from ..errors import ConfigError, nearest
from ..structure import Masks
from .coupling import ChannelPool

ChannelScore = Literal["umm", "surviving_magnitude", "connections", "kernels"]
CHANNEL_SCORES: tuple[ChannelScore, ...] = get_args(ChannelScore)
"""By name, the paper's choice first."""


def channel_score(criterion: str, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores of one layer's output channels.

    * ``"umm"``, unmasked mean magnitude: mean of ``|w|`` over all positions of the row, masked ones counting zero. So
      both many and large survivors make it large. Input channels that are gone count too.
    * ``"surviving_magnitude"`` (``--mask_wise``): mean of ``|w|`` over the survivors, 0 for a row without any.
    * ``"connections"`` (``--connection_wise``): share of positions that survive.
    * ``"kernels"`` (``--kernal_wise``): share of the row's kernels ``[kh, kw]`` with a survivor; in a Linear layer
      that is the share of connections.

    Args:
        criterion: one of these.
        weight: ``[c_out, c_in, ...]``.
        mask: same shape, True survives.

    Returns:
        float64 ``[c_out]`` on the weight's device.

    Raises:
        ConfigError: an unknown criterion.
    """
    if criterion not in CHANNEL_SCORES:
        raise ConfigError(
            f"unknown channel score {criterion!r}",
            expected=f"one of {', '.join(CHANNEL_SCORES)}",
            fix=f"{nearest(criterion, CHANNEL_SCORES)}mend the name",
        )
    alive = mask.to(weight.device)
    if criterion == "kernels":
        return alive.reshape(*alive.shape[:2], -1).any(dim=2).double().mean(dim=1)
    survivors = alive.reshape(len(alive), -1).sum(dim=1).double()  # [c_out]
    positions = alive[0].numel()
    if criterion == "connections":
        return survivors / positions
    magnitude = torch.where(alive, weight.detach().abs(), 0.0).reshape(len(alive), -1)  # [c_out, n]
    total = magnitude.sum(dim=1, dtype=torch.float64)
    return total / (positions if criterion == "umm" else survivors.clamp(min=1))


def pool_scores(pool: ChannelPool, criterion: str, weights: Mapping[str, torch.Tensor], masks: Masks) -> torch.Tensor:
    """Scores of a pool's channels: the mean over the layers that write them, as a residual stream needs it.

    A layer that writes a channel with several rows counts with their mean.

    Args:
        pool: whose channels are scored.
        criterion: as for :func:`channel_score`.
        weights: by name, on any device.
        masks: by name; of the writers.

    Returns:
        float64 ``[pool.size]`` on the CPU, where the sums have the same order each time.

    Raises:
        ConfigError: an unknown criterion.
    """
    total = torch.zeros(pool.size, dtype=torch.float64)
    for rows in pool.writers:
        channels = torch.tensor(rows.channels)  # [c_out]
        own = channels >= 0
        score = channel_score(criterion, weights[rows.name], masks[rows.name]).cpu()[own]
        summed = torch.zeros_like(total).index_add_(0, channels[own], score)
        total += summed / torch.bincount(channels[own], minlength=pool.size)
    return total / len(pool.writers)
