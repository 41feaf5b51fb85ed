"""What keeping channels is worth: scores of layers that differ in scale, made into one figure to be made large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from ..errors import ConfigError, TicketError, nearest
from .coupling import ChannelPool

Worth = Literal["product", "share", "channels", "raw"]
WORTHS: tuple[Worth, ...] = get_args(Worth)
"""By name, the default first."""

_EMPTY = 1e-9  # of a share of nothing, so that its logarithm exists


def mean_scores(pools: Sequence[ChannelPool], scores: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A channel's score: the mean over the layers that write it, float64 ``[size]`` on the CPU for every pool.

    Args:
        pools: channels that are chosen together.
        scores: ``[c_out]`` by weight name (:func:`channel_scores.channel_scores`).

    Raises:
        TicketError: scores of another length.
    """
    found = []
    for pool in pools:
        total = torch.zeros(pool.size, dtype=torch.float64)
        for rows in pool.writers:
            channel, score = torch.tensor(rows.channels), scores[rows.name].detach().to("cpu", torch.float64)
            own = channel >= 0
            if score.shape != channel.shape:
                raise TicketError(
                    f"the channel scores of {rows.name!r} have shape {tuple(score.shape)}",
                    expected=f"one score for each of its rows: {tuple(channel.shape)}",
                    fix="score this network's own channels",
                )
            total.index_add_(0, channel[own], score[own])
        found.append(total / len(pool.writers))
    return found


def kept_worth(pool: ChannelPool, scores: torch.Tensor, counts: Sequence[int], worth: Worth) -> list[float]:
    """What it is worth to keep the best ``counts`` channels of a pool.

    Scores such as ℓ1 norms do not compare across layers: a layer with more or larger weights has larger ones. So with
    s the share of the pool's summed score that is kept, and p the pool's part of the channels of the layers that write
    it (:func:`part_of`: 1 but where layers write several pools):

    * ``"product"``: p · log s. The sum over the network is the logarithm of the product of what the pools keep: as
      signals pass through all of them in turn, a pool that loses nearly everything costs more than many that lose
      little, and none is emptied to keep another whole.
    * ``"share"``: p · s, the sum of the kept shares.
    * ``"channels"``: size · s, each channel's score in units of its pool's mean, as one threshold over all layers
      compares them.
    * ``"raw"``: the kept scores as they are, summed over the layers that write the pool, for scores that compare by
      themselves: HALP's choice (Shen et al. 2022), whose Taylor scores estimate the change of the loss, as
      ``"saliency"`` does.

    Args:
        pool: whose channels.
        scores: ``[size]``, not negative; channels that are gone score 0.
        counts: how many channels stay, any number of cases.

    Raises:
        ConfigError: an unknown worth.
    """
    if worth not in WORTHS:
        raise ConfigError(
            f"worth {worth!r}", expected=f"one of {', '.join(WORTHS)}", fix=f"{nearest(worth, WORTHS)}mend the name"
        )
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), scores.sort(descending=True).values.cumsum(0)])
    total = float(sums[-1])
    kept = sums[torch.tensor(list(counts))]  # [cases]
    if worth == "raw":
        return [len(pool.writers) * value for value in kept.tolist()]
    share = kept / total if total > 0 else torch.tensor(list(counts), dtype=torch.float64) / pool.size
    if worth == "product":
        share = share.clamp(min=_EMPTY).log()
    weight = pool.size if worth == "channels" else part_of(pool)
    return [weight * value for value in share.tolist()]


def part_of(pool: ChannelPool) -> float:
    """The mean part that a pool is of the channels of the layers that write it."""
    return sum(pool.size / len(rows.channels) for rows in pool.writers) / len(pool.writers)
