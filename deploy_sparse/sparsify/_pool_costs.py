"""What single and paired changes of the pools' widths do to the running time, each layer's time asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .widths import Costs, LayerWidth, LayerWidths

Array = npt.NDArray[np.float64]
_KEPT = 20_000  # arrays in the cache; networks whose layers read many pools would fill the memory


class PoolCosts:
    """Times of layers as functions of the pools' options; a choice is one option's index for every pool.

    Args:
        layers: which pools decide which layer's widths.
        lost: for every pool and option how many of its channels are gone.
        costs: what layers cost.
    """

    def __init__(self, layers: Sequence[LayerWidth], lost: Sequence[Sequence[int]], costs: Costs) -> None:
        self.layers, self.costs = layers, costs
        self.lost = [np.array(options, dtype=np.float64) for options in lost]
        self.touching: list[list[int]] = [[] for _ in lost]
        for number, layer in enumerate(layers):
            for pool in layer.pools:
                self.touching[pool].append(number)
        self._known: dict[tuple[int, int, int], float] = {}
        self._arrays: dict[tuple[int, int, int, float, float], Array] = {}

    @cached_property
    def neighbours(self) -> list[list[int]]:
        """For every pool the others that share a layer with it."""
        return [
            sorted({other for number in own for other in self.layers[number].pools} - {pool})
            for pool, own in enumerate(self.touching)
        ]

    @cached_property
    def rest_ms(self) -> float:
        """What is left of the dense network's time without its layers; it does not depend on widths."""
        dense = {layer.path: (layer.c_in, layer.c_out) for layer in self.layers}
        layers = sum(self.costs.ms(path, *widths) for path, widths in dense.items())
        return self.costs.network_ms(dense) - layers

    def widths(self, choice: Sequence[int]) -> LayerWidths:
        """Every layer's input and output channels."""
        gone = {pool: int(lost[option]) for pool, (lost, option) in enumerate(zip(self.lost, choice, strict=True))}
        return {layer.path: layer.at(gone) for layer in self.layers}

    def ms(self, choice: Sequence[int]) -> float:
        """The whole network."""
        found = (self._ms(number, *widths) for number, widths in enumerate(self.widths(choice).values()))
        return self.rest_ms + sum(found)

    def along(self, layer: int, pool: int, choice: Sequence[int]) -> Array:
        """One layer's time for each option of a pool, all others as chosen: ``[options]``."""
        fixed_in, fixed_out = self._fixed(layer, (pool,), choice)
        return self._array(layer, pool, -1, fixed_in, fixed_out)

    def across(self, layer: int, first: int, second: int, choice: Sequence[int]) -> Array:
        """One layer's time for each pair of options of two pools: ``[options of first, options of second]``."""
        fixed_in, fixed_out = self._fixed(layer, (first, second), choice)
        return self._array(layer, first, second, fixed_in, fixed_out)

    def change(self, pool: int, choice: Sequence[int]) -> Array:
        """By how much the network's time changes with each option of a pool: ``[options]``."""
        total = sum((self.along(layer, pool, choice) for layer in self.touching[pool]), np.zeros(len(self.lost[pool])))
        return np.asarray(total - total[choice[pool]])

    def joint(self, first: int, second: int, choice: Sequence[int]) -> Array | None:
        """What changing two pools together costs besides the sum of both changes; None where they share no layer."""
        if second not in self.neighbours[first]:
            return None
        found = np.zeros((len(self.lost[first]), len(self.lost[second])))
        for layer in set(self.touching[first]).intersection(self.touching[second]):
            both = self.across(layer, first, second, choice)
            row, column = both[:, choice[second]], both[choice[first], :]
            found += both - row[:, None] - column[None, :] + both[choice[first], choice[second]]
        return found

    def _fixed(self, layer: int, free: Sequence[int], choice: Sequence[int]) -> tuple[float, float]:
        """Input and output channels of a layer that the pools that are not free leave it."""
        one = self.layers[layer]
        return (
            one.c_in - sum(per * self.lost[p][choice[p]] for p, per in one.reads.items() if p not in free),
            one.c_out - sum(per * self.lost[p][choice[p]] for p, per in one.writes.items() if p not in free),
        )

    def _array(self, layer: int, first: int, second: int, fixed_in: float, fixed_out: float) -> Array:
        key = (layer, first, second, fixed_in, fixed_out)
        if key not in self._arrays:
            one = self.layers[layer]
            lost = self.lost[first]
            c_in, c_out = fixed_in - one.reads.get(first, 0.0) * lost, fixed_out - one.writes.get(first, 0.0) * lost
            if second >= 0:
                other = self.lost[second]
                c_in = c_in[:, None] - one.reads.get(second, 0.0) * other[None, :]
                c_out = c_out[:, None] - one.writes.get(second, 0.0) * other[None, :]
            pairs = zip(np.rint(c_in).ravel().tolist(), np.rint(c_out).ravel().tolist(), strict=True)
            times = [self._ms(layer, int(i), int(o)) for i, o in pairs]
            if len(self._arrays) >= _KEPT:
                self._arrays.clear()
            self._arrays[key] = np.array(times).reshape(c_in.shape)
        return self._arrays[key]

    def _ms(self, layer: int, c_in: int, c_out: int) -> float:
        key = (layer, c_in, c_out)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self.costs.ms(self.layers[layer].path, c_in, c_out)
        return found
