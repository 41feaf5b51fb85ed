"""Renumbering channels, so that packed layers find their blocks side by side.

The channels of a group may be numbered in any order, as long as all its tensors agree. A packed layer would like the
rows of a block to be neighbours in the group it writes, and, where its blocks share no input channel, the columns of a
block to be neighbours in the group it reads. Where two layers want different orders of one group, one of them looks
its channels up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..structure import ChannelGroup, Slice
from .parts import Order


@dataclass(frozen=True)
class Wish:
    """What a packed layer would like of one axis of its weight.

    Attributes:
        weight: its name.
        dim: 0 for rows, 1 for input channels.
        blocks: positions along the axis, one tuple for each block; together they are the whole axis.
        numbers: how many a look-up copies for one sample.
    """

    weight: str
    dim: int
    blocks: tuple[tuple[int, ...], ...]
    numbers: int


def orders(groups: Sequence[ChannelGroup], wishes: Iterable[Wish]) -> tuple[Order, ...]:
    """New orders along tensor axes that fulfil the most expensive wishes, one group after the other.

    Args:
        groups: of the network whose layers are to be packed.
        wishes: of its layers.
    """
    axes = {(s.name, s.dim): (group, s) for group in groups if _free(group) for s in group.slices()}
    arranged: dict[str, _Arrangement] = {}
    sequences: dict[str, tuple[int, ...]] = {}  # the order of a layer's blocks, by weight, once one of its axes has one
    for wish in sorted(wishes, key=lambda w: -w.numbers):
        group, place = axes.get((wish.weight, wish.dim), (None, None))
        if group is None or place is None or sorted(place.channels) != list(range(group.size)):
            continue
        labels = np.empty(group.size, dtype=np.int64)  # block of each channel
        for number, block in enumerate(wish.blocks):
            labels[[place.channels[position] for position in block]] = number
        arrangement = arranged.setdefault(group.name, _Arrangement(group.size))
        sequence = arrangement.admit(labels, sequences.get(wish.weight))
        if sequence is not None:
            sequences[wish.weight] = sequence
    found: dict[tuple[str, int], Order] = {}
    for group in groups:
        if group.name in arranged and not arranged[group.name].plain:
            order = arranged[group.name].order
            for part in group.slices():
                positions = _positions(part, order)
                known = found.get((part.name, part.dim))
                if known is not None:  # the axis holds channels of several groups
                    positions = [
                        b if b != at else a for at, (a, b) in enumerate(zip(known.positions, positions, strict=True))
                    ]
                found[part.name, part.dim] = Order(part.name, part.dim, tuple(positions))
    return tuple(order for order in found.values() if order.positions != tuple(range(len(order.positions))))


def reordered(tensors: Mapping[str, torch.Tensor], changes: Iterable[Order]) -> dict[str, torch.Tensor]:
    """Tensors by name, with the positions along their axes as ``changes`` say."""
    found = dict(tensors)
    for change in changes:
        tensor = found[change.name]
        found[change.name] = tensor.index_select(change.dim, torch.tensor(change.positions, device=tensor.device))
    return found


@dataclass
class _Arrangement:
    """The order of one group's channels, and the blocks that lie side by side in it."""

    size: int
    admitted: list[np.ndarray] = field(default_factory=list)  # by channel: the place of its block

    @property
    def order(self) -> np.ndarray:
        """New position to old channel."""
        return _sorted(self.admitted, self.size)

    @property
    def plain(self) -> bool:
        """Whether the channels stay where they are."""
        return bool((self.order == np.arange(self.size)).all())

    def admit(self, labels: np.ndarray, sequence: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Make blocks lie side by side, in the given sequence or in any; the sequence, or None where that fails.

        Blocks that lie side by side already stay so: the newcomer's order is the coarsest or the finest.
        """
        for finest in (True, False):
            if sequence is None:
                seen = labels[self.order] if finest else labels
                tried = tuple(dict.fromkeys(seen.tolist()))
            else:
                tried = sequence
            places = np.empty(len(tried), dtype=np.int64)
            places[list(tried)] = np.arange(len(tried))
            keys = [*self.admitted, places[labels]] if finest else [places[labels], *self.admitted]
            order = _sorted(keys, self.size)
            if all((np.diff(key[order]) >= 0).all() for key in keys):
                self.admitted = keys
                return tried
        return None


def _sorted(keys: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Channels by the first key, among equals by the second, and so on; in their own order at last."""
    return np.lexsort([np.arange(size), *reversed(keys)])


def _free(group: ChannelGroup) -> bool:
    """Whether the channels may be renumbered: nothing outside knows them by number, and all are laid out alike."""
    if group.pinned is not None:
        return False
    for part in group.slices():
        counts = Counter(channel for channel in part.channels if channel >= 0)
        if len(counts) != group.size or len(set(counts.values())) > 1:
            return False
    return True


def _positions(part: Slice, order: np.ndarray) -> list[int]:
    """New position to old position along the axis; the channels of other groups stay where they are."""
    places: dict[int, list[int]] = {}
    for position, channel in enumerate(part.channels):
        places.setdefault(channel, []).append(position)
    turn: Counter[int] = Counter()
    found = []
    for position, channel in enumerate(part.channels):
        if channel < 0:
            found.append(position)
            continue
        found.append(places[int(order[channel])][turn[channel]])
        turn[channel] += 1
    return found
