"""The search for the allocation: beside every choice there is, over the budget never, more time never worth less."""

import itertools
import math

import pytest
from allocation_samples import Times, best_worth, network
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.sparsify._pool_costs import PoolCosts
from deploy_sparse.sparsify._pool_search import Search
from deploy_sparse.sparsify.widths import LayerWidth


def limits(costs, search, shares):
    least, full = costs.ms(search.cheapest), costs.ms(search.full)
    return [least + share * (full - least) for share in shares]


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_never_above_the_limit_and_near_the_best_there_is(seed, share):
    costs, search = network(seed)
    (limit,) = limits(costs, search, [share])
    choice = search.best(limit, [])
    assert costs.ms(choice) <= limit
    found = search.worth(choice)
    if math.prod(len(own) for own in search.worths) <= 3000:
        gap = best_worth(costs, search, limit) - found
        assert gap <= 0.05 * len(search.worths)  # in shares, or logarithms of shares, of the pools


def test_on_a_hundred_cases_nearly_all_are_the_best_there_is():
    gaps = []
    for seed in range(50):
        costs, search = network(seed)
        if math.prod(len(own) for own in search.worths) > 1000:
            continue
        for limit in limits(costs, search, (0.15, 0.4, 0.7)):
            gaps.append(best_worth(costs, search, limit) - search.worth(search.best(limit, [])))
    assert len(gaps) >= 90
    assert min(gaps) >= -1e-12
    assert sum(gap > 1e-9 for gap in gaps) <= 0.02 * len(gaps)
    assert max(gaps) <= 0.05


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_more_time_that_starts_from_less_is_never_worth_less(seed):
    costs, search = network(seed)
    worth, start = -math.inf, []
    for limit in limits(costs, search, (0.0, 0.1, 0.25, 0.3, 0.55, 0.8, 1.0)):
        choice = search.best(limit, start)
        assert search.worth(choice) >= worth
        worth, start = search.worth(choice), [choice]
    assert choice == search.full


def test_the_cheapest_choice_is_found_where_narrow_is_slow():
    """A width below the step that the kernels like costs more than the wider one."""

    class Odd(Times):
        def ms(self, path, c_in, c_out):
            return super().ms(path, c_in, c_out) * (1.0 if c_out % 8 == 0 else 3.0)

    layer = LayerWidth("only", 16, 16, {}, {0: 1.0})
    costs = PoolCosts([layer], [[12, 8, 4, 0]], Odd({"only": 1e-3}))
    search = Search(costs, [[1.0, 2.0, 3.0, 4.0]])
    assert search.cheapest == (1,)
    assert search.best(costs.ms((1,)), []) == (1,)


def test_a_stream_gets_narrower_together_with_what_reads_it():
    """Neither pool alone saves enough; a price moves both, which one change at a time would not."""
    layers = [LayerWidth(f"layer{n}", 64, 64, {0: 1.0}, {n: 1.0}) for n in (1, 2, 3)]
    options = [list(range(56, -1, -8))] * 4
    costs = PoolCosts(layers, options, Times({layer.path: 1e-4 for layer in layers}, base=0.0, rest=0.0))
    worths = [[math.log(kept / 64) for kept in range(8, 65, 8)]] * 4
    search = Search(costs, worths)
    limit = 0.3 * costs.ms(search.full)
    choices = [c for c in itertools.product(range(8), repeat=4) if costs.ms(c) <= limit]
    assert search.worth(search.best(limit, [])) == pytest.approx(max(map(search.worth, choices)), abs=1e-9)


def test_times_are_asked_for_once():
    costs, search = network(4)
    times = costs.costs
    calls = []
    inner = times.ms
    times.ms = lambda *key: calls.append(key) or inner(*key)
    for limit in limits(costs, search, (0.2, 0.5)):
        search.best(limit, [])
    assert len(calls) <= len(set(calls)) + 2 * len(costs.layers)  # the dense network, for what is no layer's time
