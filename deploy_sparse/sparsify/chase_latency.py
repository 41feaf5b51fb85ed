"""Chase towards a latency instead of a share of the channels: what goes is what saves time at the least cost.

The published method (Yin et al. 2023) removes the lowest scores over all layers, whatever they cost. Here the cubic
schedule leads the network's time from that of the dense one to the budget, and at every step the channels that stay
are those worth the most within the time (:mod:`allocation`), among the channels that are left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..structure import ChannelGroup, Masks
from .allocation import Allocation, LatencyBudget, allocate, problem_of, uniform
from .channel_schedule import ChannelSchedule
from .chase import Chase
from .coupling import ChannelPool, remove_
from .distribution import exact
from .dst import Spread
from .exploration import Exploration
from .patterns import top
from .umm import pool_scores


class LatencyChase(Chase):
    """Masks that move, and channels that go until a latency is met.

    Args:
        masks, exploration, pools, schedule, criterion, distribution, seed, macs: as :class:`Chase` has them; of the
            schedule only when channels go and how fast: its share of channels plays no part.
        groups: the traced network's channel groups, which the pools were made from.
        latency: limit and times.
        floor: β, what a pool keeps at least, as a share of what it would keep if all kept the same share within the
            budget.

    Raises:
        ConfigError: besides what the base refuses, a budget below the least time that the pools can reach.
    """

    def __init__(
        self,
        masks: Masks,
        exploration: Exploration,
        pools: Sequence[ChannelPool],
        schedule: ChannelSchedule,
        groups: Sequence[ChannelGroup],
        latency: LatencyBudget,
        *,
        criterion: str = "umm",
        floor: float = 0.2,
        distribution: Spread = "erk",
        seed: int = 0,
        macs: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(
            masks,
            exploration,
            pools,
            schedule,
            criterion=criterion,
            floor=0.0,
            distribution=distribution,
            seed=seed,
            macs=macs,
        )
        self.groups, self.latency = tuple(groups), latency
        alike = [torch.ones(pool.size, dtype=torch.float64) for pool in self.pools]
        even = uniform(problem_of(self.pools, self.groups, alike, latency))
        self._floors = [max(1, math.floor(kept * exact(floor))) for kept in even.kept]
        self.dense_ms = even.dense_ms
        self._allocation(alike, latency.ms)  # refuses a budget that cannot be met before any step

    def _prunes(self, taken: int) -> bool:
        return self.schedule.due(taken)

    def _prune_(self, taken: int) -> None:
        """Remove what does not fit into the time that the schedule leaves."""
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        scores = [pool_scores(pool, self.criterion, weights, self.masks).clamp(min=0.0) for pool in self.pools]
        alive = [~removed for removed in self._removed]
        scores = [score.where(left, 0.0) for score, left in zip(scores, alive, strict=True)]
        done = self.schedule.target(taken) / self.schedule.sparsity  # 0 at the start, 1 at T2
        limit = self.dense_ms - done * (self.dense_ms - self.latency.ms)
        found = self._allocation(scores, limit)
        for pool, removed, score, left, count in zip(self.pools, self._removed, scores, alive, found.kept, strict=True):
            gone = left & ~top(score.masked_fill(~left, -1.0), count)
            if bool(gone.any()):
                remove_(self.masks, pool, gone)
                remove_(self._allowed, pool, gone)
                removed |= gone

    def _allocation(self, scores: Sequence[torch.Tensor], limit: float) -> Allocation:
        most = [int((~removed).sum()) for removed in self._removed]
        budget = replace(self.latency, ms=limit)
        return allocate(problem_of(self.pools, self.groups, scores, budget, least=self._floors, most=most))
