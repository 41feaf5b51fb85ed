"""Sets of channels whose number is a width of the network: what rounding of widths rounds."""

from __future__ import annotations

import numpy as np

from ._axes import Ledger
from .graph import Members


def width_sets(ledger: Ledger, members: Members) -> list[np.ndarray]:
    """Sets of channels (smallest joined atoms) to round one after the other: the parts of a group, then the group.

    Tensors may hold only some channels of a group: a shortcut that pads with zeros joins narrow stages to wide ones.
    What a tensor holds is a set of its own where all such sets of a group lie inside or outside each other; where they
    overlap, as when channels are shuffled, rounding one would undo another, and only the group is rounded.
    """
    parts: list[dict[bytes, np.ndarray]] = [{} for _ in members.sizes]
    for axis in ledger.axes.values():
        roots = ledger.roots_of(axis)
        if roots.ndim > 1:
            continue
        held = np.unique(roots[roots >= 0])
        numbers = members.group[held]
        for number in np.unique(numbers[numbers >= 0]).tolist():
            own = held[numbers == number]
            if len(own) < members.sizes[number]:
                parts[number][own.tobytes()] = own
    found: list[np.ndarray] = []
    for number, known in enumerate(parts):
        inner = sorted(known.values(), key=len)
        if _nested(inner):
            found += inner
        found.append(np.flatnonzero(members.group == number))
    return found


def _nested(sets: list[np.ndarray]) -> bool:
    """Whether any two of ``sets``, the smaller ones first, have nothing in common or one holds the other."""
    for number, small in enumerate(sets):
        for large in sets[number + 1 :]:
            shared = np.isin(small, large, assume_unique=True)
            if shared.any() and not shared.all():
                return False
    return True
