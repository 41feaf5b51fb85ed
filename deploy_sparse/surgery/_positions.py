"""Positions along an axis, and how they are written in JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

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
