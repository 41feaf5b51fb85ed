"""How channels are scored. A score is a float64 vector, one entry per output channel; larger is kept first."""

from __future__ import annotations

import torch


def channel_l1(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ℓ1 norm of the surviving weights of each output channel (Chen et al. 2022, section 3.2).

    Args:
        weight: ``[c_out, ...]``.
        mask: same shape, True survives.

    Returns:
        ``[c_out]`` float64.
    """
    survivors = weight.detach().double() * mask
    return survivors.abs().reshape(len(weight), -1).sum(dim=1)  # [c_out, n] -> [c_out]


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean ``[c_out]``: the ``count`` largest scores; equal scores go to the lower index."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return kept
