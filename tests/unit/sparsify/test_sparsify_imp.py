"""IMP against its closed form, and against a plain sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.entry_scores import magnitude
from deploy_sparse.sparsify.imp import dense_masks, head_of, prune_lowest


def weights_of(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(*shape, generator=generator) for i, shape in enumerate(shapes)}


@given(st.integers(0, 99), st.integers(1, 6), st.floats(0.05, 0.3))
@settings(max_examples=40, deadline=None)
def test_density_after_r_rounds_is_the_power_of_what_stays(seed, rounds, rate):
    weights = weights_of(seed, (8, 4, 3, 3), (16, 8, 1, 1), (5, 7, 3, 3))
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    for _ in range(rounds):
        smaller = prune_lowest(weights, masks, rate)
        assert all(not bool((smaller[name] & ~masks[name]).any()) for name in masks)  # nothing comes back
        masks = smaller
    alive = sum(int(m.sum()) for m in masks.values())
    assert abs(alive / total - (1 - rate) ** rounds) <= rounds / total


def test_the_published_densities():
    weights = weights_of(0, (64, 64, 3, 3), (128, 64, 3, 3))
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    for expected in (80.00, 64.00, 51.20, 40.96, 32.77, 26.21, 20.97, 16.78, 13.42):
        masks = prune_lowest(weights, masks, 0.2)
        assert 100 * sum(int(m.sum()) for m in masks.values()) / total == pytest.approx(expected, abs=0.01)


def test_the_smallest_magnitudes_go_over_all_layers_together():
    weights = {"a": torch.tensor([[0.1, -5.0], [0.2, 4.0]]), "b": torch.tensor([[-0.3, 0.05]])}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    pruned = prune_lowest(weights, masks, 0.5)
    assert pruned["a"].tolist() == [[False, True], [False, True]]
    assert pruned["b"].tolist() == [[True, False]]


def test_pruned_weights_are_not_ranked_again_and_the_arguments_stay():
    weights = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = {"a": torch.tensor([True, True, False, True])}
    pruned = prune_lowest(weights, masks, 0.34)
    assert pruned["a"].tolist() == [False, True, False, True]
    assert masks["a"].tolist() == [True, True, False, True]


def test_equal_magnitudes_go_by_index():
    assert prune_lowest({"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.bool)}, 0.5)["a"].tolist() == [
        False, False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2, float("nan")])
def test_a_rate_outside_the_open_interval_is_refused(rate):
    with pytest.raises(ConfigError, match=r"pruning rate[\s\S]*inside \(0, 1\)"):
        prune_lowest({"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.bool)}, rate)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(TicketError, match=r"NaN or infinite[\s\S]*lower the learning rate"):
        prune_lowest({"a": torch.tensor([1.0, float("nan")])}, {"a": torch.ones(2, dtype=torch.bool)}, 0.5)


def test_everything_but_the_head_is_prunable_and_patterns_exclude():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Linear(2, 3), nn.Linear(3, 2)
    )
    found = dense_masks(model)
    assert set(found) == {"0.weight", "2.0.weight", "3.weight"}
    assert all(
        bool(m.all()) and m.dtype == torch.bool and m.shape == model.get_parameter(n).shape for n, m in found.items()
    )
    assert set(dense_masks(model, exclude=("0.*",))) == {"2.0.weight", "3.weight"}
    with pytest.raises(
        ConfigError, match=r"'4.weight' matches no convolution or hidden Linear[\s\S]*0.weight, 2.0.weight"
    ):
        dense_masks(model, exclude=("4.weight",))
    with pytest.raises(ConfigError, match="no convolution or hidden Linear is left to prune"):
        dense_masks(nn.Linear(2, 2))


def test_the_public_codes_rule_prunes_convolutions_only():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3), nn.Linear(3, 2))
    assert set(dense_masks(model, linear=False)) == {"0.weight"}
    with pytest.raises(ConfigError, match=r"'1.weight' matches no convolution\n"):
        dense_masks(model, exclude=("1.weight",), linear=False)
    with pytest.raises(ConfigError, match="no convolution is left to prune"):
        dense_masks(model[1:], linear=False)


def test_a_layer_that_would_lose_its_last_weight_is_named():
    weights = {"big": torch.ones(8), "small": torch.full((2,), 0.1)}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    with pytest.raises(TicketError, match=r"leaves layer 'small' without a weight[\s\S]*a lower rate or fewer rounds"):
        prune_lowest(weights, masks, 0.3)


def test_without_a_linear_the_last_of_several_convolutions_is_the_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten())
    assert list(dense_masks(model)) == ["0.weight", "2.weight"]
    assert list(dense_masks(model, linear=False)) == ["0.weight", "2.weight", "3.weight"]
    assert list(dense_masks(model[:1])) == ["0.weight"]


def test_layers_that_share_a_weight_have_one_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    assert list(dense_masks(model)) == ["0.weight"]
    assert magnitude(dict(model.named_parameters()), dense_masks(model)).keys() == {"0.weight"}
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    head[4].weight = head[0].weight
    assert list(dense_masks(head)) == ["2.weight"]


def test_a_pattern_alone_is_one_pattern():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert list(dense_masks(model, exclude="0.weight")) == ["1.weight"]


def test_the_head_is_the_last_linear_or_the_last_of_several_convolutions():
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert head_of(convolutions) == "2.weight"
    assert head_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Conv2d(3, 4, 3))) == "1.weight"
    assert head_of(nn.Linear(2, 2)) == "weight"
    assert head_of(convolutions[:1]) is None
    assert head_of(nn.ReLU()) is None
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared[2].weight = shared[0].weight
    assert head_of(shared) == "0.weight"


def test_dynamic_sparse_training_masks_the_head_too():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3), nn.Linear(3, 2))
    assert list(dense_masks(model, head=True)) == ["0.weight", "2.weight", "3.weight"]
    assert list(dense_masks(model, head=True, linear=False)) == ["0.weight", "3.weight"]
    assert list(dense_masks(model, head=True, exclude="3.*")) == ["0.weight", "2.weight"]
    assert list(dense_masks(nn.Linear(2, 2), head=True)) == ["weight"]
    assert list(dense_masks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), head=True)) == [
        "0.weight",
        "1.weight",
    ]
    with pytest.raises(ConfigError, match=r"'9.weight' matches no convolution or Linear\n"):
        dense_masks(model, head=True, exclude="9.weight")
