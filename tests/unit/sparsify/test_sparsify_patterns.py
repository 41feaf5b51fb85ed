"""Patterns: what survives is the best, exactly as much as asked for, in whole rows where rows are asked for."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.distribution import densities
from deploy_sparse.sparsify.patterns import channels, row_pools, silent_pools, top, unstructured, whole
from deploy_sparse.structure import ChannelGroup, Producer, Slice


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.rand(*shape, generator=generator) for i, shape in enumerate(shapes)}


def ones(scores):
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


@given(st.integers(0, 99), st.floats(0.1, 1.0), st.sampled_from(["global", "uniform", "erk"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_largest_scores_survive_and_as_many_as_asked_for(seed, density, kind, tied):
    scores = drawn(seed, (8, 6, 3, 3), (16, 8), (5, 7, 1, 1))
    if tied:
        scores = {name: (score * 4).floor() for name, score in scores.items()}
    shares = densities({name: score.shape for name, score in scores.items()}, density, kind)
    try:
        found = unstructured(scores, ones(scores), shares)
    except TicketError:
        assert kind == "global"  # only there may a layer lose everything
        return
    total = sum(score.numel() for score in scores.values())
    assert abs(sum(int(m.sum()) for m in found.values()) - density * total) <= (0.5001 if kind == "global" else 1)
    pools = [list(scores)] if kind == "global" else [[name] for name in scores]
    for pool in pools:
        kept = torch.cat([scores[name][found[name]] for name in pool])
        gone = torch.cat([scores[name][~found[name]] for name in pool])
        assert len(gone) == 0 or float(kept.min()) >= float(gone.max())


@given(st.integers(0, 99), st.floats(0.2, 0.9), st.floats(0.2, 0.9))
@settings(max_examples=30, deadline=None)
def test_what_is_masked_never_comes_back(seed, first, second):
    scores = drawn(seed, (8, 9), (6, 8))
    before = unstructured(scores, ones(scores), first)
    after = unstructured(drawn(seed + 1, (8, 9), (6, 8)), before, second)
    assert not any(bool((after[name] & ~before[name]).any()) for name in after)
    total = sum(m.numel() for m in after.values())
    assert sum(int(m.sum()) for m in after.values()) == min(round(first * total), round(second * total))


def test_of_equal_scores_the_later_entries_are_kept():
    scores = {"a": torch.zeros(2, 2), "b": torch.zeros(1, 3)}
    found = unstructured(scores, ones(scores), Fraction(4, 7))
    assert found["a"].tolist() == [[False, False], [False, True]]
    assert found["b"].tolist() == [[True, True, True]]


def test_scores_that_are_not_finite_and_empty_layers_are_refused():
    with pytest.raises(TicketError, match="NaN or infinite"):
        unstructured({"a": torch.tensor([1.0, torch.inf])}, {"a": torch.ones(2, dtype=torch.bool)}, 0.5)
    masked = {"a": torch.tensor([True, True, False])}
    assert unstructured({"a": torch.tensor([1.0, 2.0, torch.nan])}, masked, Fraction(1, 3))["a"].tolist() == [
        False,
        True,
        False,
    ]
    scores = {"a": torch.ones(4), "b": torch.zeros(4)}
    with pytest.raises(TicketError, match=r"pruning to 50.00% of the weights leaves layer 'b' without a weight"):
        unstructured(scores, ones(scores), 0.5)
    assert unstructured(scores, ones(scores), 0.5, spare_best=True)["b"].tolist() == [True, False, False, False]


@given(st.integers(0, 99), st.floats(0.024, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_best_of_every_layer_can_be_spared(seed, density):
    scores = drawn(seed, (10, 10), (4, 5), (3, 2))
    scores["w1"] *= 1e-6
    scores["w2"] *= -1
    found = unstructured(scores, ones(scores), density, spare_best=True)
    assert sum(int(m.sum()) for m in found.values()) == max(3, round(density * 126))
    for name, score in scores.items():
        assert bool(found[name].flatten()[score.argmax()])


def test_ties_of_channels_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


def test_channels_layer_by_layer():
    masks = {"a": torch.ones(4, 3, dtype=torch.bool), "b": torch.ones(2, 5, 3, dtype=torch.bool)}
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    found = channels(scores, masks, {"a": 0.5, "b": 0.3}, row_pools(masks))
    assert found["a"].any(dim=1).tolist() == [True, False, True, False]
    assert found["b"].flatten(1).all(dim=1).tolist() == [False, True]


def test_channels_over_all_layers_share_one_budget():
    # rows of 10 weights in a, of 1 in b; scores relative to their layer's mean: a 2, 1, 0; b 1.5, 1.5, 0, 1
    masks = {"a": torch.ones(3, 10, dtype=torch.bool), "b": torch.ones(4, 1, dtype=torch.bool)}
    scores = {"a": torch.tensor([0.2, 0.1, 0.0]), "b": torch.tensor([30.0, 30.0, 0.0, 20.0])}
    for kept, rows_a, rows_b in ((11, 1, 1), (12, 1, 2), (14, 2, 2), (22, 2, 2), (23, 2, 3), (24, 3, 3), (34, 3, 4)):
        found = channels(scores, masks, Fraction(kept, 34), row_pools(masks))
        assert (int(found["a"].any(dim=1).sum()), int(found["b"].any(dim=1).sum())) == (rows_a, rows_b)
    assert found["b"].all()
    least = channels(scores, masks, Fraction(1, 34), row_pools(masks))
    assert (int(least["a"].any(dim=1).sum()), int(least["b"].any(dim=1).sum())) == (1, 1)


def stream():
    group = ChannelGroup(
        "a", 4, (Producer(Slice("a", 0, (0, 1, 2, 3))), Producer(Slice("b", 0, (-1, 2, 3)))),
        shared=(Slice("filters", 0, (0, 1, 2, 3)),),
    )  # fmt: skip
    pinned = ChannelGroup("out", 2, (Producer(Slice("out", 0, (0, 1))),), pinned="network output")
    return group, pinned


def test_pools_of_layers_that_write_one_stream():
    masks = {
        "a": torch.ones(4, 2) > 0,
        "b": torch.ones(3, 2) > 0,
        "filters": torch.ones(4, 1) > 0,
        "out": torch.ones(2, 3) > 0,
    }
    a, b = (producer.weight for producer in stream()[0].producers)
    assert silent_pools(masks, stream(), together=False) == [(a,), (b,)]
    alone, shared = Slice("a", 0, (0, 1, -1, -1)), Slice("a", 0, (-1, -1, 2, 3))
    assert silent_pools(masks, stream(), together=True) == [(alone,), (shared, b)]
    del masks["b"]
    assert silent_pools(masks, stream(), together=True) == [(alone,)]  # b keeps every channel it writes
    assert silent_pools(masks, stream(), together=False) == [(a,)]
    with pytest.raises(TicketError, match=r"mask 'other' belongs to no layer[\s\S]*a, b, out"):
        silent_pools({"other": torch.ones(2, 2) > 0}, stream(), together=True)


def test_a_pool_takes_mean_scores_and_budgets_weights_together():
    group = ChannelGroup(
        "a", 4, (Producer(Slice("a", 0, (0, 1, 2, 3))), Producer(Slice("b", 0, (-1, 3, 2, 1, 0))))
    )  # fmt: skip
    masks = {"a": torch.ones(4, 2) > 0, "b": torch.ones(5, 6) > 0}
    scores = {"a": torch.tensor([1.0, 2.0, 0.0, 0.0]), "b": torch.tensor([9.0, 1.5, 3.0, 0.5, 0.0])}
    pools = silent_pools(masks, [group], together=True)
    # a: 8 weights at 1/4, b: 24 weights (its first row is another group's) at 3/4: 20 of 32, so 2.5 of 4 channels
    found = channels(scores, masks, {"a": 0.25, "b": 0.75}, pools)
    assert found["a"].any(dim=1).tolist() == [False, True, True, True]  # sums 1, 2.5, 3 and 1.5
    assert found["b"].any(dim=1).tolist() == [True, True, True, True, False]
    fewer = channels(scores, masks, {"a": 0.25, "b": 0.5}, pools)  # 14 of 32: 1.75 channels
    assert fewer["a"].any(dim=1).tolist() == [False, True, True, False]


def test_channels_compete_only_with_those_that_the_same_layers_write():
    masks = {"a": torch.ones(4, 2) > 0, "b": torch.ones(3, 6) > 0}
    scores = {"a": torch.tensor([1.0, 2.0, 0.0, 0.0]), "b": torch.tensor([9.0, 1.5, 3.0])}
    pools = silent_pools(masks, stream()[:1], together=True)
    found = channels(scores, masks, {"a": 0.5, "b": 0.5}, pools)
    assert found["a"].any(dim=1).tolist() == [False, True, False, True]  # one of 0 and 1, one of 2 and 3
    assert found["b"].any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("multiple", "budget", "width"), [(1, 2.2, 3), (1, 0.0, 1), (8, 2.2, 8), (8, 8.0, 8), (8, 8.1, 16)]
)
def test_budgets_become_whole_channels(multiple, budget, width):
    assert whole(multiple)(Fraction(budget), 64) == width


def test_multiples_below_one_are_refused():
    with pytest.raises(ConfigError, match=r"multiple 0[\s\S]*1 or more"):
        whole(0)
