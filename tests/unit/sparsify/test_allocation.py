"""Latency budgets on a real network: options, widths of the masks, coupled groups, pinned ones, what is refused."""

import math
import re

import pytest
import torch
from allocation_samples import Times
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.allocation import (
    LatencyBudget,
    allocate,
    keep_best,
    one_threshold,
    problem_of,
    uniform,
)
from deploy_sparse.sparsify.channel_scores import channel_scores
from deploy_sparse.sparsify.coupling import channel_pools
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.refill import refill, refill_within
from deploy_sparse.sparsify.widths import layer_widths
from deploy_sparse.sparsify.worth import WORTHS, kept_worth, mean_scores
from deploy_sparse.surgery.compact import compact
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

X = torch.zeros(2, 1, 8, 8)
ARGUMENTS = {"widths": (16, 32, 32)}


def factory():
    torch.manual_seed(0)
    return zoo.build("resnet_digits", **ARGUMENTS)


def widths_of(module):
    layers = {p: m for p, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {
        p: (m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.in_features, m.out_features)
        for p, m in layers.items()
    }


@pytest.fixture(scope="module")
def case():
    network = factory().eval()
    groups, masks, dense = channel_groups(network, (X,)), dense_masks(network), widths_of(network)
    return network, groups, masks, dense, Times({path: 1e-4 for path in dense})


def budget(case, share, multiple=4, worth="product"):
    *_, dense, times = case
    return LatencyBudget(share * times.network_ms(dense), times, dense, multiple, worth)


def problem(case, share, multiple=4, worth="product", **limits):
    network, groups, masks, *_ = case
    pools = channel_pools(masks, groups, "prune_skip")
    scores = mean_scores(pools, channel_scores("l1", masks, weights=network.state_dict()))
    return problem_of(pools, groups, scores, budget(case, share, multiple, worth), **limits)


@pytest.mark.parametrize("worth", WORTHS)
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_the_compact_network_has_exactly_the_widths_that_were_paid_for(case, share, worth):
    network, groups, masks, *_ = case
    limit = budget(case, share, worth=worth)
    made, found = refill_within(masks, network.state_dict(), groups, limit)
    assert found.ms <= limit.ms
    ticket = Ticket(dict(network.state_dict()), made, ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8)), Provenance("t"))
    small = compact(ticket, factory, (torch.randn(2, 1, 8, 8),))
    assert widths_of(small.module) == dict(found.widths)
    assert limit.costs.network_ms(widths_of(small.module)) == pytest.approx(found.ms)


def test_pools_keep_multiples_or_all_and_pinned_groups_stay(case):
    asked = problem(case, 0.4, multiple=8)
    found = allocate(asked)
    assert all(kept % 8 == 0 or kept == pool.size for kept, pool in zip(found.kept, asked.pools, strict=True))
    assert found.widths["fc"][1] == 10  # the classes are pinned
    assert found.widths["conv1"][0] == 1  # so is the image


def test_layers_of_one_stream_keep_the_same_channels(case):
    network, groups, masks, *_ = case
    made, _ = refill_within(masks, network.state_dict(), groups, budget(case, 0.4))
    stream = [group for group in groups if len(group.producers) > 1 and group.pinned is None]
    assert stream
    for group in stream:
        kept = [made[p.weight.name].flatten(1).any(dim=1).tolist() for p in group.producers]
        assert all(each == kept[0] for each in kept)


def test_kept_are_the_channels_with_the_largest_scores(case):
    asked = problem(case, 0.5)
    found = allocate(asked)
    made = keep_best(asked, found.kept, case[2])
    for pool, scores, kept in zip(asked.pools, asked.scores, found.kept, strict=True):
        alive = made[pool.writers[0].name].flatten(1).any(dim=1)
        assert int(alive.sum()) == kept
        assert alive.all() or scores[alive].min() >= scores[~alive].max()


