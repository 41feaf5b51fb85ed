"""Channel scores against their definitions, one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.coupling import ChannelPool
from deploy_sparse.sparsify.umm import CHANNEL_SCORES, channel_score, pool_scores
from deploy_sparse.structure import Slice

WEIGHT = torch.tensor([[[[1.0, -3.0]], [[9.0, 9.0]]], [[[9.0, 9.0]], [[9.0, 9.0]]], [[[2.0, 2.0]], [[-2.0, 4.0]]]])
MASK = torch.tensor([[[[1, 1]], [[0, 0]]], [[[0, 0]], [[0, 0]]], [[[1, 0]], [[1, 1]]]]) > 0  # [3, 2, 1, 2]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("umm", [4 / 4, 0, 8 / 4]),
        ("surviving_magnitude", [4 / 2, 0, 8 / 3]),
        ("connections", [2 / 4, 0, 3 / 4]),
        ("kernels", [1 / 2, 0, 2 / 2]),
    ],
)
def test_every_score_of_a_small_layer(criterion, expected):
    found = channel_score(criterion, WEIGHT, MASK)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


def test_the_four_scores_of_the_released_code():
    assert CHANNEL_SCORES == ("umm", "surviving_magnitude", "connections", "kernels")


@given(st.integers(0, 999), st.sampled_from(CHANNEL_SCORES), st.sampled_from([(5, 7), (4, 3, 3, 3), (3, 2, 5)]))
@settings(max_examples=60, deadline=None)
def test_scores_row_by_row(seed, criterion, shape):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.3
    found = channel_score(criterion, torch.nn.Parameter(weight), mask)
    assert not found.requires_grad
    for row in range(shape[0]):
        survivors = weight[row][mask[row]].double().abs()
        kernels = mask[row].reshape(shape[1], -1)
        expected = {
            "umm": survivors.sum() / weight[row].numel(),
            "surviving_magnitude": survivors.mean() if len(survivors) else torch.tensor(0.0),
            "connections": mask[row].double().mean(),
            "kernels": torch.tensor(sum(bool(kernel.any()) for kernel in kernels) / shape[1]),
        }[criterion]
        assert float(found[row]) == pytest.approx(float(expected))
    if len(shape) == 2:
        assert torch.equal(channel_score("kernels", weight, mask), channel_score("connections", weight, mask))


def test_half_precision_weights_are_summed_exactly():
    weight = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert channel_score("umm", weight, torch.ones(1, 4096, dtype=torch.bool)).tolist() == [1.0]


def test_masked_weights_that_are_not_zero_do_not_count():
    weight = torch.tensor([[1.0, torch.nan]])
    assert channel_score("umm", weight, torch.tensor([[True, False]])).tolist() == [0.5]


def test_a_pool_takes_the_mean_of_its_writers():
    pool = ChannelPool("a", 2, (Slice("a", 0, (-1, 0, 1)), Slice("b", 0, (1, 0))), ())
    weights = {"a": torch.tensor([[50.0, 50], [1, 3], [5, 5]]), "b": torch.tensor([[10.0, 20, 0], [-3, 6, 0]])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    found = pool_scores(pool, "umm", weights, masks)
    assert found.dtype == torch.float64
    assert found.tolist() == [(2 + 3) / 2, (5 + 10) / 2]


def test_rows_of_one_layer_that_write_the_same_channel_count_as_one_writer():
    pool = ChannelPool("a", 2, (Slice("a", 0, (0, 1, 0, 1)), Slice("b", 0, (0, 1))), ())
    weights = {"a": torch.tensor([[1.0], [2], [3], [6]]), "b": torch.tensor([[4.0], [8]])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    assert pool_scores(pool, "umm", weights, masks).tolist() == [(2 + 4) / 2, (4 + 8) / 2]


def test_an_unknown_score_is_refused():
    with pytest.raises(ConfigError, match=r"unknown channel score 'kernel'[\s\S]*umm, surviving[\s\S]*mean 'kernels'"):
        channel_score("kernel", WEIGHT, MASK)
