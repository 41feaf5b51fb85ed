"""Small networks of pools and layers with made-up times, and the best allocation there is."""

import itertools
import math
import random

from deploy_sparse.sparsify._pool_costs import PoolCosts
from deploy_sparse.sparsify._pool_search import Search
from deploy_sparse.sparsify.widths import LayerWidth


class Times:
    """A layer takes a constant and a part per product of its widths, rounded up to a step; a network adds a rest."""

    def __init__(self, slopes, *, base=0.02, step=1, rest=0.05, noise=None):
        self.slopes, self.base, self.step, self.rest, self.noise = slopes, base, step, rest, noise
        self.asked = {}

    def ms(self, path, c_in, c_out):
        key = path, c_in, c_out
        if key not in self.asked:
            exact = self.base + self.slopes[path] * self._up(c_in) * self._up(c_out)
            self.asked[key] = exact * (self.noise() if self.noise else 1.0)
        return self.asked[key]

    def network_ms(self, widths):
        return self.rest + sum(self.ms(path, *counts) for path, counts in widths.items())

    def _up(self, count):
        return math.ceil(count / self.step) * self.step


def network(seed):
    """Times and a search over two to six pools that layers join in a chain, around a stream, or anyhow."""
    draw = random.Random(seed)
    count, kind = draw.randint(2, 6), draw.choice(["chain", "stream", "any"])
    sizes = [draw.choice([8, 16, 24, 32]) for _ in range(count)]
    layers = []
    for number in range(draw.randint(count, 2 * count + 1)):
        first, second = draw.randrange(count), draw.randrange(count)
        if kind == "chain" and number < count:
            first, second = number, (number + 1) % count
        elif kind == "stream":
            own = 1 + number % (count - 1)
            first, second = (0, own) if draw.random() < 0.5 else (own, 0)
        layers.append(LayerWidth(f"layer{number}", sizes[first], sizes[second], {first: 1.0}, {second: 1.0}))
    slopes = {layer.path: draw.uniform(0.2, 5) * 1e-4 for layer in layers}
    noisy = (lambda: draw.uniform(0.9, 1.1)) if draw.random() < 0.3 else None
    times = Times(slopes, base=draw.uniform(0, 0.05), step=draw.choice([1, 8, 16]), noise=noisy)
    multiple = draw.choice([4, 8])
    options = [[*range(multiple, size, multiple), size] for size in sizes]
    worths = []
    for size, own in zip(sizes, options, strict=True):
        scores = sorted((draw.random() ** draw.choice([0.5, 1, 3]) for _ in range(size)), reverse=True)
        kept = [sum(scores[:count]) / sum(scores) for count in own]
        worths.append([math.log(share) for share in kept] if seed % 2 else kept)
    costs = PoolCosts(
        layers, [[size - count for count in own] for size, own in zip(sizes, options, strict=True)], times
    )
    return costs, Search(costs, worths)


def best_worth(costs, search, limit):
    """By looking at every choice."""
    choices = itertools.product(*(range(len(own)) for own in search.worths))
    return max(search.worth(choice) for choice in choices if costs.ms(choice) <= limit)