def test_what_the_budget_keeps_is_worth_more_than_even_or_plain_global_shares(case):
    for share in (0.7, 0.5, 0.35):
        asked = problem(case, share)
        found, others = allocate(asked), (uniform(asked), one_threshold(asked))
        for other in others:
            assert other.ms <= asked.budget.ms
            assert found.worth >= other.worth - 1e-12
            assert found.retained > other.retained


def test_more_time_from_an_earlier_allocation_is_never_worth_less(case):
    before = None
    for share in (0.35, 0.45, 0.6, 0.75, 0.9, 1.0):
        now = allocate(problem(case, share), start=before)
        assert before is None or now.worth >= before.worth
        before = now
    assert before.retained == pytest.approx(1.0)


def test_equal_problems_give_equal_allocations(case):
    assert allocate(problem(case, 0.5)).kept == allocate(problem(case, 0.5)).kept


def test_least_and_most_bound_every_pool(case):
    pools = problem(case, 0.5).pools
    least, most = [8] * len(pools), [pool.size - 3 for pool in pools]
    found = allocate(problem(case, 0.75, least=least, most=most))
    assert all(8 <= kept <= high for kept, high in zip(found.kept, most, strict=True))
    full = allocate(problem(case, 1.0, least=least, most=most))
    assert list(full.kept) == most  # as many as are left, multiple or not


def test_wide_pools_are_tried_at_a_larger_multiple():
    network = nn.Sequential(nn.Conv2d(3, 1000, 1), nn.ReLU(), nn.Conv2d(1000, 4, 1))
    groups, masks = channel_groups(network, (torch.zeros(2, 3, 4, 4),)), {"0.weight": torch.ones(1000, 3, 1, 1) > 0}
    pools = channel_pools(masks, groups, "prune_skip")
    dense = {"0": (3, 1000), "2": (1000, 4)}
    asked = problem_of(pools, groups, [torch.ones(1000).double()], LatencyBudget(1.0, Times({"0": 1, "2": 1}), dense))
    (options,) = asked.options
    assert len(options) <= 128
    assert options[0] >= 1
    assert options[-1] == 1000


def test_flattened_maps_and_depthwise_filters_count(case):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 5),
    )  # fmt: skip
    groups = channel_groups(network, (torch.zeros(2, 3, 4, 4),))
    masks = {name: torch.ones_like(network.state_dict()[name]) > 0 for name in ("0.weight", "3.weight")}
    pools = channel_pools(masks, groups, "prune_skip")
    dense = {"0": (3, 8), "2": (8, 8), "3": (8, 6), "6": (96, 5)}
    layers = {layer.path: layer for layer in layer_widths(pools, groups, dense)}
    lost = {0: 3, 1: 2}
    assert {path: layer.at(lost) for path, layer in layers.items()} == {
        "0": (3, 5), "2": (5, 5), "3": (5, 4), "6": (64, 5)
    }  # fmt: skip


