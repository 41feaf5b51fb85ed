"""ResNet with basic blocks in the form used on small images: 3×3 stem without pooling (He et al. 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: identity, or a 1×1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks (each stage but the first halves the resolution), average pool, classifier.

    Args:
        blocks: blocks per stage; ``(2, 2, 2, 2)`` is ResNet-18.
        widths: channels per stage.
        in_channels: channels of the image.
        classes: number of classes.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"{len(blocks)} stages of blocks but {len(widths)} widths")
        if not widths or min(*blocks, *widths, in_channels, classes) < 1:
            raise ValueError("blocks, widths, in_channels and classes must be 1 or more")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        for number, (count, (c_in, c_out)) in enumerate(zip(blocks, pairwise([widths[0], *widths]), strict=True)):
            first = BasicBlock(c_in, c_out, stride=1 if number == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(count - 1))))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: torch.Tensor = self.fc(self.stages(x).mean(dim=(2, 3)))  # [N, C, H, W] -> [N, C]
        return logits
