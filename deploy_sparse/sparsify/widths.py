"""How wide every layer gets when pools of channels keep some of theirs: the link between channels and running time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..structure import ChannelGroup
from .coupling import ChannelPool

LayerWidths = Mapping[str, tuple[int, int]]
"""Input and output channels of layers by module path."""


class Costs(Protocol):
    """What layers cost on some target, in ms; a latency table answers this."""

    def ms(self, path: str, c_in: int, c_out: int) -> float:
        """One layer with so many input and output channels."""

    def network_ms(self, widths: LayerWidths) -> float:
        """The whole network: a constant rest and the sum of its layers."""


@dataclass(frozen=True)
class LayerWidth:
    """One layer's channels, and what each pool takes from them.

    Attributes:
        path: the layer's module path.
        c_in, c_out: channels of the dense layer.
        reads: by the pool's number, how many input channels go with one channel of the pool (a flattened feature map:
            height × width).
        writes: the same for output channels; depthwise filters are in both.
    """

    path: str
    c_in: int
    c_out: int
    reads: Mapping[int, float]
    writes: Mapping[int, float]

    @property
    def pools(self) -> tuple[int, ...]:
        """The pools that change this layer's width, ascending."""
        return tuple(sorted({*self.reads, *self.writes}))

    def at(self, lost: Mapping[int, int]) -> tuple[int, int]:
        """Input and output channels when pools have lost so many of theirs."""
        gone_in = sum(per * lost[pool] for pool, per in self.reads.items())
        gone_out = sum(per * lost[pool] for pool, per in self.writes.items())
        return round(self.c_in - gone_in), round(self.c_out - gone_out)


def layer_widths(
    pools: Sequence[ChannelPool], groups: Sequence[ChannelGroup], dense: LayerWidths
) -> tuple[LayerWidth, ...]:
    """Which pools decide the widths of the layers that have a cost, in their order.

    Args:
        pools: the channels that may go.
        groups: the traced network's channel groups, which the pools were made from.
        dense: input and output channels of the dense layers, for all that have a cost.
    """
    readers = {(part.name, part.dim) for group in groups for part in group.consumers}
    reads: dict[str, dict[int, float]] = {path: {} for path in dense}
    writes: dict[str, dict[int, float]] = {path: {} for path in dense}
    for number, pool in enumerate(pools):
        writers = {(part.name, part.dim) for part in pool.writers}
        for part in pool.parts:
            path, _, attribute = part.name.rpartition(".")
            if path not in dense or attribute != "weight":
                continue  # biases and norms, and what no engine spends time on
            share = sum(channel >= 0 for channel in part.channels) / (len(part.channels) * pool.size)
            place = part.name, part.dim
            c_in, c_out = dense[path]
            if place in writers or place not in readers:
                writes[path][number] = writes[path].get(number, 0.0) + share * c_out
            if place not in writers:
                reads[path][number] = reads[path].get(number, 0.0) + share * c_in
    return tuple(LayerWidth(path, *dense[path], reads[path], writes[path]) for path in dense)
