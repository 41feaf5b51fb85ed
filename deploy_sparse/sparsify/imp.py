"""Iterative magnitude pruning (Frankle and Carbin 2019), with rewinding: Chen et al. 2022, section 3.1, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from ..errors import ConfigError, TicketError
from ..structure import Masks


def dense_masks(model: torch.nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """All-True masks for every convolution's weight: what pruning may touch.

    The paper prunes everything but the classification head; Linear layers are therefore left out.

    Args:
        exclude: shell patterns of parameter names to leave dense, for example ``("conv1.weight",)`` for a stem.

    Raises:
        ConfigError: a pattern that matches no convolution, or nothing left to prune.
    """
    convolutions = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
    weights = {
        f"{name}.weight" if name else "weight": m.weight
        for name, m in model.named_modules()
        if isinstance(m, convolutions)
    }
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ConfigError(
                f"exclude pattern {pattern!r} matches no convolution",
                expected=f"patterns of {', '.join(list(weights)[:4])} …",
                fix="mend or drop the pattern",
            )
    chosen = {
        name: torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
        if not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise ConfigError(
            "no convolution is left to prune", expected="a network with convolutions", fix="exclude fewer layers"
        )
    return chosen


def prune_lowest(weights: Mapping[str, torch.Tensor], masks: Masks, rate: float) -> dict[str, torch.Tensor]:
    """One round of IMP: mask the ``rate`` share of surviving weights with the smallest magnitude, over all layers.

    After r rounds the density is (1 - rate)^r, to within one weight a round. Equal magnitudes go in index order.

    Args:
        weights: trained weights by name; those with a mask take part.
        masks: surviving entries before this round.
        rate: share of the survivors to prune, inside (0, 1).

    Raises:
        ConfigError: ``rate`` outside (0, 1).
        TicketError: a weight that is not finite, or a layer that would lose its last weight.
    """
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"pruning rate {rate}", expected="a number inside (0, 1)", fix="choose for example 0.2")
    magnitudes = torch.cat([weights[name].detach()[mask].abs().double() for name, mask in masks.items()])  # [survivors]
    if not bool(torch.isfinite(magnitudes).all()):
        raise TicketError(
            "trained weights hold NaN or infinite entries",
            expected="finite weights to rank",
            fix="lower the learning rate and train again",
        )
    count = round(rate * len(magnitudes))
    survives = torch.ones(len(magnitudes), dtype=torch.bool)
    survives[torch.argsort(magnitudes, stable=True)[:count]] = False
    pruned, first = {}, 0
    for name, mask in masks.items():
        alive = int(mask.sum())
        pruned[name] = mask.clone()
        pruned[name][mask] = survives[first : first + alive]
        first += alive
        if not bool(pruned[name].any()):
            raise TicketError(
                f"pruning the smallest {rate:.0%} leaves layer {name!r} without a weight",
                expected="at least one weight in every layer",
                fix="prune less: a lower rate or fewer rounds, or exclude that layer",
            )
    return pruned
