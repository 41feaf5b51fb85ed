"""Which channels may be removed while a network trains, and everything that goes with each of them.

The pools come from the traced network's channel groups, so Chase needs no map of layers (Yin et al. 2023 removes only
the channels inside residual blocks; its prune-skip variant also those of the residual stream).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch

from ..errors import ConfigError, TicketError, nearest
from ..structure import ChannelGroup, Masks, Slice
from .patterns import by_writers

Coupling = Literal["internal", "prune_skip"]
COUPLINGS: tuple[Coupling, ...] = get_args(Coupling)
"""By name, the released code's rule first."""


@dataclass(frozen=True)
class ChannelPool:
    """Channels that the same layers write; each can be removed as a whole, without the others.

    Attributes:
        name: the first writer's weight, for messages; two pools of one residual stream may share it.
        size: number of channels; their local indices are 0 to size - 1.
        writers: the rows that write them; ``channels`` of all slices here are local indices, -1 elsewhere.
        parts: all that is masked when a channel goes: writers with their biases and norms, per-channel parameters
            that several layers share, depthwise filters, and the weight columns that read it.
    """

    name: str
    size: int
    writers: tuple[Slice, ...]
    parts: tuple[Slice, ...]


def channel_pools(
    masks: Masks, groups: Sequence[ChannelGroup], coupling: Coupling, *, head: str | None = None
) -> tuple[ChannelPool, ...]:
    """The pools of a network, in the order of its channel groups; none where nothing may be removed.

    * ``"internal"``: channels that one layer writes and one layer reads, which is not the head: conv1 and conv2 of a
      bottleneck block, conv1 of a basic block, every convolution of a VGG but the last, and never a stem, a block's
      output or a projection. Depthwise filters and norms in between go with their channel. Where channels are gated
      (squeeze-excite) or convolutions grouped, little or nothing is internal.
    * ``"prune_skip"``: these, and all other channels that can be removed: those of the residual stream, of
      concatenations, and those the head reads. Channels that the same layers write form one pool; where a shortcut
      has no weights (He et al. 2016, option A), a residual stream has one for each set of writers.

    Args:
        masks: of the weights that are sparsified; biases and norms, if there, do not matter, nor do weights that the
            tracer does not understand. A channel that a layer without a mask writes is in no pool.
        groups: the traced network's channel groups; those pinned have no pool.
        coupling: one of these.
        head: the weight of the classification head (:func:`imp.head_of`), for ``"internal"``.

    Raises:
        ConfigError: an unknown coupling.
    """
    if coupling not in COUPLINGS:
        raise ConfigError(
            f"coupling {coupling!r}",
            expected=f"one of {', '.join(COUPLINGS)}",
            fix=f"{nearest(coupling, COUPLINGS)}mend the name",
        )
    pools = []
    for group in groups:
        if group.pinned is not None or (coupling == "internal" and not _internal(group, head)):
            continue
        for rows in by_writers(group):
            if all(own.name in masks for own in rows):
                pools.append(_pool(group, rows))
    return tuple(pools)


def remove_(masks: dict[str, torch.Tensor], pool: ChannelPool, gone: torch.Tensor) -> None:
    """Set everything of the pool's channels ``gone`` to False, in place. Other channels do not change.

    Args:
        masks: by parameter name, for every part of the pool (:func:`part_names`), on any device.
        pool: whose channels go.
        gone: bool ``[pool.size]``.

    Raises:
        TicketError: a part without a mask, or ``gone`` of another length.
    """
    if gone.shape != (pool.size,):
        raise TicketError(
            f"channels to remove from pool {pool.name!r} have shape {tuple(gone.shape)}",
            expected=f"one boolean for each of its {pool.size} channels",
            fix="choose them among this pool's channels",
        )
    missing = [name for name in part_names((pool,)) if name not in masks]
    if missing:
        raise TicketError(
            f"channels of pool {pool.name!r} cannot be removed: {missing[0]!r} has no mask",
            expected=f"masks of all its parts: {', '.join(part_names((pool,)))}",
            fix="start with all-True masks of what part_names(pools) lists",
        )
    for part in pool.parts:
        mask = masks[part.name]
        mask.index_fill_(part.dim, part.positions(gone).to(mask.device), False)


def removed_channels(masks: Masks, pool: ChannelPool) -> torch.Tensor:
    """Bool ``[pool.size]``: the channels of which everything is masked, as :func:`remove_` leaves them.

    A channel whose weights happen to be zero, while its norm or bias is not, is still there.
    """
    gone = torch.ones(pool.size, dtype=torch.bool)
    for part in pool.parts:
        channels = torch.tensor(part.channels)  # [positions along dim]
        own = channels >= 0
        if part.name not in masks:
            gone[channels[own]] = False
            continue
        mask = masks[part.name].cpu().movedim(part.dim, 0)
        gone[channels[own & mask.reshape(len(mask), -1).any(dim=1)]] = False
    return gone


def part_names(pools: Sequence[ChannelPool]) -> list[str]:
    """Names of all parameters that the pools' channels have a part in, each once, in order."""
    return list(dict.fromkeys(part.name for pool in pools for part in pool.parts))


def _internal(group: ChannelGroup, head: str | None) -> bool:
    readers = {columns.name for columns in group.consumers}
    return len(group.producers) == 1 and len(readers) == 1 and head not in readers


def _pool(group: ChannelGroup, rows: Sequence[Slice]) -> ChannelPool:
    own = sorted({channel for part in rows for channel in part.channels if channel >= 0})
    local = {channel: position for position, channel in enumerate(own)}
    masked = [part for part in group.slices() if part not in group.statistics]
    parts = [_renumbered(part, local) for part in masked if not local.keys().isdisjoint(part.channels)]
    return ChannelPool(rows[0].name, len(own), tuple(_renumbered(part, local) for part in rows), tuple(parts))


def _renumbered(part: Slice, local: Mapping[int, int]) -> Slice:
    return Slice(part.name, part.dim, tuple(local.get(channel, -1) for channel in part.channels))


def narrowable(groups: Sequence[ChannelGroup], exclude: Sequence[str]) -> list[str]:
    """Names of the weights that write channels which may go, less those that a pattern of ``exclude`` matches.

    Raises:
        ConfigError: a pattern that matches none of them.
    """
    names = list(dict.fromkeys(p.weight.name for g in groups if g.pinned is None for p in g.producers))
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"exclude pattern {pattern!r} matches no layer that can be narrowed",
                expected=f"patterns of {', '.join(names[:4])} …",
                fix="mend or drop the pattern",
            )
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
