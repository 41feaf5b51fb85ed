"""Tiny-ImageNet and ImageNet: picture files in one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..errors import ConfigError
from .files import ImageFiles
from .memory import hold_out
from .splits import Augmentation, Description, Split, Splits


class FolderConfig(Config):
    """Arguments of the data sets in folders."""

    classes: int | None = Field(None, ge=2, description="number of class folders, for a part of the data set")


@dataclass(frozen=True)
class Layout:
    """One data set in folders.

    Attributes:
        description: of the whole data set.
        subfolder: what the unpacked archive is called.
        share: of each class's training pictures that becomes the validation split.
        mean, deviation: of each channel over the training pictures, 0..1, as published.
        resize, size: in evaluation the shorter side becomes ``resize`` pixels and the middle ``size`` are taken.
    """

    description: Description
    subfolder: str
    share: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    resize: int
    size: int


LAYOUTS = {
    "tiny-imagenet": Layout(
        Description((3, 64, 64), 200, 90_000, Augmentation(flip=True, rotation=20.0)),
        subfolder="tiny-imagenet-200",
        share=0.1,
        mean=(0.4802, 0.4481, 0.3975),
        deviation=(0.2770, 0.2691, 0.2821),
        resize=64,
        size=64,
    ),
    "imagenet": Layout(
        Description((3, 224, 224), 1000, 1_255_544, Augmentation(flip=True, crop=224)),
        subfolder="imagenet",
        share=0.02,
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
        resize=256,
        size=224,
    ),
}
_ANNOTATIONS = "val_annotations.txt"


def describe_folders(name: str, config: FolderConfig) -> Description:
    """The data set, or the part of it with ``config.classes`` classes."""
    whole = LAYOUTS[name].description
    classes = config.classes or whole.classes
    return Description(whole.image_shape, classes, whole.train_images * classes // whole.classes, whole.augmentation)


def load_folders(name: str, folder: Path, config: FolderConfig, seed: int) -> Splits:
    """Train and validation from ``train/``, stratified by the seed; test is the official ``val/``.

    Raises:
        ConfigError: folders or files are missing, or are not what the data set has.
    """
    check_folders(name, folder)
    layout, description = LAYOUTS[name], describe_folders(name, config)
    root = _root(layout, folder)
    classes = sorted(e.name for e in (root / "train").iterdir() if e.is_dir() and not e.name.startswith("."))
    if len(classes) != description.classes:
        raise ConfigError(
            f"{name}: {root / 'train'} has {len(classes)} class folders",
            expected=f"{description.classes}",
            fix=f"unpack it anew, or say that it is a part: --data.arguments.classes {len(classes)}",
        )
    train, train_labels = _by_folder(root, "train", classes)
    test, test_labels = _by_annotations(root, classes) if _is_flat(root) else _by_folder(root, "val", classes)
    kept, held = hold_out(train_labels, layout.share, seed, name=name)
    parts = {
        "train": (train[kept.numpy()], train_labels[kept]),
        "validation": (train[held.numpy()], train_labels[held]),
        "test": (test, test_labels),
    }
    mean, deviation = (255 * torch.tensor(v)[:, None, None] for v in (layout.mean, layout.deviation))  # [3, 1, 1]
    splits = {
        key: Split(ImageFiles(root, names, layout.resize, layout.size), labels, mean, deviation)
        for key, (names, labels) in parts.items()
    }
    return Splits(name, description.classes, description.image_shape, **splits, augmentation=description.augmentation)


def check_folders(name: str, folder: Path) -> None:
    """See that ``train/`` and ``val/`` are there; what is in them is checked on loading.

    Raises:
        ConfigError: naming the missing folder and where it belongs.
    """
    layout = LAYOUTS[name]
    root = _root(layout, folder)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise ConfigError(
                f"{name}: {root / part} does not exist",
                expected=f"{layout.subfolder}/train/ and {layout.subfolder}/val/ with one folder of pictures a class"
                + (f" (or val/{_ANNOTATIONS} and val/images/, as unpacked)" if name == "tiny-imagenet" else ""),
                fix=f"put {layout.subfolder}/ under {folder.resolve()}/, or name another folder: --data.folder DIR",
            )


def _root(layout: Layout, folder: Path) -> Path:
    """``folder/subfolder``, or ``folder`` itself where it is the unpacked data set."""
    inner = folder / layout.subfolder
    return folder if (folder / "train").is_dir() and not inner.is_dir() else inner


Named = tuple["np.ndarray[tuple[int], np.dtype[np.bytes_]]", torch.Tensor]  # names relative to the root, labels


def _by_folder(root: Path, part: str, classes: Sequence[str]) -> Named:
    """Every picture below ``root/part/<class>/``."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(root / part, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if empty := sorted({*range(len(classes))} - {label for _, label in samples}):
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ConfigError(
            f"{root / part} has no pictures of class {classes[empty[0]]}{more}",
            expected=f"a folder of pictures for each class: {Path(part, classes[empty[0]])}/",
            fix="sort the pictures into class folders, then continue with --resume"
            if part == "val"
            else "unpack the data set anew, then continue with --resume",
        )
    return _named([(f"{part}{path[len(str(root / part)) :]}", label) for path, label in samples])


def _is_flat(root: Path) -> bool:
    images = root / "val" / "images"  # sorting the pictures into class folders may leave it behind, empty
    return (root / "val" / _ANNOTATIONS).is_file() and images.is_dir() and any(images.iterdir())


def _by_annotations(root: Path, classes: Sequence[str]) -> Named:
    """The pictures ``val_annotations.txt`` lists: a file name and a class a line, then a box, tab-separated."""
    path = root / "val" / _ANNOTATIONS
    labels = {name: number for number, name in enumerate(classes)}
    there = {entry.name for entry in (root / "val" / "images").iterdir()}
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        file, label, *_ = [*line.split("\t"), ""]
        if label not in labels or file not in there:
            what = f"val/images/{file}, which does not exist" if label in labels else f"the class {label!r}"
            raise ConfigError(
                f"{path}, line {number}, names {what}",
                expected="a file in val/images/ and a class of train/, tab-separated",
                fix="unpack the data set anew, then continue with --resume",
            )
        samples.append((f"val/images/{file}", labels[label]))
    if not samples:
        raise ConfigError(
            f"{path} is empty",
            expected="a file name and a class a line",
            fix="unpack the data set anew, then continue with --resume",
        )
    return _named(samples)


def _named(samples: Sequence[tuple[str, int]]) -> Named:
    names = np.array([os.fsencode(name) for name, _ in samples])
    return names, torch.tensor([label for _, label in samples], dtype=torch.int64)
