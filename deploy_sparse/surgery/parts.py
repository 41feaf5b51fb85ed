"""The small values a surgery plan consists of, and how positions along an axis are written in JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer


def ranges(positions: Iterable[int]) -> str:
    """Ascending positions as text: ``(0, 1, 2, 5)`` is ``"0-2,5"``."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def positions(text: object) -> object:
    """The positions a text of :func:`ranges` stands for; anything else is returned for the validator to refuse."""
    if not isinstance(text, str):
        return text
    found: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


Positions = Annotated[tuple[int, ...], BeforeValidator(positions), PlainSerializer(ranges, return_type=str)]
"""Ascending positions along an axis; in JSON a short text like ``"0-15,18"``."""


@dataclass(frozen=True)
class Cut:
    """Positions that stay along one axis of one tensor of the state dict; ``size`` is the dense size of that axis."""

    name: str
    dim: int
    size: int
    kept: Positions


@dataclass(frozen=True)
class Fold:
    """Constants of removed channels taken up by a bias.

    Attributes:
        weight: the layer's weight.
        bias: the bias that changes.
        created: the layer had no bias before.
        channels: how many weight columns were folded.
    """

    weight: str
    bias: str
    created: bool
    channels: int


@dataclass(frozen=True)
class Stay:
    """Channels that stay although the masks empty them (``"pinned"``: whether or not they do), and why.

    ``kind``: ``"pinned"`` the network's structure needs them, ``"leak"`` their constant cannot be carried,
    ``"aligned"`` they fill the width up to the asked-for multiple, ``"last"`` a tensor must keep one.
    """

    kind: Literal["pinned", "leak", "aligned", "last"]
    channels: Positions
    reason: str


@dataclass(frozen=True)
class GroupPlan:
    """One channel group: its name, dense size, channels that stay, and why emptied channels stay."""

    name: str
    size: int
    kept: Positions
    stays: tuple[Stay, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A weight's shape in the dense and in the compact network."""

    name: str
    dense: tuple[int, ...]
    compact: tuple[int, ...]
