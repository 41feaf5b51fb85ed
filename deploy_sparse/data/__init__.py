"""Data sets by name, always as three disjoint splits: train on one, choose on validation, report on test."""

from __future__ import annotations

from ..errors import ConfigError, nearest
from .splits import Description as Description
from .splits import Split as Split
from .splits import Splits as Splits

DATA_SETS = {"digits": Description((1, 8, 8), 10, 1167)}


def describe(name: str) -> Description:
    """What is known of a data set without loading it.

    Raises:
        ConfigError: no such data set.
    """
    if name not in DATA_SETS:
        raise ConfigError(
            f"unknown data set {name!r}",
            expected=f"one of {', '.join(DATA_SETS)}",
            fix=f"{nearest(name, list(DATA_SETS))}mend [data] name",
        )
    return DATA_SETS[name]


def load(name: str, *, seed: int) -> Splits:
    """Load a data set; ``seed`` decides the split and nothing else.

    Raises:
        ConfigError: no such data set.
    """
    describe(name)
    from .digits import load_digits

    return load_digits(seed)
