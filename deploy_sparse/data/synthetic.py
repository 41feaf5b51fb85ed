"""Small pictures drawn from a seed: classes are pairs of motifs, among clutter, clouds and noise.

A dictionary of grey motifs is shared by all classes, and a class is a *pair* of them: no motif alone tells the class,
so that a network has to know most of them. Each picture shows its two motifs somewhere, at a random size, contrast
and tint, beside motifs that mean nothing, on a cloudy background with noise. The task (motifs, pairs) is decided by
``task_seed``, the pictures by the run's seed. A mirrored motif is none of the dictionary's: no flips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch.nn import functional

from ..config import Config
from .draws import Stream, uniforms
from .memory import Labelled, byte_splits
from .splits import Augmentation, Description, Splits

SIDE = 32  # pixels
SIZES = (9, 11, 13)  # pixels a motif takes
EDGE = 2  # pixels left free around the motifs, so that a shift by as much cuts none
_GRID = 4  # a motif is 4 × 4 lights and darks, the background 4 × 4 colours, both drawn smoothly
_CLOUDS = 0.4  # contrast of the background
_CELL = (SIDE - 2 * EDGE) // 2  # each motif stands in a quarter of the picture
_CHUNK = 250  # pictures drawn at once: they stay in the processor's cache


class SyntheticConfig(Config):
    """Arguments of the synthetic data set."""

    classes: int = Field(10, ge=2, le=1000, description="number of classes")
    train_images: int = Field(5000, ge=1, description="images in the training split")
    validation_images: int = Field(1000, ge=1, description="images in the validation split")
    test_images: int = Field(2000, ge=1, description="images in the test split")
    task_seed: int = Field(0, ge=0, lt=2**32, description="decides the motifs and the classes; the seed the pictures")
    clutter: int = Field(2, ge=0, le=20, description="motifs in each picture that mean nothing")
    noise: float = Field(0.25, ge=0, le=1, description="largest noise of a pixel; 1 is from black to white")
    contrast: float = Field(0.3, gt=0, le=1, description="mean contrast of a motif; 1 is from black to white")


@dataclass(frozen=True, eq=False)
class Task:
    """What the pictures show.

    Attributes:
        motifs: ``[motifs, len(SIZES), P, P]`` float32, -1..1, mean 0; P is the largest size, smaller ones are centred.
        clutter: ``[others, len(SIZES), P, P]`` motifs that mean nothing.
        pairs: ``[classes, 2]`` the two motifs of each class.
    """

    motifs: torch.Tensor
    clutter: torch.Tensor
    pairs: torch.Tensor


def describe_synthetic(config: SyntheticConfig) -> Description:
    """What these arguments give."""
    return Description((3, SIDE, SIDE), config.classes, config.train_images, Augmentation(shift=EDGE))


def load_synthetic(config: SyntheticConfig, seed: int) -> Splits:
    """Draw all three splits, bytes ``[N, 3, 32, 32]``; the classes come in turn, so each is as frequent."""
    task = task_of(config)
    counts = {"train": config.train_images, "validation": config.validation_images, "test": config.test_images}
    parts = {
        name: pictures(config, task, seed=seed, split=number, count=count)
        for number, (name, count) in enumerate(counts.items())
    }
    return byte_splits("synthetic", describe_synthetic(config), parts)


def task_of(config: SyntheticConfig) -> Task:
    """The motifs and classes of a ``task_seed``: as few motifs as have a pair for each class."""
    count = math.ceil((1 + math.sqrt(1 + 8 * config.classes)) / 2)  # count · (count - 1) / 2 pairs
    pairs = torch.combinations(torch.arange(count))  # [pairs, 2]
    order = uniforms(len(pairs), Stream.TASK, config.task_seed, 0)[0].argsort()
    motifs = _motifs(uniforms(_GRID**2, Stream.TASK, config.task_seed, 1, torch.arange(count)))
    clutter = _motifs(uniforms(_GRID**2, Stream.TASK, config.task_seed, 2, torch.arange(2 * count)))
    return Task(motifs, clutter, pairs[order[: config.classes]])


def pictures(config: SyntheticConfig, task: Task, *, seed: int, split: int, count: int) -> Labelled:
    """Bytes ``[count, 3, 32, 32]`` and labels ``[count]``; picture i depends on (seed, split, i) alone."""
    places = torch.arange(count)
    labels = places % config.classes
    drawn = [
        _drawn(config, task, labels[chunk], uniforms(sum(_widths(config)), Stream.PICTURES, seed, split, chunk))
        for chunk in torch.split(places, _CHUNK)
    ]
    return torch.cat(drawn), labels


def _motifs(numbers: torch.Tensor) -> torch.Tensor:
    """Half of each motif's fields light, half dark; drawn in every size ``[n, len(SIZES), P, P]``."""
    light = numbers.argsort(dim=1).argsort(dim=1) < _GRID**2 // 2  # [n, 16]
    grid = (2.0 * light - 1.0).to(torch.float32).reshape(-1, 1, _GRID, _GRID)
    drawn = []
    for size in SIZES:
        motif = functional.interpolate(grid, (size, size), mode="bilinear", align_corners=False)  # [n, 1, size, size]
        drawn.append(functional.pad(motif, ((max(SIZES) - size) // 2,) * 4))
    return torch.cat(drawn, dim=1)


_PER_MOTIF = 7  # which, size, row, column, contrast, two of tint


def _widths(config: SyntheticConfig) -> list[int]:
    """How many numbers a picture takes: order of the quarters, motifs, clouds, noise (four pixels to a number)."""
    return [4, (2 + config.clutter) * _PER_MOTIF, 3 * _GRID**2, 3 * SIDE**2 // 4]


def _drawn(config: SyntheticConfig, task: Task, labels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Pictures of the classes ``labels`` [n], bytes ``[n, 3, 32, 32]``."""
    quarters, motifs, clouds, noise = torch.split(numbers, _widths(config), dim=1)
    grid = clouds.to(torch.float32).reshape(-1, 3, _GRID, _GRID) - 0.5
    canvas = 0.5 + _CLOUDS * functional.interpolate(grid, (SIDE, SIDE), mode="bilinear", align_corners=False)
    order = quarters.argsort(dim=1)  # [n, 4]: up to four motifs do not hide one another
    slots = motifs.reshape(len(labels), -1, _PER_MOTIF)  # [n, 2 + clutter, 7]; float32 would round some up to 1
    for number, slot in enumerate(slots.unbind(1)):
        size = (slot[:, 1] * len(SIZES)).long()
        if number < 2:
            patches = task.motifs[task.pairs[labels, number], size]  # [n, P, P]
        else:
            patches = task.clutter[(slot[:, 0] * len(task.clutter)).long(), size]
        strength, red, blue = (0.75 + 0.5 * slot[:, 4:].to(torch.float32)).unbind(1)  # [n] each
        colours = 0.5 * config.contrast * strength[:, None] * torch.stack([red, torch.ones_like(red), blue], dim=1)
        _add_(canvas, patches[:, None] * colours[:, :, None, None], _corners(order[:, number % 4], size, slot[:, 2:4]))
    return ((canvas + config.noise * _noise(noise).reshape(canvas.shape)).clamp(0, 1) * 255).round().to(torch.uint8)


def _corners(quarter: torch.Tensor, size: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Upper left corners ``[n, 2]`` of the patches, so that each motif lies anywhere within its quarter."""
    sizes = torch.tensor(SIZES)[size][:, None]  # [n, 1]
    cells = torch.stack([quarter // 2, quarter % 2], dim=1)  # [n, 2]
    inside = (numbers * (_CELL - sizes + 1)).long()  # [n, 2]
    return EDGE + _CELL * cells + inside - (max(SIZES) - sizes) // 2


def _add_(canvas: torch.Tensor, patches: torch.Tensor, corners: torch.Tensor) -> None:
    """Add ``patches`` [n, 3, P, P] to ``canvas`` [n, 3, H, W] at ``corners`` [n, 2]."""
    across = torch.arange(patches.shape[-1])
    rows, columns = corners[:, :1] + across, corners[:, 1:] + across  # [n, P]
    sample = torch.arange(len(canvas))[:, None, None]
    canvas.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]] += patches.permute(0, 2, 3, 1)


def _noise(numbers: torch.Tensor) -> torch.Tensor:
    """Uniform in -1..1, four for each number in [0, 1): 12 bits each of its highest 48."""
    words = (numbers * 2.0**48).long()[:, :, None] >> torch.tensor([36, 24, 12, 0])  # [n, count, 4]
    return (words & 0xFFF).to(torch.float32) / 2047.5 - 1
