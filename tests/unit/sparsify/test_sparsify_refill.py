"""Refill: budgets by the paper's formula, whole rows only, silence everywhere the channel is seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.sparsify.scores import channel_l1, top
from deploy_sparse.structure import ChannelGroup, Producer, Slice


def rows(name, size):
    return Slice(name, 0, tuple(range(size)))


def plain_group(size, **changes):
    """conv (with bias) -> norm -> conv2 that reads it."""
    values = {
        "name": "conv.weight", "size": size,
        "producers": (Producer(rows("conv.weight", size), rows("conv.bias", size), (rows("bn.weight", size), rows("bn.bias", size))),),
        "statistics": (rows("bn.running_mean", size),),
        "consumers": (Slice("next.weight", 1, tuple(range(size))),),
    }  # fmt: skip
    return ChannelGroup(**{**values, **changes})


def plain_weights(size, columns=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(size, columns, 3, 3, generator=generator),
        "conv.bias": torch.randn(size, generator=generator),
        "bn.weight": torch.randn(size, generator=generator),
        "bn.bias": torch.randn(size, generator=generator),
        "bn.running_mean": torch.zeros(size),
        "next.weight": torch.randn(5, size, 1, 1, generator=generator),
    }


@given(st.integers(1, 24), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_budget_rows_and_silence(size, columns, share, seed, multiple):
    weights = plain_weights(size, columns, seed)
    mask = torch.rand(size, columns, 3, 3, generator=torch.Generator().manual_seed(seed)) < share
    result = refill({"conv.weight": mask}, weights, [plain_group(size)], multiple=multiple)

    kept = result["conv.weight"].reshape(size, -1)
    alive = kept.all(dim=1)
    assert torch.equal(alive, kept.any(dim=1))  # no partly filled row, ever
    expected = max(1, math.ceil(int(mask.sum()) / mask[0].numel()))
    assert int(alive.sum()) == min(size, math.ceil(expected / multiple) * multiple)
    scores = channel_l1(weights["conv.weight"], mask)
    if not bool(alive.all()):
        assert scores[alive].min() >= scores[~alive].max()
        for name in ("conv.bias", "bn.weight", "bn.bias"):
            assert torch.equal(result[name], alive)
        assert torch.equal(result["next.weight"], alive.reshape(1, size, 1, 1).expand(5, size, 1, 1))
    assert "bn.running_mean" not in result
    assert all(m.shape == weights[name].shape and m.dtype == torch.bool for name, m in result.items())


def test_the_score_is_of_surviving_weights_only():
    weights = {"conv.weight": torch.tensor([[9.0, 0.1], [1.0, 1.0], [0.5, 0.4]])}
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    group = ChannelGroup("conv.weight", 3, (Producer(rows("conv.weight", 3)),))
    assert refill({"conv.weight": mask}, weights, [group])["conv.weight"].tolist() == [
        [False, False], [True, True], [True, True]
    ]  # fmt: skip


def test_ties_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


def test_an_empty_layer_keeps_one_channel():
    group = ChannelGroup("conv.weight", 4, (Producer(rows("conv.weight", 4)),))
    result = refill({"conv.weight": torch.zeros(4, 2, dtype=torch.bool)}, {"conv.weight": torch.randn(4, 2)}, [group])
    assert result["conv.weight"].any(dim=1).tolist() == [True, False, False, False]


def residual():
    """Two layers that write one stream of four channels, and one that reads it."""
    group = ChannelGroup(
        "a", 4, (Producer(rows("a", 4), None, (rows("an", 4),)), Producer(rows("b", 4), None, (rows("bn", 4),))),
        shared=(rows("sum_norm", 4),), consumers=(Slice("reader", 1, (0, 1, 2, 3)),),
    )  # fmt: skip
    weights = {
        "a": torch.tensor([[4.0, 4], [3, 3], [0.1, 0.1], [0.2, 0.2]]), "b": torch.tensor([[0.1, 0.1], [8.0, 8], [5, 5], [0.2, 0.2]]),
        "an": torch.ones(4), "bn": torch.ones(4), "sum_norm": torch.ones(4), "reader": torch.ones(3, 4),
    }  # fmt: skip
    half = torch.tensor([[True, False]] * 4)
    return {"a": half, "b": half}, weights, group


def test_by_layer_each_chooses_for_itself_and_the_stream_keeps_the_union():
    masks, weights, group = residual()
    result = refill(masks, weights, [group], coupling="layer")
    assert result["a"].any(dim=1).tolist() == [True, True, False, False]
    assert result["b"].any(dim=1).tolist() == [False, True, True, False]
    assert result["an"].tolist() == [True, True, False, False]
    assert result["bn"].tolist() == [False, True, True, False]
    assert result["reader"].any(dim=0).tolist() == [True, True, True, False]
    assert result["sum_norm"].tolist() == [True, True, True, False]


def test_by_group_they_choose_together():
    masks, weights, group = residual()
    result = refill(masks, weights, [group], coupling="group")
    for name in ("a", "b"):
        assert result[name].any(dim=1).tolist() == [False, True, True, False]
    assert result["reader"].any(dim=0).tolist() == [False, True, True, False]


def test_a_dense_layer_in_the_group_keeps_the_whole_stream():
    masks, weights, group = residual()
    del masks["b"]
    result = refill(masks, weights, [group], coupling="group")
    assert bool(result["a"].all())
    assert "reader" not in result


def test_a_pinned_group_stays_whole():
    weights = plain_weights(4)
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    result = refill({"conv.weight": mask}, weights, [plain_group(4, pinned="network output")])
    assert bool(result["conv.weight"].all())
    assert set(result) == {"conv.weight"}


def test_flattened_consumers_lose_every_position_of_a_channel():
    group = ChannelGroup(
        "conv", 2, (Producer(rows("conv", 2)),), consumers=(Slice("fc", 1, (0, 0, 0, 0, 1, 1, 1, 1, -1)),)
    )  # fmt: skip
    weights = {"conv": torch.tensor([[1.0], [9.0]]), "fc": torch.ones(3, 9)}
    result = refill({"conv": torch.tensor([[True], [False]])}, weights, [group])
    assert result["conv"].flatten().tolist() == [True, False]
    assert result["fc"][0].tolist() == [True] * 4 + [False] * 4 + [True]


def test_masks_of_another_network_and_bad_multiples_are_refused():
    with pytest.raises(TicketError, match=r"mask 'other' belongs to no layer[\s\S]*conv.weight"):
        refill({"other": torch.ones(2, 2, dtype=torch.bool)}, {"other": torch.ones(2, 2)}, [plain_group(2)])
    with pytest.raises(ConfigError, match=r"multiple 0[\s\S]*1 or more"):
        refill({}, {}, [], multiple=0)


def test_the_arguments_are_not_changed():
    weights = plain_weights(6)
    mask = torch.rand(6, 3, 3, 3) > 0.5
    before = mask.clone(), {k: v.clone() for k, v in weights.items()}
    refill({"conv.weight": mask}, weights, [plain_group(6)])
    assert torch.equal(mask, before[0])
    assert all(torch.equal(weights[k], v) for k, v in before[1].items())
