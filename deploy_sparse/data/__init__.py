"""Data sets by name, always as three disjoint splits: train on one, choose on validation, report on test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config, config_from
from ..errors import ConfigError, nearest
from .batches import batch_count as batch_count
from .batches import eval_batches as eval_batches
from .batches import train_batches as train_batches
from .cifar import DESCRIPTIONS, check_cifar, load_cifar
from .folders import LAYOUTS, FolderConfig, check_folders, describe_folders, load_folders
from .splits import Augmentation as Augmentation
from .splits import Description as Description
from .splits import Split as Split
from .splits import Splits as Splits
from .synthetic import SyntheticConfig, describe_synthetic, load_synthetic

_DIGITS = Description((1, 8, 8), 10, 1167, Augmentation(shift=1))
DATA_SETS = ("digits", "synthetic", *DESCRIPTIONS, *LAYOUTS)

_NOTHING: Mapping[str, Any] = {}
C = TypeVar("C", bound=Config)


class _NoArguments(Config):
    pass


def describe(name: str, arguments: Mapping[str, Any] = _NOTHING) -> Description:
    """What is known of a data set without loading it or looking at its files.

    Args:
        arguments: as for :func:`load`.

    Raises:
        ConfigError: no such data set, or no such argument of it.
    """
    _check_name(name)
    if name == "synthetic":
        return describe_synthetic(_arguments(SyntheticConfig, name, arguments))
    if name in LAYOUTS:
        return describe_folders(name, _arguments(FolderConfig, name, arguments))
    _arguments(_NoArguments, name, arguments)
    return DESCRIPTIONS.get(name, _DIGITS)


def check_files(name: str, folder: Path) -> None:
    """See that a data set's files are below ``folder``; what is in them is checked on loading.

    Raises:
        ConfigError: no such data set, or files are missing: which, and where they belong.
    """
    _check_name(name)
    folder = Path(folder).expanduser()
    if name in DESCRIPTIONS:
        check_cifar(name, folder)
    elif name in LAYOUTS:
        check_folders(name, folder)


def load(name: str, *, seed: int, folder: Path = Path("data"), arguments: Mapping[str, Any] = _NOTHING) -> Splits:
    """Load a data set.

    Args:
        seed: decides what is held out for validation; of ``digits`` the test split too, of ``synthetic`` the pictures.
        folder: where the unpacked data sets are (``~`` is home); nothing is downloaded.
        arguments: ``synthetic``: see :class:`~.synthetic.SyntheticConfig`; ``tiny-imagenet``, ``imagenet``:
            ``classes``, for a part of the data set. The others have none.

    Raises:
        ConfigError: no such data set or argument; files are missing, or are not the published ones.
    """
    description, folder = describe(name, arguments), Path(folder).expanduser()
    if name == "synthetic":
        return load_synthetic(_arguments(SyntheticConfig, name, arguments), seed)
    if name in DESCRIPTIONS:
        return load_cifar(name, folder, seed)
    if name in LAYOUTS:
        return load_folders(name, folder, _arguments(FolderConfig, name, arguments), seed)
    from .digits import load_digits

    return load_digits(description, seed)


def _check_name(name: str) -> None:
    if name not in DATA_SETS:
        raise ConfigError(
            f"unknown data set {name!r}",
            expected=f"one of {', '.join(DATA_SETS)}",
            fix=f"{nearest(name, list(DATA_SETS))}mend [data] name",
        )


def _arguments(kind: type[C], name: str, arguments: Mapping[str, Any]) -> C:
    if arguments and not kind.model_fields:
        raise ConfigError(
            f"data.arguments {', '.join(sorted(arguments))} for {name!r}",
            expected="no arguments",
            fix="leave [data.arguments] out",
        )
    return config_from(kind, arguments, source=f"[data.arguments] of {name!r}")
