"""In which pattern entries survive: single weights or whole output channels; for dense blocks see :mod:`regroup`.

Each pattern takes scores (larger is kept first) and shares (how much survives, see :mod:`distribution`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ..errors import ConfigError, TicketError
from ..structure import ChannelGroup, Masks, Slice
from .distribution import Shares, counts, exact
from .silence import silence

__all__ = [
    "Width",
    "by_writers",
    "channels",
    "keep_largest",
    "row_pools",
    "silence",
    "silent_pools",
    "top",
    "unstructured",
    "whole",
]

Width = Callable[[Fraction, int], int]
"""From a budget in channels, not rounded, and the number of channels to how many are kept."""

Pool = tuple[Slice, ...]
"""Rows of weights that are kept or dropped together, channel by channel."""


def unstructured(
    scores: Mapping[str, torch.Tensor], masks: Masks, shares: Shares, *, spare_best: bool = False
) -> dict[str, torch.Tensor]:
    """Keep the entries with the largest scores; what is masked already stays masked.

    Args:
        scores: shaped like the masks; of equal scores the later entries are kept.
        masks: what may survive at most.
        shares: of all entries, masked ones included; one number ranks all layers together.
        spare_best: the best entry of every layer survives, at the cost of another; else an emptied layer is refused.

    Raises:
        TicketError: a score that is not finite, or a layer that would lose its last weight.
    """
    wanted = counts({name: mask.shape for name, mask in masks.items()}, shares)
    pooled = {"": list(masks)} if isinstance(wanted, int) else {name: [name] for name in masks}
    numbers = {"": wanted} if isinstance(wanted, int) else wanted
    found: dict[str, torch.Tensor] = {}
    for pool, names in pooled.items():
        found |= keep_largest(scores, {name: masks[name] for name in names}, numbers[pool], spare_best)
    for name, mask in found.items():
        if not bool(mask.any()):
            share = sum(int(m.sum()) for m in found.values()) / sum(m.numel() for m in found.values())
            raise TicketError(
                f"pruning to {share:.2%} of the weights leaves layer {name!r} without a weight",
                expected="at least one weight in every layer",
                fix="prune less: a lower rate or fewer rounds, or exclude that layer",
            )
    return found


def channels(
    scores: Mapping[str, torch.Tensor],
    masks: Masks,
    shares: Shares,
    pools: Sequence[Pool],
    *,
    width: Width | None = None,
) -> dict[str, torch.Tensor]:
    """Keep whole output channels: in every pool those with the largest scores, ties by index.

    Args:
        scores: float ``[c_out]`` by weight name; a channel's score is the mean over the pool's layers.
        masks: which weights take part; only their shapes matter. A weight in no pool stays whole.
        shares: of the weights. A pool's budget in channels is its weights' share, counted together. One number ranks
            all pools together, each pool's scores divided by their mean so that layers of different widths compare.
        pools: from :func:`row_pools` or :func:`silent_pools`.
        width: how budgets become whole channels, :func:`whole` by default.

    Returns:
        one mask for each of ``masks``, every row empty or whole.
    """
    width = width or whole()
    result = {name: torch.ones_like(mask, dtype=torch.bool) for name, mask in masks.items()}
    candidates = [_candidates(pool, scores, masks) for pool in pools]
    if isinstance(shares, Mapping):
        budgets = [found.budget(shares) for found in candidates]
    else:
        budgets = _ranked_together(candidates, exact(shares))
    for found, budget in zip(candidates, budgets, strict=True):
        kept = top(found.scores, min(found.size, max(1, width(budget, found.size))))
        for rows in found.pool:
            mask = result[rows.name]
            mask.index_fill_(rows.dim, rows.positions(~kept).to(mask.device), False)
    return result


def row_pools(masks: Masks) -> list[Pool]:
    """Every layer for itself, rows in their own order; no channel groups needed."""
    return [(Slice(name, 0, tuple(range(len(mask)))),) for name, mask in masks.items()]


def silent_pools(masks: Masks, groups: Sequence[ChannelGroup], *, together: bool) -> list[Pool]:
    """Pools whose dropped channels can be removed from the network.

    Pinned groups have none. Depthwise filters are in no pool: they follow the layers that write their channels.

    Args:
        together: the channels of a group that the same layers write form one pool of these layers, none if one of
            them has no mask (it would keep its channels anyway). Where all layers write all channels, that is one pool
            a group; a shortcut without weights (He et al. 2016, option A) makes several, so that channels compete only
            with those that as many layers vote for. False: every layer is a pool of its own.

    Raises:
        TicketError: a mask that belongs to no group.
    """
    _refuse_unknown(masks, groups)
    pools: list[Pool] = []
    for group in groups:
        rows = [producer.weight for producer in group.producers if producer.weight.name in masks]
        if group.pinned is not None or not rows:
            continue
        if not together:
            pools += [(own,) for own in rows]
        else:
            pools += [pool for pool in by_writers(group) if all(own.name in masks for own in pool)]
    return pools


def _refuse_unknown(masks: Masks, groups: Sequence[ChannelGroup]) -> None:
    """Refuse masks of another network.

    Raises:
        TicketError: a mask that belongs to no group.
    """
    known = {part.name for group in groups for part in (*(p.weight for p in group.producers), *group.shared)}
    for name in masks:
        if name not in known:
            raise TicketError(
                f"mask {name!r} belongs to no layer that writes channels of the traced network",
                expected=f"masks of {', '.join(sorted(p.weight.name for g in groups for p in g.producers)[:4])} …",
                fix="use masks and channel groups of the same network",
            )


def by_writers(group: ChannelGroup) -> list[Pool]:
    """The group's channels parted by which producers write them, in the order of their first channels.

    Channels of one producer that other layers read (packed queries and keys, and values) are parted too.
    """
    layers = [producer.weight for producer in group.producers]
    written = [frozenset(rows.channels) for rows in layers]
    read = [frozenset(columns.channels) for columns in group.consumers]
    parts: dict[tuple[tuple[int, ...], tuple[int, ...]], set[int]] = {}
    for channel in range(group.size):
        writers = tuple(number for number, own in enumerate(written) if channel in own)
        readers = tuple(number for number, own in enumerate(read) if channel in own)
        if writers:
            parts.setdefault((writers, readers), set()).add(channel)
    return [tuple(_only(layers[number], part) for number in writers) for (writers, _), part in parts.items()]


def _only(rows: Slice, part: set[int]) -> Slice:
    return Slice(rows.name, rows.dim, tuple(channel if channel in part else -1 for channel in rows.channels))


def whole(multiple: int = 1) -> Width:
    """Budgets rounded up to whole channels, then up to a multiple of ``multiple``.

    Raises:
        ConfigError: ``multiple`` below 1.
    """
    if multiple < 1:
        raise ConfigError(f"multiple {multiple}", expected="1 or more", fix="use 1 for the paper's rule")
    return lambda budget, size: math.ceil(Fraction(max(1, math.ceil(budget)), multiple)) * multiple


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean ``[c_out]``: the ``count`` largest scores; equal scores go to the lower index."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return kept


@dataclass(frozen=True)
class _Candidates:
    """The channels of one pool: scores ``[group's channels]`` on the CPU, -inf where none of its rows writes one."""

    pool: Pool
    scores: torch.Tensor
    size: int
    weights: Mapping[str, int]  # weights in the pool's rows, by layer

    def budget(self, shares: Mapping[str, float | Fraction]) -> Fraction:
        """How many channels the layers' shares of weights come to, together."""
        total = sum((exact(shares[name]) * count for name, count in self.weights.items()), Fraction(0))
        return total / sum(self.weights.values()) * self.size


def _candidates(pool: Pool, scores: Mapping[str, torch.Tensor], masks: Masks) -> _Candidates:
    size = 1 + max(max(rows.channels) for rows in pool)
    summed, written = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
    weights = {}
    for rows in pool:
        channel = torch.tensor(rows.channels)  # [c_out]
        own = channel >= 0
        score = scores[rows.name].detach().to("cpu", torch.float64)
        if score.shape != (len(channel),) or not bool(torch.isfinite(score).all()):
            raise TicketError(
                f"the channel scores of {rows.name!r} have shape {tuple(score.shape)}, or are not all finite",
                expected=f"finite scores of shape {(len(channel),)}",
                fix="score this network's own channels; where weights are not finite, lower the learning rate",
            )
        summed.index_add_(0, channel[own], score[own])
        written[channel[own]] = True
        mask = masks[rows.name]
        weights[rows.name] = int(own.sum()) * (mask.numel() // len(mask))
    return _Candidates(pool, (summed / len(pool)).masked_fill(~written, -torch.inf), int(written.sum()), weights)


def _ranked_together(candidates: Sequence[_Candidates], share: Fraction) -> list[Fraction]:
    """Budgets in channels such that the kept channels hold the share of all weights, rounded up to a channel."""
    ranked = []
    for number, found in enumerate(candidates):
        own = found.scores[found.scores.isfinite()]
        mean = float(own.mean())
        ordered = (own / mean if mean > 0 else own).sort(descending=True).values.tolist()
        cost = Fraction(sum(found.weights.values()), found.size)
        ranked += [(-score, number, position, cost) for position, score in enumerate(ordered)]
    kept = [1] * len(candidates)  # the best channel of every pool stays
    left = share * sum((cost for *_, cost in ranked), Fraction(0))
    left -= sum((cost for *_, position, cost in ranked if position == 0), Fraction(0))
    for _, number, position, cost in sorted(ranked):
        if left <= 0:
            break
        if position > 0:
            kept[number] += 1
            left -= cost
    return [Fraction(count) for count in kept]


def keep_largest(
    scores: Mapping[str, torch.Tensor], masks: Masks, count: int, spare_best: bool = False
) -> dict[str, torch.Tensor]:
    """The ``count`` entries of the masks with the largest scores, over all layers; of equal scores the later ones.

    Args:
        scores: shaped like the masks.
        masks: what may survive.
        count: all survive if there are no more.
        spare_best: the best entry of every layer survives, at the cost of another.

    Raises:
        TicketError: a score that is not finite.
    """
    alive = [scores[name].detach()[mask.to(scores[name].device)] for name, mask in masks.items()]
    pool = torch.cat(alive)  # [survivors of all layers]
    if not bool(torch.isfinite(pool).all()):
        raise TicketError(
            "scores hold NaN or infinite entries",
            expected="finite scores, of finite weights",
            fix="lower the learning rate and train again",
        )
    if spare_best:
        pool = torch.cat([_with_infinite_best(layer) for layer in alive])
    survives = _largest(pool, min(count, len(pool)))
    found, first = {}, 0
    for (name, mask), layer in zip(masks.items(), alive, strict=True):
        found[name] = mask.clone()
        found[name][mask] = survives[first : first + len(layer)].to(mask.device)
        first += len(layer)
    return found


def _with_infinite_best(layer: torch.Tensor) -> torch.Tensor:
    best = layer.clone()
    if len(layer):
        best[layer.argmax()] = torch.inf
    return best


def _largest(pool: torch.Tensor, count: int) -> torch.Tensor:
    """Bool ``[n]``: the ``count`` largest; of equal ones the later. Selection, not a sort, where there is one."""
    pruned = len(pool) - count
    if pruned == 0 or count == 0:
        return torch.full((len(pool),), count > 0, dtype=torch.bool, device=pool.device)
    on_cpu = pool.device.type == "cpu"  # elsewhere kthvalue is not deterministic
    threshold = pool.kthvalue(pruned).values if on_cpu else pool.sort().values[pruned - 1]
    survives = pool > threshold
    ties = (pool == threshold).nonzero().flatten()
    survives[ties[len(ties) - (count - int(survives.sum())) :]] = True
    return survives
