"""Which channels a form of a suite keeps: the same share everywhere, as magnitude pruning leaves them, or Chase's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import nn

from ..errors import ConfigError
from ..sparsify.channel_schedule import floors, lowest, share_of
from ..sparsify.coupling import ChannelPool, Coupling, channel_pools, part_names, remove_
from ..sparsify.distribution import exact
from ..sparsify.imp import dense_masks, head_of
from ..sparsify.oneshot import source_masks
from ..sparsify.patterns import top
from ..sparsify.silence import silence
from ..sparsify.umm import pool_scores
from ..surgery.graph import channel_groups
from .config import Form


def channel_masks(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], form: Form, multiple: int
) -> dict[str, torch.Tensor]:
    """Masks under which every channel is whole or silent, so that surgery can cut it.

    Channels that the same layers write stay or go together. In every pool those with the largest mean magnitude stay.

    * ``"even"``: ``⌈keep · C⌉`` of every pool's C channels.
    * ``"magnitude"``: a pool has the share of its weights that global magnitude pruning to ``keep`` leaves, as refill
      (Chen et al. 2022, section 3.2) takes it over from an unstructured mask.
    * ``"chase"``: the lowest scores of all pools together go until ``keep`` of all their channels is left, none below
      its floor (Yin et al. 2023).

    What stays is rounded up to ``multiple``, never above the pool's size.

    Args:
        model: with the weights that decide.
        inputs: positional inputs, batch first.
        form: of structure ``"channels"``.
        multiple: of the widths.

    Raises:
        ConfigError: no layer can be narrowed, or nothing goes.
        SurgeryError: a network that cannot be traced.
    """
    groups = channel_groups(model, inputs)
    prunable = dense_masks(model)
    coupling: Coupling = "internal" if form.layers == "inner" else "prune_skip"
    pools = channel_pools(prunable, groups, coupling, head=head_of(model))
    if not pools:
        raise ConfigError(
            f"no channels of layers = {form.layers!r} can go",
            expected="a network with layers that can be narrowed",
            fix="take layers = 'all', or structure = 'blocks'",
        )
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    scores = [pool_scores(pool, "umm", weights, prunable) for pool in pools]
    masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in part_names(pools)}
    for pool, score, count in zip(pools, scores, _kept(model, pools, scores, prunable, form), strict=True):
        aligned = min(pool.size, math.ceil(count / multiple) * multiple)
        remove_(masks, pool, ~top(score, aligned))
    if all(bool(mask.all()) for mask in masks.values()):
        raise ConfigError(
            f"keep = {form.keep}, by which no channel goes once widths are in multiples of {multiple}",
            expected="a network that loses at least one channel",
            fix="a smaller keep, or a smaller multiple",
        )
    return silence(masks, weights, groups)


def _kept(
    model: nn.Module,
    pools: tuple[ChannelPool, ...],
    scores: list[torch.Tensor],
    prunable: Mapping[str, torch.Tensor],
    form: Form,
) -> list[int]:
    """How many channels of every pool stay, before widths are rounded up."""
    keep = exact(form.keep or 1.0)
    if form.rule == "even":
        return [math.ceil(keep * pool.size) for pool in pools]
    if form.rule == "chase":
        sparsity = float(1 - keep)
        alive = [torch.ones(pool.size, dtype=torch.bool) for pool in pools]
        sizes = [pool.size for pool in pools]
        going = lowest(scores, alive, share_of(sparsity, sum(sizes)), floors(sizes, sparsity, form.floor))
        return [pool.size - int(gone.sum()) for pool, gone in zip(pools, going, strict=True)]
    left = source_masks("magnitude", model, prunable, float(keep), distribution="global")
    return [max(1, math.ceil(_share(pool, left) * pool.size)) for pool in pools]


def _share(pool: ChannelPool, left: Mapping[str, torch.Tensor]) -> Fraction:
    """The share of the pool's own rows of weights that survive."""
    survive = places = 0
    for rows in pool.writers:
        own = left[rows.name].movedim(rows.dim, 0)[torch.tensor(rows.channels) >= 0]
        survive, places = survive + int(own.sum()), places + own.numel()
    return Fraction(survive, places)
