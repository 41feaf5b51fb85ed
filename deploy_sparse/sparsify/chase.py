"""Chase: channels that dynamic sparse training empties are removed while it goes on (Yin et al. 2023).

Sparse training with global exploration under a soft memory bound; the channels with the lowest score go step by step,
for good, and the weights they held grow elsewhere at the next update. So the budget of weights stays, in fewer
channels, until these have no more room: then every weight that is left is used, and what is left is a dense network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import ConfigError, TicketError, nearest
from ..structure import Masks
from .channel_schedule import ChannelSchedule, floors, lowest, share_of
from .coupling import ChannelPool, part_names, remove_
from .dst import DynamicMasks, Spread
from .exploration import Exploration
from .umm import CHANNEL_SCORES, pool_scores


class Chase(DynamicMasks):
    """Masks that move, and channels that go.

    Args:
        masks, exploration, distribution, seed, macs: as :class:`DynamicMasks` has them.
        pools: the channels that may go (:func:`coupling.channel_pools`).
        schedule: how many are gone when.
        criterion: the channel score, one of :data:`umm.CHANNEL_SCORES`.
        floor: β, what a pool keeps at least, as a share of its even part of the channels that stay.

    Raises:
        ConfigError: an unknown criterion, nothing that may go, or floors that keep more than may stay.
    """

    def __init__(
        self,
        masks: Masks,
        exploration: Exploration,
        pools: Sequence[ChannelPool],
        schedule: ChannelSchedule,
        *,
        criterion: str = "umm",
        floor: float = 0.2,
        distribution: Spread = "erk",
        seed: int = 0,
        macs: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(masks, exploration, distribution=distribution, seed=seed, macs=macs)
        if criterion not in CHANNEL_SCORES:
            raise ConfigError(
                f"unknown channel score {criterion!r}",
                expected=f"one of {', '.join(CHANNEL_SCORES)}",
                fix=f"{nearest(criterion, list(CHANNEL_SCORES))}mend the name",
            )
        if schedule.sparsity > 0 and not pools:
            raise ConfigError(
                f"channel sparsity {schedule.sparsity} for a network without channels that may go",
                expected="layers whose channels only layers of this network read",
                fix="prune_skip couples the residual stream too; or choose channel sparsity 0",
            )
        self.pools, self.schedule, self.criterion = tuple(pools), schedule, criterion
        if schedule.sparsity > 0 and len(schedule.events()) < 2:
            raise ConfigError(
                f"channels to remove every {schedule.interval} steps, and the last ones after step {schedule.until}",
                expected="more than one removal, since channels go step by step",
                fix="remove them at shorter intervals, or train longer",
            )
        self._floors = floors([pool.size for pool in self.pools], schedule.sparsity, floor)
        self._removed = [torch.zeros(pool.size, dtype=torch.bool) for pool in self.pools]

    @property
    def channels(self) -> int:
        """N0, the number of channels that may go."""
        return sum(pool.size for pool in self.pools)

    def start_(self, model: nn.Module) -> None:
        """As the base does; what goes with channels (biases, norms, readers without a mask) gets masks of its own.

        Raises:
            TicketError: besides what the base refuses, a part of a channel that layers share.
        """
        if self.schedule.sparsity > 0:
            parameters = dict(model.named_parameters())
            for name in part_names(self.pools):
                if name not in parameters:
                    raise TicketError(
                        f"{name!r}, which reads or scales channels that may go, is no parameter of its own",
                        expected="a network whose layers share no parameter",
                        fix="give each layer its own, or choose channel sparsity 0",
                    )
                if name not in self.masks:
                    self.masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
        super().start_(model)

    def ready(self, step: int) -> bool:
        """Whether all channels are gone that are to go, besides what the base asks."""
        return super().ready(step) and (self.schedule.sparsity == 0 or step + 1 >= self.schedule.until)

    def figures(self) -> dict[str, float]:
        """The base's, and ``channels_left``, the share of the channels that might go and are there."""
        gone = sum(int(removed.sum()) for removed in self._removed)
        return {**super().figures(), "channels_left": round(1 - gone / self.channels, 6) if self.channels else 1.0}

    def state(self) -> dict[str, torch.Tensor]:
        """The base's, and which channels are gone."""
        return {**super().state(), **{f"removed/{n}": removed for n, removed in enumerate(self._removed)}}

    def restore_(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        super().restore_(state)
        self._removed = [state[f"removed/{n}"].clone() for n in range(len(self.pools))]

    def _due(self, taken: int) -> bool:
        return super()._due(taken) or self._corrects(taken)

    def _listens(self, taken: int) -> bool:
        if super()._listens(taken):
            return True
        ahead = range(self.exploration.gradient_batches)
        return self.exploration.growth == "gradient" and any(self._corrects(taken + later) for later in ahead)

    def _corrects(self, taken: int) -> bool:
        """The last removal; what it takes from the budget grows again at once, for no update may follow."""
        return self.schedule.sparsity > 0 and taken == self.schedule.until

    def _prunes(self, taken: int) -> bool:
        return self.schedule.due(taken) and self._to_remove(taken) > 0

    def _to_remove(self, taken: int) -> int:
        """How many channels more are there than the schedule wants."""
        gone = sum(int(removed.sum()) for removed in self._removed)
        return share_of(self.schedule.target(taken), self.channels) - gone

    def _prune_(self, taken: int) -> None:
        """Remove the channels with the lowest scores, as many as the schedule asks."""
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        scores = [pool_scores(pool, self.criterion, weights, self.masks) for pool in self.pools]
        alive = [~removed for removed in self._removed]
        going = lowest(scores, alive, self._to_remove(taken), self._floors)
        for pool, removed, gone in zip(self.pools, self._removed, going, strict=True):
            if bool(gone.any()):
                remove_(self.masks, pool, gone)
                remove_(self._allowed, pool, gone)
                removed |= gone
