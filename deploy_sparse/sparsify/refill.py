"""Refill: an unstructured ticket becomes a channel-wise one (Chen et al. 2022, section 3.2 and Algorithm 2).

The kept channels are filled up whole, the others vanish. A pure function of the round's masks and trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch

from ..errors import ConfigError
from ..structure import ChannelGroup, Masks
from .allocation import Allocation, LatencyBudget, allocate, problem_of, silent_masks
from .channel_scores import weight_l1
from .coupling import channel_pools
from .distribution import exact
from .patterns import Pool, Width, channels, row_pools, silent_pools, whole
from .silence import silence
from .worth import mean_scores

Coupling = Literal["layer", "group"]
Budget = Literal["paper", "code", "latency"]


def refill(
    masks: Masks,
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[ChannelGroup],
    *,
    scores: Mapping[str, torch.Tensor] | None = None,
    shares: Mapping[str, Fraction | float] | None = None,
    coupling: Coupling = "layer",
    multiple: int = 1,
    extra: float = 0.0,
    budget: Budget = "paper",
    latency: LatencyBudget | None = None,
    silent: bool = True,
) -> dict[str, torch.Tensor]:
    """Channel-wise masks at the density of the given ones, or within a latency.

    A layer of c_out channels with n weights each and N survivors has a budget of q = N / n channels and keeps
    max(1, ⌈q⌉) of them: those with the largest scores, ties by index.

    Args:
        masks: an IMP round's masks; only layers with a mask lose channels.
        weights: the same round's trained weights.
        groups: the network's channel groups; with ``silent=False`` and ``coupling="layer"`` there may be none.
        scores: ``[c_out]`` by weight name, from :func:`channel_scores.channel_scores`; by default the ℓ1 norm of the
            surviving weights, which the paper found best (Fig. A8).
        shares: by weight name, the share of the layer's rows to keep, in [0, 1] and not rounded: q is this share of
            c_out. By default the mask's own density.
        coupling: ``"layer"``, the paper's rule: each layer chooses its own channels, so a residual stream keeps the
            union of what its layers keep. ``"group"``: layers that write one residual stream choose together, by the
            mean of their scores and at their common density, so that the stream itself gets narrower. Where some
            write only a part of its channels, every part that the same layers write has a budget of its own.
        multiple: round the number of kept channels up to this multiple (never above c_out); 1 is the paper's rule.
        extra: refill+: the share of the dropped channels that is taken back, so that the budget is
            q + extra · (c_out - q).
        budget: ``"paper"`` rounds the budget up, ``"code"`` keeps one more than it rounded down, as the public code
            does; they differ where the budget is a whole number. ``"latency"``: the masks' densities do not matter;
            channels are kept so that what is kept is worth the most within ``latency`` (:mod:`allocation`), chosen
            together in every group.
        latency: for ``budget="latency"``: limit, times and the multiple of channels.
        silent: True: with a channel's row go its bias and the scale and shift of its norm, and, once every layer
            writing the channel dropped it, the columns that read it. So the channel is zero everywhere and can be cut
            out without changing the function. Channels that something else in the network needs (pinned groups) stay
            whole, and depthwise filters stay exactly where their channel does. False, the published variant: rows of
            weights are masked and nothing else, in every layer, depthwise ones included, at its own density.

    Returns:
        masks by parameter name, for weights and, when silent, for biases and norms too. Every row is empty, or whole
        but for the input channels that their producers let go.

    Raises:
        TicketError: a mask that belongs to no layer of any group, or scores that do not fit.
        ConfigError: ``multiple`` below 1, ``extra`` or a share outside [0, 1], a missing share, or an unknown
            coupling or budget; a latency without its budget or the other way round, one that cannot be met, or what
            does not go with it.
    """
    _refuse_unknown("coupling", coupling, ("layer", "group"))
    _refuse_unknown("budget", budget, get_args(Budget))
    if (budget == "latency") != (latency is not None):
        raise ConfigError(
            f"budget {budget!r} with{'out' * (latency is None)} a latency",
            expected="latency=LatencyBudget(…) with budget 'latency', and with no other",
            fix="give both or none",
        )
    if latency is not None:
        _refuse_with_latency(coupling, multiple, extra, silent, shares)
        return refill_within(masks, weights, groups, latency, scores=scores)[0]
    if scores is None:
        scores = {name: weight_l1(weights[name], mask) for name, mask in masks.items()}
    own = _densities(masks) if shares is None else _given(shares, masks)
    pools = _pools(masks, groups, together=coupling == "group", silent=silent)
    rows = channels(scores, masks, own, pools, width=_width(extra, budget, multiple))
    return silence(rows, weights, groups) if silent else rows


def refill_within(
    masks: Masks,
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[ChannelGroup],
    latency: LatencyBudget,
    *,
    scores: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], Allocation]:
    """:func:`refill` with ``budget="latency"``, and what was allocated; masks of Trues make it one-shot pruning.

    Raises:
        TicketError: a mask that belongs to no layer of any group, or scores that do not fit.
        ConfigError: nothing may go, or the least time is above the budget.
    """
    silent_pools(masks, groups, together=True)  # refuses masks of another network
    if scores is None:
        scores = {name: weight_l1(weights[name], mask) for name, mask in masks.items()}
    pools = channel_pools(masks, groups, "prune_skip")
    problem = problem_of(pools, groups, mean_scores(pools, scores), latency)
    found = allocate(problem)
    return silent_masks(problem, found, masks, weights, groups), found


@dataclass(frozen=True)
class LayerChange:
    """What refill (or any other change of structure) made of one layer.

    Attributes:
        layer: the weight's name.
        kept: output channels with a surviving weight.
        channels: all its output channels, c_out.
        before: density of its mask before.
        refilled: share of its weights in kept channels, the papers' "remaining weights".
        after: density of its mask, which no longer counts input channels that their producers let go.
        partly_filled: kept channels that lack a position which another kept channel has; 0 after refill.
    """

    layer: str
    kept: int
    channels: int
    before: float
    refilled: float
    after: float
    partly_filled: int


def refill_report(before: Masks, after: Masks) -> tuple[LayerChange, ...]:
    """One entry for each weight that is masked before and after, in order."""
    found = []
    for name, old in before.items():
        if name not in after or old.dim() < 2:
            continue
        cells = after[name].reshape(len(old), -1)  # [c_out, n]
        kept = cells.any(dim=1)
        partly = int((cells[kept] != cells.any(dim=0)).any(dim=1).sum())
        shares = (float(old.float().mean()), int(kept.sum()) / len(old), float(cells.float().mean()))
        found.append(LayerChange(name, int(kept.sum()), len(old), *shares, partly))
    return tuple(found)


def _pools(masks: Masks, groups: Sequence[ChannelGroup], *, together: bool, silent: bool) -> list[Pool]:
    if silent:
        return silent_pools(masks, groups, together=together)
    if not together:
        return row_pools(masks)
    joint = silent_pools(masks, groups, together=True)
    taken = {rows.name for pool in joint for rows in pool}
    return joint + row_pools({name: mask for name, mask in masks.items() if name not in taken})


def _densities(masks: Masks) -> dict[str, Fraction]:
    return {name: Fraction(int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def _given(shares: Mapping[str, Fraction | float], masks: Masks) -> dict[str, Fraction]:
    for name in masks:
        if name not in shares or not 0 <= shares[name] <= 1:
            raise ConfigError(
                f"share {shares[name]} of {name!r}" if name in shares else f"no share for {name!r}",
                expected="for every mask the share of its rows to keep, in [0, 1]",
                fix="give one for each mask, or leave shares out: the masks' own densities",
            )
    return {name: exact(shares[name]) for name in masks}


def _width(extra: float, budget: Budget, multiple: int) -> Width:
    if not 0.0 <= extra <= 1.0:
        raise ConfigError(f"extra {extra}", expected="a number in [0, 1]", fix="0 is refill, more is refill+")
    rounded, share = whole(multiple), exact(extra)

    def width(channels: Fraction, size: int) -> int:
        softened = channels + share * (size - channels)
        return rounded(softened if budget == "paper" else Fraction(math.floor(softened) + 1), size)

    return width


def _refuse_unknown(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(f"{what} {given!r}", expected=f"one of {', '.join(known)}", fix="choose one of them")


def _refuse_with_latency(coupling: str, multiple: int, extra: float, silent: bool, shares: object) -> None:
    others = (
        (f"coupling {coupling!r}", coupling != "group", "coupling 'group': a latency is that of whole groups"),
        (f"multiple {multiple}", multiple != 1, "the multiple in latency=LatencyBudget(multiple=…)"),
        (f"extra {extra}", extra != 0, "extra 0: a latency says how many channels stay"),
        ("silent=False", not silent, "silent=True: channels that are not silent cannot be cut, and save no time"),
        ("shares", shares is not None, "no shares: a latency says how many channels stay"),
    )
    for given, wrong, expected in others:
        if wrong:
            raise ConfigError(f"{given} with budget 'latency'", expected=expected, fix="change one of the two")
