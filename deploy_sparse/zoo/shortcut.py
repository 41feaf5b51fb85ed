"""Shortcuts of residual blocks that change the shape: options A and B of He et al. 2016, section 3.3."""

from __future__ import annotations

import torch
from torch import nn


def make_shortcut(kind: str, c_in: int, c_out: int, stride: int) -> nn.Module:
    """From ``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``; the identity where those are equal.

    Args:
        kind: ``"conv"``, a 1×1 convolution with BatchNorm (option B), or ``"pad"``, no parameters (option A).
        c_in: channels read.
        c_out: channels written.
        stride: how much smaller the result is.

    Raises:
        ValueError: an unknown kind, or padding to fewer channels.
    """
    if kind not in ("conv", "pad"):
        raise ValueError(f"shortcut {kind!r}; 'conv' and 'pad' are known")
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(c_in, c_out, stride)
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel, then channels of zeros up to ``c_out``.

    The zeros are a buffer, not written into ``forward()``: so their channels have an axis of the state dict like all
    others, and surgery can cut them together with the residual stream they join. ``F.pad`` would fix the number of
    channels and keep the whole stream dense.

    Raises:
        ValueError: fewer channels than are read.
    """

    zeros: torch.Tensor

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        if c_out < c_in:
            raise ValueError(f"shortcut 'pad' from {c_in} to {c_out} channels; it cannot drop any")
        self.stride = stride
        self.register_buffer("zeros", torch.zeros(1, c_out - c_in, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``, rounded up."""
        x = x[:, :, :: self.stride, :: self.stride]
        zeros = self.zeros.to(x.dtype).expand(x.shape[0], -1, x.shape[2], x.shape[3])
        return torch.cat([x, zeros], dim=1)
