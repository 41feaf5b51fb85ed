"""VGG with BatchNorm for small images (Simonyan and Zisserman 2015), with a pooled or a flattened classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class VGG(nn.Module):
    """Plain 3×3 convolutions with bias, BatchNorm and ReLU.

    Args:
        layout: channel counts, and ``"M"`` for a 2×2 max pool.
        in_channels: channels of the image.
        classes: number of classes.
        hidden: width of one hidden Linear layer in the classifier; 0 for none.
        flatten: pixels that remain after the last pool and are flattened into the classifier; 0 for global average
            pooling, which takes any input size.
    """

    def __init__(
        self,
        layout: Sequence[int | str],
        in_channels: int = 3,
        classes: int = 10,
        hidden: int = 0,
        flatten: int = 0,
    ) -> None:
        super().__init__()
        if min(in_channels, classes, *(item for item in layout if isinstance(item, int))) < 1:
            raise ValueError("channel counts must be 1 or more")
        layers: list[nn.Module] = []
        width = in_channels
        for item in layout:
            if item == "M":
                layers.append(nn.MaxPool2d(2))
            elif isinstance(item, str):
                raise ValueError(f"layout item {item!r}; channel counts and 'M' are known")
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.BatchNorm2d(item), nn.ReLU()]
                width = item
        if not flatten:
            layers.append(nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(*layers, nn.Flatten())
        width *= flatten or 1
        head = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes)] if hidden else []
        self.classifier = nn.Sequential(*head) if head else nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        logits: torch.Tensor = self.classifier(self.features(x))
        return logits
