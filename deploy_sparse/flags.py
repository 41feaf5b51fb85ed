"""Which entries of a tensor are not zero, and where any is: byte by byte, without ``!=`` and ``any``."""

from __future__ import annotations

import torch

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def nonzero(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor != 0``: bool, of the same shape."""
    return tensor.bool()


def any_along(flags: torch.Tensor, *dims: int) -> torch.Tensor:
    """``flags.any(dim=dims)``: whether any entry is True, along ``dims`` or, without, at all.

    Args:
        flags: bool.
    """
    if flags.numel() == 0:
        return flags.any(dim=dims) if dims else flags.any()
    return flags.view(torch.uint8).amax(dim=dims).bool()


def all_along(flags: torch.Tensor, dim: int) -> torch.Tensor:
    """``flags.all(dim=dim)`` of bool flags."""
    return flags.view(torch.uint8).amin(dim=dim).bool() if flags.numel() else flags.all(dim=dim)


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``weight`` with +0 where ``mask``, bool of its shape, is False; in memory laid out like ``weight``."""
    if not weight.is_floating_point() or mask.stride() != weight.stride():
        return torch.where(mask, weight, weight.new_zeros(()), out=torch.empty_like(weight))
    bits = _BITS[weight.element_size()]
    return mask.to(bits).mul_(weight.view(bits)).view(weight.dtype)
