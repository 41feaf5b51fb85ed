"""The search behind :mod:`allocation`: prices for time, exact moves of one pool with all its neighbours, exchanges.

Time does not part into the pools' shares, as a layer's depends on what it reads and what it writes. With a price on
time instead of a limit, one pool and those of its neighbours that share no layer with each other are chosen exactly
together: for each of the pool's options the neighbours decouple. So a residual stream moves along with the layers
inside its blocks. Prices are halved until the network just fits; exchanges between any two pools then use up the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ._pool_costs import Array, PoolCosts

Choice = tuple[int, ...]
_SWEEPS = 30
_PRICES = 24
_STARTS = 4  # of the choices that prices led to, those that exchanges improve


class Search:
    """Finds the choice with the largest worth within a time.

    Args:
        costs: times.
        worths: for every pool what its options are worth, ascending with what they keep: ``[options]``.
    """

    def __init__(self, costs: PoolCosts, worths: Sequence[Sequence[float]]) -> None:
        self.costs = costs
        self.worths: list[Array] = [np.array(own, dtype=np.float64) for own in worths]
        self._priced: dict[float, Choice] = {}

    def worth(self, choice: Choice) -> float:
        """Of all pools."""
        return float(sum(own[option] for own, option in zip(self.worths, choice, strict=True)))

    @cached_property
    def full(self) -> Choice:
        """Everything stays."""
        return tuple(len(own) - 1 for own in self.worths)

    @cached_property
    def cheapest(self) -> Choice:
        """The least time; not always the narrowest, where times were measured."""
        zero = [np.zeros_like(own) for own in self.worths]
        starts = (tuple(0 for _ in zero), self.full)
        return min((self._settled(start, 1.0, zero) for start in starts), key=self.costs.ms)

    def best(self, limit_ms: float, starts: Sequence[Choice]) -> Choice:
        """The best choice found within the limit, which the cheapest one keeps; never worse than a start that fits."""
        if self.costs.ms(self.full) <= limit_ms:
            return self.full
        found = [*starts, *self._fitting(limit_ms), self.cheapest]
        fitting = [choice for choice in dict.fromkeys(found) if self.costs.ms(choice) <= limit_ms]
        ranked = sorted(fitting, key=self.worth, reverse=True)
        return max((self._exchanged(choice, limit_ms) for choice in ranked[:_STARTS]), key=self.worth)

    def _fitting(self, limit_ms: float) -> list[Choice]:
        """Choices at prices around the one at which the network just fits; those above the limit are cut down to it."""
        span = self.costs.ms(self.full) - self.costs.ms(self.cheapest)
        high = (self.worth(self.full) - self.worth(self.cheapest)) / max(span, 1e-12)
        low = 0.0
        while self.costs.ms(self._at(high)) > limit_ms and high < 1e30:
            low, high = high, max(high, 1e-12) * 4
        found = {self._at(high)}
        for _ in range(_PRICES):
            price = (low + high) / 2
            choice = self._at(price)
            fits = self.costs.ms(choice) <= limit_ms
            low, high = (low, price) if fits else (price, high)
            if choice in found and abs(high - low) < 1e-6 * high:
                break
            found.add(choice)
        return [self._cut(choice, limit_ms) for choice in sorted(found)]

    def _at(self, price: float) -> Choice:
        """The choice that settles at a price in worth for one ms."""
        if price not in self._priced:
            settled = (self._settled(start, price, self.worths) for start in (self.full, self.cheapest))
            self._priced[price] = max(settled, key=lambda choice: self.worth(choice) - price * self.costs.ms(choice))
        return self._priced[price]

    def _settled(self, choice: Choice, price: float, worths: Sequence[Array]) -> Choice:
        """Sweeps over all pools, each with its neighbours, until nothing gains."""
        for _ in range(_SWEEPS):
            before = choice
            for pool in range(len(worths)):
                choice = self._star(choice, pool, price, worths)
            if choice == before:
                break
        return choice

    def _star(self, choice: Choice, pool: int, price: float, worths: Sequence[Array]) -> Choice:
        """The best options of a pool and of neighbours that share no layer with each other, the others as they are."""
        costs, free = self.costs, self._independent[pool]
        taken = {layer for other in free for layer in costs.touching[other]}
        value = worths[pool].copy()  # [options of the pool]
        for layer in costs.touching[pool]:
            if layer not in taken:
                value -= price * costs.along(layer, pool, choice)
        answers = []
        for other in free:
            gain = np.repeat(worths[other][None, :], len(value), axis=0)  # [options of the pool, options of the other]
            for layer in costs.touching[other]:
                if pool in costs.layers[layer].pools:
                    gain -= price * costs.across(layer, pool, other, choice)
                else:
                    gain -= price * costs.along(layer, other, choice)[None, :]
            best = gain.argmax(axis=1)
            value += gain[np.arange(len(value)), best]
            answers.append((other, best, gain))
        now = worths[pool][choice[pool]] - price * sum(
            costs.along(layer, pool, choice)[choice[pool]] for layer in costs.touching[pool] if layer not in taken
        )
        now += sum(gain[choice[pool], choice[other]] for other, _, gain in answers)
        option = int(value.argmax())
        if value[option] <= now + 1e-9 * max(1.0, abs(now)):
            return choice
        found = list(choice)
        found[pool] = option
        for other, best, _ in answers:
            found[other] = int(best[option])
        return tuple(found)

    @cached_property
    def _independent(self) -> list[list[int]]:
        """For every pool neighbours of which no two share a layer, those with the fewest neighbours first."""
        found = []
        for own in self.costs.neighbours:
            free: list[int] = []
            for other in sorted(own, key=lambda one: (len(self.costs.neighbours[one]), one)):
                if not set(free).intersection(self.costs.neighbours[other]):
                    free.append(other)
            found.append(free)
        return found

    def _cut(self, choice: Choice, limit_ms: float) -> Choice:
        """Narrowed until it fits, each time where a saved ms costs the least worth; else the cheapest choice."""
        while (over := self.costs.ms(choice) - limit_ms) > 0:
            moves = []
            for pool, worth in enumerate(self.worths):
                saved = np.minimum(-self.costs.change(pool, choice), over)  # more than is needed counts for nothing
                loss = worth[choice[pool]] - worth
                useful = saved > 1e-12 * max(1.0, limit_ms)
                if useful.any():
                    rate = np.where(useful, loss / np.where(useful, saved, 1.0), np.inf)
                    moves.append((float(rate.min()), pool, int(rate.argmin())))
            if not moves:
                return self.cheapest
            _, pool, option = min(moves)
            choice = (*choice[:pool], option, *choice[pool + 1 :])
        return choice

    def _exchanged(self, choice: Choice, limit_ms: float) -> Choice:
        """Until no change of one pool or of two together gains within the limit."""
        changes: dict[int, Array] = {}
        moved = True
        while moved:
            moved = False
            for first in range(len(self.worths)):
                found = self._exchange(choice, first, limit_ms, changes)
                if found is not None:
                    for pool in (pool for pool, (a, b) in enumerate(zip(choice, found, strict=True)) if a != b):
                        for stale in (pool, *self.costs.neighbours[pool]):
                            changes.pop(stale, None)
                    choice, moved = found, True
        return choice

    def _exchange(self, choice: Choice, first: int, limit_ms: float, changes: dict[int, Array]) -> Choice | None:
        """The best change of a pool, alone or with another one."""
        slack = limit_ms - self.costs.ms(choice)
        for pool in range(len(self.worths)):
            if pool not in changes:
                changes[pool] = self.costs.change(pool, choice)
        gains = [own - own[option] for own, option in zip(self.worths, choice, strict=True)]
        best = 1e-9 * max(1.0, abs(self.worth(choice)))
        found: tuple[int, int, int] | None = None
        for second, own in enumerate(gains):
            if second == first:
                change, gain = changes[first][:, None], gains[first][:, None]
            else:
                extra = self.costs.joint(first, second, choice)
                change = changes[first][:, None] + changes[second][None, :] + (0.0 if extra is None else extra)
                gain = gains[first][:, None] + own[None, :]
            gain = np.where(change <= slack, gain, -np.inf)
            where = int(gain.argmax())
            if gain.flat[where] > best:
                best, found = float(gain.flat[where]), (second, *divmod(where, gain.shape[1]))
        if found is None:
            return None
        second, one, other = found
        options = {second: other, first: one}
        after = tuple(options.get(pool, option) for pool, option in enumerate(choice))
        return after if self.costs.ms(after) <= limit_ms else None
