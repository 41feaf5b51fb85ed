"""How connectivity moves in dynamic sparse training: when, how many weights, and which ones grow. Pure numbers.

Time is ``taken``, the number of optimizer steps taken so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import ConfigError, nearest

Growth = Literal["gradient", "random"]
Scope = Literal["layer", "global"]
Decay = Literal["cosine", "constant"]
Preset = Literal["set", "rigl", "set-itop", "rigl-itop", "mest", "chase"]


@dataclass(frozen=True)
class SoftBound:
    """A surplus of weights that may be held between updates: grow first, prune afterwards (Yuan et al. 2021, MEST).

    Attributes:
        surplus: at the start, as a share of all weights.
        until: the step at which everything above the budget goes.
        final: the share that the surplus falls to just before, by a cosine.
    """

    surplus: float
    until: int
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.final <= self.surplus < 1.0 or self.until < 1:
            raise ConfigError(
                f"a soft bound from {self.surplus} to {self.final} until step {self.until}",
                expected="0 <= final <= surplus < 1, and a step of 1 or more",
                fix="for example a surplus of 0.05 that ends at 0",
            )

    def at(self, taken: int) -> float:
        """The surplus, as a share of all weights; zero from ``until`` on."""
        if taken >= self.until:
            return 0.0
        return self.final + (self.surplus - self.final) * _cosine(taken, self.until)


@dataclass(frozen=True)
class Exploration:
    """Updates of the connectivity: drop the smallest weights, grow others.

    Attributes:
        interval: steps between updates.
        stop: no update from this step on, but the one that ends a soft bound.
        offset: steps by which all updates are later, so that one an epoch need not fall on the epoch's last step,
            after which the network is validated.
        growth: ``"gradient"``: where the dense gradient is largest (RigL); ``"random"`` (SET).
        scope: ``"layer"``: every layer keeps its number of weights; ``"global"``: all layers are one pool.
        fraction: of the budget that an update drops and grows again, at the start.
        final_fraction: the same at ``period``.
        decay: how the fraction falls: by a cosine, or not.
        period: steps over which it falls; 0 for ``stop``.
        soft: a surplus between updates. While it lasts, an update drops what is above the budget and grows the surplus
            anew, instead of the fraction.
        gradient_batches: the dense gradient is averaged over this many batches before an update.
    """

    interval: int
    stop: int
    growth: Growth = "gradient"
    scope: Scope = "layer"
    fraction: float = 0.3
    final_fraction: float = 0.0
    decay: Decay = "cosine"
    period: int = 0
    soft: SoftBound | None = None
    gradient_batches: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        for name, value in (("interval", self.interval), ("stop", self.stop), ("batches", self.gradient_batches)):
            if value < 1:
                raise ConfigError(f"{name} {value} of an exploration", expected="1 or more", fix="count in steps")
        if not 0 <= self.offset < self.interval:
            raise ConfigError(
                f"offset {self.offset} of updates every {self.interval} steps",
                expected="0 or more, and less than the interval",
                fix="leave it out",
            )
        if not 0.0 <= self.final_fraction <= self.fraction <= 1.0:
            raise ConfigError(
                f"fractions from {self.fraction} to {self.final_fraction}",
                expected="1 >= fraction >= final fraction >= 0",
                fix="RigL's are 0.3 and 0",
            )
        if self.gradient_batches > self.interval:
            raise ConfigError(
                f"gradients averaged over {self.gradient_batches} batches every {self.interval} steps",
                expected="at most as many batches as steps",
                fix="average over fewer batches, or update less often",
            )
        for name, word, known in (
            ("growth", self.growth, get_args(Growth)),
            ("scope", self.scope, get_args(Scope)),
            ("decay", self.decay, get_args(Decay)),
        ):
            if word not in known:
                raise ConfigError(
                    f"unknown {name} {word!r}",
                    expected=f"one of {', '.join(known)}",
                    fix=f"{nearest(word, known)}mend the name",
                )

    def every(self, interval: int) -> Exploration:
        """The same with another interval."""
        return replace(self, interval=interval, offset=min(self.offset, max(0, interval - 1)))

    def due(self, taken: int) -> bool:
        """Whether the connectivity is updated after this step."""
        settles = self.soft is not None and taken == self.soft.until
        return settles or (self.offset < taken < self.stop and (taken - self.offset) % self.interval == 0)

    def moves(self, total: int) -> bool:
        """Whether weights drop and grow at all in a training of ``total`` steps."""
        return self.interval + self.offset < min(self.stop, total)

    def listens(self, taken: int) -> bool:
        """Whether this step's gradient counts for an update."""
        return self.growth == "gradient" and any(self.due(taken + later) for later in range(self.gradient_batches))

    def fraction_at(self, taken: int) -> float:
        """The share of the budget that an update at this step drops."""
        if self.decay == "constant":
            return self.fraction
        return self.final_fraction + (self.fraction - self.final_fraction) * _cosine(taken, self.period or self.stop)

    def bounds(self, taken: int, budget: int, high: int) -> tuple[int, int]:
        """To how many weights an update at this step drops, and to how many it grows.

        Args:
            budget: number of weights.
            high: the same with the soft bound's surplus.
        """
        if self.soft is not None and taken <= self.soft.until:
            return budget, max(budget, high)
        return budget - math.ceil(self.fraction_at(taken) * budget), budget


def _cosine(taken: int, period: int) -> float:
    """From 1 to 0 over the period."""
    return 0.5 * (1.0 + math.cos(math.pi * min(taken, period) / period))


def _set(epoch: int, total: int) -> Exploration:
    return Exploration(epoch, total, growth="random", fraction=0.5, decay="constant", offset=min(1, epoch - 1))


def _rigl(epoch: int, total: int) -> Exploration:
    return Exploration(100, max(1, round(0.75 * total)), fraction=0.3)


def _set_itop(epoch: int, total: int) -> Exploration:
    return Exploration(1500, total, growth="random", fraction=0.5, final_fraction=0.005)


def _rigl_itop(epoch: int, total: int) -> Exploration:
    return Exploration(4000, total, fraction=0.5, final_fraction=0.005)


def _mest(epoch: int, total: int) -> Exploration:
    end = max(1, round(0.8 * total))
    return Exploration(1000, end, growth="random", soft=SoftBound(0.05, end))


def _chase(epoch: int, total: int) -> Exploration:
    soft = SoftBound(0.05, max(1, round(0.8 * total)))
    return Exploration(1000, total, scope="global", fraction=0.5, final_fraction=0.005, soft=soft)


PRESETS: Mapping[Preset, Callable[[int, int], Exploration]] = {
    "set": _set,
    "rigl": _rigl,
    "set-itop": _set_itop,
    "rigl-itop": _rigl_itop,
    "mest": _mest,
    "chase": _chase,
}
"""By name: from the steps of an epoch and of the whole training to the published settings.

``set`` (Mocanu et al. 2018): half of the weights, at random, once an epoch, after its first step. ``rigl`` (Evci et
al. 2020): 30 % by gradient every 100 steps, falling to none at three quarters. ``set-itop`` and ``rigl-itop`` (Liu et
al. 2021): longer intervals, to the last step. ``mest`` (Yuan et al. 2021): random growth under a soft bound, here with
the surplus, interval and end of Chase's commands; its importance with a gradient term is not here. ``chase`` (Yin et
al. 2023): one pool of all layers, soft bound for four fifths of the training, then a fixed budget.
"""
