"""Images as files: decoded, cropped and resized on reading, to bytes of one size."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 2  # a picture's: (area, sides) of each try, then row and column
CROP_AREA, CROP_SIDES = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's, and the usual ones for ImageNet


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Picture files below a folder.

    Attributes:
        folder: where the names begin.
        names: ``[N]`` relative paths as bytes; one array, which worker processes share (a list of strings they would
            each end up copying).
        resize: the shorter side is brought to this many pixels,
        size: and the middle square of this many pixels taken.
    """

    folder: Path
    names: np.ndarray[Any, np.dtype[np.bytes_]]
    resize: int
    size: int

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The middles of the pictures at ``indices``: bytes ``[n, 3, size, size]``, RGB.

        Raises:
            ConfigError: a file that cannot be decoded, by name.
        """
        from torchvision.transforms import functional

        pictures = []
        for index in indices:
            picture = self._decoded(index)
            if min(picture.size) != self.resize:
                picture = functional.resize(picture, self.resize)
            if picture.size != (self.size, self.size):
                picture = functional.center_crop(picture, [self.size, self.size])
            pictures.append(functional.pil_to_tensor(picture))
        return torch.stack(pictures)

    def read_crops(self, indices: Sequence[int], size: int, numbers: torch.Tensor) -> torch.Tensor:
        """A random crop of each picture at ``indices``: bytes ``[n, 3, size, size]``, RGB.

        Args:
            numbers: ``[n, CROP_NUMBERS]`` in [0, 1), see :func:`crop_box`.

        Raises:
            ConfigError: a file that cannot be decoded, by name.
        """
        from torchvision.transforms import functional

        pictures = []
        for index, row in zip(indices, numbers.tolist(), strict=True):
            picture = self._decoded(index)
            box = crop_box(picture.height, picture.width, row)
            pictures.append(functional.pil_to_tensor(functional.resized_crop(picture, *box, size=[size, size])))
        return torch.stack(pictures)

    def _decoded(self, index: int) -> Any:
        from PIL import Image

        path = self.path(index)
        try:
            with Image.open(path) as file:
                return file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # as PIL reports damage
            raise ConfigError(
                f"{path} cannot be decoded ({problem})",
                expected="a picture",
                fix="copy that file again, or unpack the data set anew, then continue with --resume",
            ) from None


def crop_box(height: int, width: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) in a picture: Szegedy et al. 2015, section 6, as torchvision draws it.

    The area is uniform, the ratio of the sides log-uniform; a box that does not fit is drawn again, and after
    ``CROP_TRIES`` the middle is taken.

    Args:
        numbers: ``CROP_NUMBERS`` in [0, 1).
    """
    low, high = (math.log(ratio) for ratio in CROP_SIDES)
    for area, sides in zip(numbers[0:-2:2], numbers[1:-2:2], strict=True):
        pixels = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = math.exp(low + sides * (high - low))
        across, down = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = int(numbers[-2] * (height - down + 1)), int(numbers[-1] * (width - across + 1))
            return top, left, down, across
    ratio = min(max(width / height, CROP_SIDES[0]), CROP_SIDES[1])
    down, across = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - down) // 2, (width - across) // 2, down, across
