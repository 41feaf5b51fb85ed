"""Cutting a module in place: tensors lose positions, biases take up constants, layers learn their new sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import SurgeryError
from .parts import Cut, Fold


def narrow_(
    module: nn.Module, cuts: Iterable[Cut], folds: Iterable[Fold], gains: Mapping[Fold, torch.Tensor] | None = None
) -> nn.Module:
    """Cut ``module`` in place and return it; its tensors may lie on the ``meta`` device.

    Args:
        module: the dense architecture.
        cuts: the axes that lose positions.
        folds: biases that take up constants, created where they are missing.
        gains: what each bias gains, float64 ``[rows]``; without it new biases are zero (their weights come later).

    Raises:
        SurgeryError: a tensor that the module does not have, or of another size.
    """
    for entry in folds:
        _fold_(module, entry, None if gains is None else gains[entry])
    touched: dict[int, nn.Module] = {}
    depthwise = {id(part): _multiplier(part) for part in module.modules()}
    for cut in cuts:
        owner, attribute = _owner(module, cut.name)
        tensor = getattr(owner, attribute, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() <= cut.dim or tensor.shape[cut.dim] != cut.size:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "no such tensor"
            raise SurgeryError(
                f"the plan cuts {cut.name!r} along axis {cut.dim} of size {cut.size}, but the network has {found}",
                expected="the architecture the plan was made for",
                fix="pass the factory of that network",
            )
        kept = torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device)
        smaller = tensor.detach().index_select(cut.dim, kept)
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(owner, attribute, smaller)
        touched[id(owner)] = owner
    for key, part in touched.items():
        _update_sizes_(part, depthwise[key])
    return module


def _fold_(module: nn.Module, entry: Fold, gain: torch.Tensor | None) -> None:
    owner, attribute = _owner(module, entry.bias)
    weight_owner, weight_attribute = _owner(module, entry.weight)
    weight = getattr(weight_owner, weight_attribute, None)
    if not isinstance(weight, torch.Tensor) or (getattr(owner, attribute, None) is None) != entry.created:
        raise SurgeryError(
            f"the plan folds constants into {entry.bias!r}, which does not fit the network",
            expected="the architecture the plan was made for",
            fix="pass the factory of that network",
        )
    bias = getattr(owner, attribute)
    old = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
    new = old if gain is None else (old.double() + gain.to(old.device)).to(old.dtype)
    setattr(
        owner, attribute, nn.Parameter(new, requires_grad=weight.requires_grad if bias is None else bias.requires_grad)
    )


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(path), attribute
    except AttributeError:
        raise SurgeryError(
            f"the plan cuts {name!r}, but the network has no layer {path!r}",
            expected="the architecture the plan was made for",
            fix="pass the factory of that network",
        ) from None


def _multiplier(part: nn.Module) -> int:
    """Filters per channel of a depthwise convolution, 0 for any other module."""
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and part.groups == part.in_channels and part.groups > 1:
        return part.out_channels // part.in_channels
    return 0


def _update_sizes_(part: nn.Module, multiplier: int) -> None:
    match part:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if multiplier:
            part.out_channels = part.weight.shape[0]
            part.in_channels = part.groups = part.out_channels // multiplier
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
        case nn.Linear():
            part.out_features, part.in_features = part.weight.shape
        case nn.modules.batchnorm._BatchNorm():
            tensors = (part.weight, part.running_mean)
            part.num_features = next(t.shape[0] for t in tensors if t is not None)
