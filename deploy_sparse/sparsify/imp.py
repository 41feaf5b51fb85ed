"""Iterative magnitude pruning (Frankle and Carbin 2019), with rewinding: Chen et al. 2022, section 3.1, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import nn

from ..errors import ConfigError
from ..structure import Masks
from .entry_scores import magnitude
from .patterns import unstructured


def dense_masks(
    model: nn.Module, *, exclude: Sequence[str] = (), linear: bool = True, head: bool = False
) -> dict[str, torch.Tensor]:
    """All-True masks for every weight that pruning may touch.

    The paper prunes everything but the classification head (section 3.1); the public code prunes convolutions only, and
    spares the stem of a ResNet. They agree on networks with one Linear, stem aside, which ``exclude`` leaves dense.

    Args:
        exclude: shell patterns of parameter names to leave dense, for example ``("conv1.weight",)`` for a stem.
        linear: the paper's rule: convolutions and Linear layers, except the head (:func:`head_of`). False:
            convolutions only, as the code has it.
        head: also the classification head; dynamic sparse training masks it too.

    Returns:
        one mask a parameter, named as :meth:`torch.nn.Module.named_parameters` does: layers that share one have one.

    Raises:
        ConfigError: a pattern that matches no such layer, or nothing left to prune.
    """
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    layers, last = _layers(model), head_of(model)

    def prunable(name: str) -> bool:
        if head and name == last:
            return True
        return name != last if linear else not isinstance(layers[name], nn.Linear)

    weights = {name: weight for name, weight in model.named_parameters() if name in layers and prunable(name)}
    what = f"convolution or {'' if head else 'hidden '}Linear" if linear else "convolution"
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ConfigError(
                f"exclude pattern {pattern!r} matches no {what}",
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
            f"no {what} is left to prune", expected=f"a network with a {what}", fix="exclude fewer layers"
        )
    return chosen


def head_of(model: nn.Module) -> str | None:
    """The name of the classification head's weight: of the last Linear in the order of the modules.

    In a network without a Linear it is the last of several convolutions; None where there is only one, or none.
    """
    layers = _layers(model)
    linear = [name for name, part in layers.items() if isinstance(part, nn.Linear)]
    if linear:
        return linear[-1]
    return list(layers)[-1] if len(layers) > 1 else None


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and Linear layers by the name of their weight, in the order of the modules."""
    layers: dict[str, nn.Module] = {}
    first: dict[torch.Tensor, str] = {}  # tensors are hashed by identity
    for path, part in model.named_modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            name = first.setdefault(part.weight, f"{path}.weight" if path else "weight")
            layers[name] = layers.pop(name, part)  # the last place in the order counts for a shared weight
    return layers


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
    alive = sum(int(mask.sum()) for mask in masks.values())
    share = Fraction(alive - round(rate * alive), sum(mask.numel() for mask in masks.values()))
    return unstructured(magnitude(weights, masks), masks, share)
