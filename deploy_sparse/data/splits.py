"""A data set in memory and its reproducible batches: each one a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Description:
    """Shape of one image ``(C, H, W)``, number of classes, and number of training images."""

    image_shape: tuple[int, int, int]
    classes: int
    train_images: int


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]`` float32, normalised, and labels ``[N]`` int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Three disjoint splits of one data set."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split

    def sizes(self) -> dict[str, int]:
        """Number of images by split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def train_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, shift: int = 0, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch from batch ``start`` on, in an order that depends on (seed, epoch) alone.

    Args:
        batch_size: images a batch; a remainder smaller than a batch is left out of this epoch.
        shift: augmentation: each image moves by up to this many pixels along each axis, zeros move in.
        start: index of the first batch wanted; the ones before it are not computed.

    Yields:
        images ``[batch_size, C, H, W]`` and labels ``[batch_size]``.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)  # [N]
    moves = torch.randint(-shift, shift + 1, (len(split), 2), generator=generator)  # [N, 2] rows, columns
    for first in range(start * batch_size, len(split) - batch_size + 1, batch_size):
        chosen = order[first : first + batch_size]
        images = split.images[chosen]
        yield (_shifted(images, moves[chosen], shift) if shift else images), split.labels[chosen]


def batch_count(split: Split, batch_size: int) -> int:
    """Batches :func:`train_batches` yields in one epoch."""
    return len(split) // batch_size


def _shifted(images: torch.Tensor, moves: torch.Tensor, shift: int) -> torch.Tensor:
    height, width = images.shape[2:]
    padded = functional.pad(images, (shift,) * 4)  # [N, C, H + 2 shift, W + 2 shift]
    rows = shift + moves[:, :1] + torch.arange(height)  # [N, H]
    columns = shift + moves[:, 1:] + torch.arange(width)  # [N, W]
    sample = torch.arange(len(images))[:, None, None]  # [N, 1, 1]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
