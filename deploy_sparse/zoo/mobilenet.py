"""MobileNet-v1 for small images: depthwise separable convolutions (Howard et al. 2017), 3×3 stem of stride 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class SeparableBlock(nn.Module):
    """A 3×3 depthwise convolution, then a 1×1 convolution, each with BatchNorm and ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


class MobileNet(nn.Module):
    """Stem, separable blocks, average pool, classifier.

    Args:
        widths: channels of the stem, then of each block.
        strides: stride of each block's depthwise convolution.
        in_channels: channels of the image.
        classes: number of classes.

    Raises:
        ValueError: arguments that make no network.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if len(widths) != len(strides) + 1:
            raise ValueError(f"{len(strides)} strides of blocks but {len(widths)} widths, the stem's and the blocks'")
        if min(*widths, *strides, in_channels, classes) < 1:
            raise ValueError("widths, strides, in_channels and classes must be 1 or more")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        shapes = zip(pairwise(widths), strides, strict=True)
        self.blocks = nn.Sequential(*(SeparableBlock(c_in, c_out, stride) for (c_in, c_out), stride in shapes))
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: torch.Tensor = self.fc(self.blocks(x).mean(dim=(2, 3)))  # [N, C, H, W] -> [N, C]
        return logits
