"""ResNets in the form used on small images: 3×3 stem without pooling (He et al. 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .shortcut import make_shortcut


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: identity, or as ``shortcut`` says where the shape changes.

    Args:
        c_in: channels read.
        width: channels of both convolutions.
        stride: of the first convolution.
        shortcut: ``"conv"`` or ``"pad"``, see :func:`~deploy_sparse.zoo.shortcut.make_shortcut`.
    """

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(shortcut, c_in, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, c_in, H, W]`` to ``[N, width, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution and a shortcut; the 3×3 convolution has the stride, as in torchvision.

    Args:
        c_in: channels read.
        width: channels of the first two convolutions; the last one has four times as many.
        stride: of the 3×3 convolution.
        shortcut: ``"conv"`` or ``"pad"``, see :func:`~deploy_sparse.zoo.shortcut.make_shortcut`.
    """

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = make_shortcut(shortcut, c_in, c_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, c_in, H, W]`` to ``[N, 4 · width, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Stem, stages of residual blocks (each stage but the first halves the resolution), average pool, classifier.

    Args:
        blocks: blocks per stage; ``(2, 2, 2, 2)`` is ResNet-18.
        widths: channels per stage; of a bottleneck's inner convolutions.
        in_channels: channels of the image.
        classes: number of classes.
        block: ``"basic"`` or ``"bottleneck"``.
        shortcut: where a block changes the shape: ``"conv"`` or ``"pad"`` (He et al.'s options B and A).
        stem_stride: of the stem; 2 for a quarter of the work everywhere behind it.

    Raises:
        ValueError: arguments that make no network.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        in_channels: int = 3,
        classes: int = 10,
        block: str = "basic",
        shortcut: str = "conv",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"{len(blocks)} stages of blocks but {len(widths)} widths")
        if not widths or min(*blocks, *widths, in_channels, classes, stem_stride) < 1:
            raise ValueError("blocks, widths, in_channels, classes and stem_stride must be 1 or more")
        if block not in _BLOCKS:
            raise ValueError(f"block {block!r}; {' and '.join(map(repr, _BLOCKS))} are known")
        make_block = _BLOCKS[block]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, c_in = [], widths[0]
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage: list[nn.Module] = []
            for position in range(count):
                stride = 2 if number > 0 and position == 0 else 1
                stage.append(make_block(c_in, width, stride, shortcut))
                c_in = width * make_block.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(c_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: torch.Tensor = self.fc(self.stages(x).mean(dim=(2, 3)))  # [N, C, H, W] -> [N, C]
        return logits
