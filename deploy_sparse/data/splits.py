"""Splits of a data set: images and labels, read by index, normalised; in memory or as files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .files import ImageFiles


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image.

    Attributes:
        shift: moved by up to this many pixels along each axis; zeros of the stored values move in, which is black
            for stored bytes (a crop after padding by ``shift``).
        flip: mirrored left to right, half of the time.
        rotation: turned by up to this many degrees either way; zeros turn in (nearest pixel).
        crop: a random 8 to 100 % of the picture, sides 3:4 to 4:3, resized to a square of this many pixels; folder
            sets only. 0: none.
    """

    shift: int = 0
    flip: bool = False
    rotation: float = 0.0
    crop: int = 0


@dataclass(frozen=True)
class Description:
    """What is known of a data set without its files.

    Attributes:
        image_shape: of one image, ``(C, H, W)``.
        classes: number of classes.
        train_images: images in the training split, nominally.
        augmentation: what the training images usually undergo.
    """

    image_shape: tuple[int, int, int]
    classes: int
    train_images: int
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels, in a fixed order.

    Attributes:
        images: ``[N, C, H, W]``, bytes or float32, or the files they are decoded from as bytes.
        labels: ``[N]`` int64.
        mean: subtracted on reading, ``[C, 1, 1]`` or one number, in the units of ``images``.
        deviation: divided by on reading, likewise.
    """

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor
    mean: torch.Tensor | float = 0.0
    deviation: torch.Tensor | float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at ``indices`` ``[n]``, not augmented: float32 ``[n, C, H, W]``, normalised.

        Raises:
            ConfigError: a file cannot be decoded.
        """
        if isinstance(self.images, torch.Tensor):
            return self.normalised(self.images[indices])
        return self.normalised(self.images.read(indices.tolist()))

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Stored values ``[n, C, H, W]`` as the network sees them, float32."""
        return (images.to(torch.float32) - self.mean) / self.deviation

    def head(self, count: int) -> torch.Tensor:
        """The first ``count`` images (all if there are fewer), as :meth:`read` gives them."""
        return self.read(torch.arange(min(count, len(self))))


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint splits of one data set.

    Attributes:
        image_shape: of one image as the network sees it, ``(C, H, W)``.
        augmentation: what the training images usually undergo.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split
    augmentation: Augmentation = Augmentation()

    def sizes(self) -> dict[str, int]:
        """Number of images by split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}
