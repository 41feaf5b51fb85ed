"""CIFAR-10 and CIFAR-100 as published: 50,000 training pictures, 45,000 of them trained on, and 10,000 for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .memory import Labelled, byte_splits, hold_out
from .splits import Augmentation, Description, Splits

VALIDATION_SHARE = 0.1
DESCRIPTIONS = {
    name: Description((3, 32, 32), classes, 45_000, Augmentation(shift=4, flip=True))
    for name, classes in (("cifar10", 10), ("cifar100", 100))
}


def load_cifar(name: str, folder: Path, seed: int) -> Splits:
    """Train and validation from the 50,000 training pictures, stratified by the seed; test as published.

    The files hold pickles: torchvision compares their MD5 with the published one before it opens them.

    Raises:
        ConfigError: files are missing, or not the published ones.
    """
    check_cifar(name, folder)
    kind = _inside(_reader(name), folder)
    _check_sums(kind, folder)
    images, labels = _part(kind, folder, train=True)
    kept, held = hold_out(labels, VALIDATION_SHARE, seed, name=name)
    parts = {
        "train": (images[kept], labels[kept]),
        "validation": (images[held], labels[held]),
        "test": _part(kind, folder, train=False),
    }
    return byte_splits(name, DESCRIPTIONS[name], parts)


def check_cifar(name: str, folder: Path) -> None:
    """See that the files are there; their content is checked on loading.

    Raises:
        ConfigError: naming the missing file and where it belongs.
    """
    published = _reader(name)
    kind = _inside(published, folder)
    for file in _files(kind):
        if not (folder / kind.base_folder / file).is_file():
            place = f"{published.base_folder}/ under {folder.resolve()}/"
            unpack = f"put {place} (from {kind.url})" if kind is published else f"unpack {kind.filename} anew"
            raise ConfigError(
                f"{name}: {folder / kind.base_folder / file} does not exist",
                expected=f"the unpacked {kind.filename}: {', '.join(_files(kind))}",
                fix=f"{unpack}, or name another folder: --data.folder DIR",
            )


def _check_sums(kind: Any, folder: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    for file, md5 in _files(kind).items():
        path = folder / kind.base_folder / file
        if not check_integrity(path, md5):
            raise ConfigError(
                f"{path} is not the published file",
                expected=f"MD5 {md5}",
                fix=f"unpack {kind.filename} anew, then continue with --resume",
            )


def _part(kind: Any, folder: Path, *, train: bool) -> Labelled:
    read = kind(folder, train=train, download=False)
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()  # [N, 32, 32, 3] -> [N, 3, 32, 32]
    return images, torch.tensor(read.targets, dtype=torch.int64)


def _files(kind: Any) -> dict[str, str]:
    """Name and MD5 of every file torchvision reads."""
    return {**dict(kind.train_list), **dict(kind.test_list), kind.meta["filename"]: kind.meta["md5"]}


def _reader(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _inside(kind: Any, folder: Path) -> Any:
    """``kind``, or a reader of ``folder`` itself where it is the unpacked data set."""
    here = any((folder / file).is_file() for file in _files(kind)) and not (folder / kind.base_folder).is_dir()
    return type(kind.__name__, (kind,), {"base_folder": ""}) if here else kind
