"""Random changes to a batch of images, as a function of numbers in [0, 1)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from .splits import Augmentation

NUMBERS = 4  # a picture's: rows, columns, flip, angle


def augmented(images: torch.Tensor, augmentation: Augmentation, numbers: torch.Tensor) -> torch.Tensor:
    """Shift, rotate and flip each image by its own numbers (``crop`` happens where a file is decoded).

    Args:
        images: ``[n, C, H, W]``, bytes or float32; the result keeps the type.
        numbers: ``[n, NUMBERS]`` in [0, 1).
    """
    if augmentation.shift:
        moves = (numbers[:, :2] * (2 * augmentation.shift + 1)).long() - augmentation.shift  # [n, 2] rows, columns
        images = _shifted(images, moves, augmentation.shift)
    if augmentation.rotation:
        images = _rotated(images, (2 * numbers[:, 3] - 1) * math.radians(augmentation.rotation))
    if augmentation.flip:
        images = torch.where((numbers[:, 2] < 0.5)[:, None, None, None], images.flip(3), images)
    return images


def _shifted(images: torch.Tensor, moves: torch.Tensor, shift: int) -> torch.Tensor:
    height, width = images.shape[2:]
    padded = functional.pad(images, (shift,) * 4)  # [n, C, H + 2 shift, W + 2 shift]
    rows = shift + moves[:, :1] + torch.arange(height)  # [n, H]
    columns = shift + moves[:, 1:] + torch.arange(width)  # [n, W]
    sample = torch.arange(len(images))[:, None, None]  # [n, 1, 1]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _rotated(images: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turned about the middle by ``angles`` [n] radians, counter-clockwise."""
    cosine, sine = angles.cos(), angles.sin()
    height, width = images.shape[2:]
    # the grid's axes both run from -1 to 1, so an oblong picture needs its aspect in the matrix
    first = torch.stack([cosine, -sine * height / width, torch.zeros_like(sine)], dim=1)  # [n, 3]
    second = torch.stack([sine * width / height, cosine, torch.zeros_like(sine)], dim=1)  # [n, 3]
    theta = torch.stack([first, second], dim=1).to(torch.float32)  # [n, 2, 3]
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)  # [n, H, W, 2]
    turned = functional.grid_sample(images.to(torch.float32), grid, mode="nearest", align_corners=False)
    return turned.to(images.dtype)
