"""Data sets held in memory as bytes, and how a validation split is taken from training images."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import ConfigError
from .splits import Description, Split, Splits

Labelled = tuple[torch.Tensor, torch.Tensor]  # images [N, C, H, W] bytes, labels [N] int64


def byte_splits(name: str, description: Description, parts: Mapping[str, Labelled]) -> Splits:
    """Splits of bytes, normalised on reading by the training split's mean and deviation of each channel.

    Args:
        parts: images ``[N, C, H, W]`` uint8 and labels ``[N]`` of ``train``, ``validation`` and ``test``.
    """
    mean, deviation = channel_statistics(parts["train"][0])
    splits = {key: Split(images, labels, mean, deviation) for key, (images, labels) in parts.items()}
    return Splits(name, description.classes, description.image_shape, **splits, augmentation=description.augmentation)


def channel_statistics(images: torch.Tensor) -> Labelled:
    """Mean and standard deviation of each channel of bytes ``[N, C, H, W]``, both float32 ``[C, 1, 1]``, 0..255."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()  # [256]: no float copy of the images
        mean = (share * values).sum()
        means.append(mean)
        deviations.append((share * (values - mean) ** 2).sum().sqrt())
    both = torch.stack([torch.stack(means), torch.stack(deviations)]).to(torch.float32)  # [2, C]
    return both[0, :, None, None], both[1, :, None, None]


def hold_out(labels: torch.Tensor, share: float, seed: int, *, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (kept, held out), each ascending: about ``share`` of every class held out, chosen by the seed.

    Args:
        labels: ``[N]`` int64.

    Raises:
        ConfigError: a class with fewer than two images.
    """
    from sklearn.model_selection import train_test_split

    counts = torch.bincount(labels)
    if int(counts.min()) < 2:
        raise ConfigError(
            f"{name} has {int(counts.min())} training images of class {int(counts.argmin())}",
            expected="at least two of each class, one of them for validation",
            fix="unpack the data set anew, then continue with --resume",
        )
    count = max(round(share * len(labels)), len(counts))
    everything = torch.arange(len(labels)).numpy()
    kept, held = train_test_split(everything, test_size=count, random_state=seed, stratify=labels.numpy())
    return torch.from_numpy(kept).sort().values, torch.from_numpy(held).sort().values
