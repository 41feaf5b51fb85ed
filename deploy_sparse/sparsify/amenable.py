"""Sparse amenable channels: output channels that unstructured training leaves sparser than their layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..structure import Masks


@dataclass(frozen=True)
class SparseRows:
    """How many of one layer's output channels are how sparse.

    Attributes:
        channels: those with a position where a weight may be.
        sparser: of these, those whose density is below the layer's.
        amenable: those whose density is below half the layer's.
    """

    channels: int
    sparser: int
    amenable: int


@dataclass(frozen=True)
class Amenable:
    """What :func:`amenable` counts, by weight name; the properties are the sums over all layers."""

    by_layer: Mapping[str, SparseRows]

    @property
    def channels(self) -> int:
        """Output channels with a position where a weight may be."""
        return sum(layer.channels for layer in self.by_layer.values())

    @property
    def sparser(self) -> int:
        """Of these, those whose density is below their layer's."""
        return sum(layer.sparser for layer in self.by_layer.values())

    @property
    def amenable(self) -> int:
        """Those whose density is below half their layer's."""
        return sum(layer.amenable for layer in self.by_layer.values())


def amenable(masks: Masks, allowed: Masks) -> Amenable:
    """Count the channels that sparse training leaves behind.

    "Sparse amenable channels" are those clearly sparser than their layer (Yin et al. 2023, abstract); how much is not
    published. ``sparser`` counts every channel whose density is below its layer's. Masks drawn at random already have
    about half of their channels there, by chance alone, so it says little by itself. Hence ``amenable``: below half
    the layer's density, which next to no wide channel of a random mask is.

    Args:
        masks: by parameter name; only weights of two or more axes ``[c_out, ...]`` count.
        allowed: by weight name, the positions that were not removed with channels. Densities are over these alone,
            and a channel without any is not counted. A weight that has none here may use all its positions.

    Returns:
        the counts, exact: densities are compared as fractions of whole numbers.
    """
    found: dict[str, SparseRows] = {}
    for name, mask in masks.items():
        if mask.dim() < 2:
            continue
        open_to = allowed[name].to(mask.device) if name in allowed else torch.ones_like(mask)
        places = open_to.reshape(len(mask), -1).sum(dim=1)  # [c_out]
        weights = (mask & open_to).reshape(len(mask), -1).sum(dim=1)
        there = places > 0
        own, layer = weights * places.sum(), weights.sum() * places  # densities times both numbers of places
        rows = torch.stack([there, there & (own < layer), there & (2 * own < layer)])
        found[name] = SparseRows(*rows.sum(dim=1).tolist())  # one transfer a layer
    return Amenable(found)