def test_what_worths_mean():
    pool = channel_pools({"0.weight": torch.ones(4, 2) > 0}, channel_groups(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.zeros(3, 2),)), "prune_skip")[0]  # fmt: skip
    scores = torch.tensor([1.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    assert kept_worth(pool, scores, [1, 4], "raw") == [4.0, 8.0]
    assert kept_worth(pool, scores, [1, 4], "share") == [0.5, 1.0]
    assert kept_worth(pool, scores, [1, 4], "channels") == [2.0, 4.0]
    assert kept_worth(pool, scores, [1, 4], "product") == [math.log(0.5), 0.0]
    assert kept_worth(pool, torch.zeros(4).double(), [2], "share") == [0.5]
    with pytest.raises(ConfigError, match=r"worth 'shares'\n.*one of product, share, channels, raw\n.*did you mean"):
        kept_worth(pool, scores, [1], "shares")


def test_a_budget_that_cannot_be_met_names_the_least(case):
    with pytest.raises(ConfigError) as caught:
        allocate(problem(case, 0.01))
    text = str(caught.value)
    least = float(re.search(r"at least ([0-9.e-]+) ms", text)[1])
    *_, dense, times = case
    assert allocate(problem(case, least / times.network_ms(dense))).ms <= least
    assert "as narrow as it may be" in text


def test_what_is_refused(case):
    network, groups, masks, dense, times = case
    for wrong, text in (
        ({"ms": 0.0}, "latency budget 0.0 ms"),
        ({"ms": math.nan}, "budget nan"),
        ({"multiple": 0}, "multiple 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            LatencyBudget(**{"ms": 1.0, "costs": times, "widths": dense, **wrong})
    with pytest.raises(ConfigError, match="without channels that may go"):
        problem_of([], groups, [], budget(case, 0.5))
    bad = {name: torch.full((len(mask),), math.nan) for name, mask in masks.items()}
    with pytest.raises(TicketError, match="negative, NaN or infinite"):
        refill_within(masks, network.state_dict(), groups, budget(case, 0.5), scores=bad)
    short = {name: torch.ones(1) for name in masks}
    with pytest.raises(TicketError, match=r"have shape \(1,\)"):
        refill_within(masks, network.state_dict(), groups, budget(case, 0.5), scores=short)
    with pytest.raises(TicketError, match="belongs to no layer"):
        refill_within({"strange": torch.ones(2, 2) > 0}, network.state_dict(), groups, budget(case, 0.5))


def test_refill_takes_a_latency_as_its_budget(case):
    network, groups, masks, *_ = case
    weights, limit = network.state_dict(), budget(case, 0.5)
    made = refill(masks, weights, groups, coupling="group", budget="latency", latency=limit)
    again, _ = refill_within(masks, weights, groups, limit)
    assert all(torch.equal(made[name], mask) for name, mask in again.items())
    for options, text in (
        ({"budget": "latency"}, "budget 'latency' without a latency"),
        ({"latency": limit}, "budget 'paper' with a latency"),
        ({"budget": "latency", "latency": limit, "coupling": "layer"}, "coupling 'layer' with budget 'latency'"),
        ({"budget": "latency", "latency": limit, "multiple": 4}, "multiple 4 with budget 'latency'"),
        ({"budget": "latency", "latency": limit, "extra": 0.1}, "extra 0.1 with budget 'latency'"),
        ({"budget": "latency", "latency": limit, "silent": False}, "silent=False with budget 'latency'"),
        ({"budget": "latency", "latency": limit, "shares": {}}, "shares with budget 'latency'"),
        ({"budget": "fast"}, "budget 'fast'"),
    ):
        with pytest.raises(ConfigError, match=text):
            refill(masks, weights, groups, **{"coupling": "group", **options})


def test_survivors_decide_which_channels_an_unstructured_ticket_keeps(case):
    network, groups, masks, *_ = case
    name = "stages.0.0.conv1.weight"
    thin = {key: mask.clone() for key, mask in masks.items()}
    thin[name][:8] = False  # whatever their weights are, these score nothing
    made, _ = refill_within(thin, network.state_dict(), groups, budget(case, 0.6))
    kept = made[name].flatten(1).any(dim=1)
    assert int(kept.sum()) <= 8
    assert not bool(kept[:8].any())


def test_the_same_share_uses_the_time_up_and_is_one_step_apart_at_most(case):
    for share in (0.45, 0.6, 0.8):
        asked = problem(case, share, multiple=8)
        found = uniform(asked)
        assert found.ms <= asked.budget.ms
        kept = [count / pool.size for count, pool in zip(found.kept, asked.pools, strict=True)]
        steps = [8 / pool.size for pool in asked.pools]
        low, high = min(k for k in kept), max(k - s for k, s in zip(kept, steps, strict=True))
        assert high <= low + max(steps)
        for n, count in enumerate(found.kept):  # no pool below the widest share could step up
            if count < asked.pools[n].size and kept[n] + steps[n] <= max(kept):
                more = [*found.kept]
                more[n] += 8
                choice = tuple(own.index(k) for own, k in zip(asked.options, more, strict=True))
                assert asked.costs.ms(choice) > asked.budget.ms
