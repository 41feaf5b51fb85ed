"""When Chase removes how many channels, and which: the cubic schedule, layer floors and the choice of the lowest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ..errors import ConfigError, TicketError
from .distribution import exact


@dataclass(frozen=True)
class ChannelSchedule:
    """The share of removed channels over the steps taken (Yin et al. 2023; gradual magnitude pruning's cubic).

    Removals sit ``offset`` steps before the multiples of ``interval``, so that they fall half-way between two updates
    of the weights' masks. A last one at ``until`` makes the share exactly ``sparsity``, which the released code misses.

    Attributes:
        sparsity: S_c, the share of the channels removed at the end, in [0, 1).
        interval: ΔT, steps between removals.
        offset: steps; the paper's is half the interval between mask updates.
        until: T2, the step after which nothing is removed.

    Raises:
        ConfigError: ``sparsity`` outside [0, 1), or steps that are none.
    """

    sparsity: float
    interval: int
    offset: int
    until: int

    def __post_init__(self) -> None:
        _refuse_sparsity(self.sparsity)
        for what, steps, least in (
            ("interval", self.interval, 1),
            ("offset", self.offset, 0),
            ("until", self.until, 1),
        ):
            if steps < least:
                raise ConfigError(
                    f"{what} {steps} of the channel schedule",
                    expected=f"{least} or more steps",
                    fix="train longer, or choose channel sparsity 0 to remove none",
                )

    def target(self, taken: int) -> float:
        """``c(t) = S_c (1 - (1 - t/T2)³)`` after ``taken`` optimizer steps, S_c from T2 on."""
        if taken >= self.until:
            return self.sparsity
        return self.sparsity * (1.0 - (1.0 - taken / self.until) ** 3)

    def due(self, taken: int) -> bool:
        """Whether channels go after ``taken`` optimizer steps (from 1)."""
        if self.sparsity == 0:
            return False
        return taken == self.until or (taken < self.until and (taken + self.offset) % self.interval == 0)

    def events(self) -> tuple[int, ...]:
        """All ``taken`` at which channels go, ascending; the last is ``until``."""
        if self.sparsity == 0:
            return ()
        first = self.interval - self.offset % self.interval
        return (*range(first, self.until, self.interval), self.until)


def share_of(share: float, channels: int) -> int:
    """A share of ``channels`` as a whole number, halves rounded up."""
    return math.floor(exact(share) * channels + Fraction(1, 2))


def floors(sizes: Sequence[int], sparsity: float, ratio: float) -> list[int]:
    """How many channels every pool keeps at least: ``max(1, ⌊C · (1 - S_c) · β⌋)``, against layer collapse.

    Args:
        sizes: C, the pools' channels before anything is removed.
        sparsity: S_c, the share of all channels removed in the end, in [0, 1).
        ratio: β in [0, 1]; 0 lets every pool shrink to one channel, 1 keeps them all near the same share.

    Raises:
        ConfigError: ``sparsity`` or ``ratio`` out of range, or floors that keep more than may stay.
    """
    _refuse_sparsity(sparsity)
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"floor ratio {ratio}", expected="a number in [0, 1]", fix="the paper's are 0.2 and 0.5")
    kept = [max(1, math.floor(size * (1 - exact(sparsity)) * exact(ratio))) for size in sizes]
    stays = sum(sizes) - share_of(sparsity, sum(sizes))
    if sum(kept) > stays:
        raise ConfigError(
            f"channel sparsity {sparsity} leaves {stays} of {sum(sizes)} channels, for {len(kept)} layers that keep "
            f"{sum(kept)} at least",
            expected="at least one channel in every layer",
            fix="remove a smaller share of the channels, or use a wider network",
        )
    return kept


def lowest(
    scores: Sequence[torch.Tensor], alive: Sequence[torch.Tensor], count: int, floors: Sequence[int]
) -> list[torch.Tensor]:
    """The channels to remove: those with the lowest scores over all pools, none below its pool's floor.

    The published loop (take the lowest, let the layers that hit their floor keep their best, hand the shortfall to the
    others, until none hits its floor) ends with these; but here the number is exact, and ties go by pool, then channel.

    Args:
        scores: float ``[C]`` for every pool, on one device, any.
        alive: bool ``[C]`` for every pool: the channels that are still there.
        count: how many go.
        floors: how many of its channels every pool keeps at least.

    Returns:
        bool ``[C]`` for every pool, True goes, on the device of its ``alive``.

    Raises:
        TicketError: the score of an alive channel is not finite, or fewer than ``count`` may go.
    """
    left = [max(0, int(pool.sum()) - floor) for pool, floor in zip(alive, floors, strict=True)]
    if not 0 <= count <= sum(left):
        raise TicketError(
            f"{count} channels to remove, of {sum(int(pool.sum()) for pool in alive)} that are left",
            expected=f"0 to {sum(left)}, or fewer than its floor would be left of some layer",
            fix="remove a smaller share of the channels, or lower the floors",
        )
    if count == 0:
        return [torch.zeros_like(pool) for pool in alive]
    joined = torch.cat([score.detach().to(torch.float64) for score in scores]).cpu()  # one transfer
    there, sizes = torch.cat([pool.cpu() for pool in alive]), [len(pool) for pool in alive]
    if not bool(torch.isfinite(joined[there]).all()):
        raise TicketError(
            "channel scores hold NaN or infinite entries",
            expected="finite scores, of finite weights",
            fix="lower the learning rate and train again",
        )
    candidates = []  # of every pool the lowest that its floor lets go
    first = 0
    for score, pool, may_go in zip(torch.split(joined, sizes), torch.split(there, sizes), left, strict=True):
        own = pool.nonzero().flatten()
        candidates.append(first + own[score[own].argsort(stable=True)[:may_go]])
        first += len(pool)
    places = torch.cat(candidates)  # equal scores stand by pool, then by channel, and a stable sort leaves them so
    gone = torch.zeros_like(there)
    gone[places[joined[places].argsort(stable=True)[:count]]] = True
    return [own.to(pool.device) for own, pool in zip(torch.split(gone, sizes), alive, strict=True)]


def _refuse_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(
            f"channel sparsity {sparsity}", expected="a number in [0, 1)", fix="0 removes no channels, 0.5 every other"
        )
