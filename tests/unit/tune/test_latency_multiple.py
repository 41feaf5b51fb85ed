"""The multiple is read from times, and not claimed where noise hides it."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_samples import CONV, staircase

from deploy_sparse.tune.latency.multiple import Staircase, counts_of, multiple_of
from deploy_sparse.tune.latency.shapes import LayerShape


def read(ms, noise=0.0, seed=0, shape=CONV):
    lot = random.Random(seed)
    passes = tuple(
        {count: ms(shape.with_counts(count, count)) * math.exp(lot.gauss(0, noise)) for count in counts_of(shape)}
        for _ in range(4)
    )
    return Staircase(shape, passes)


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
def test_a_staircase_is_found(step):
    assert read(staircase(step)).multiple == step


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 32]), st.integers(0, 10_000))
def test_noise_of_two_percent_does_not_hide_a_staircase_of_vectors(step, seed):
    assert read(staircase(step), 0.02, seed).multiple == step


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 4, 8, 16]), st.floats(0, 0.3), st.integers(0, 10_000))
def test_no_noise_makes_a_step_look_longer_than_it_is(step, noise, seed):
    assert read(staircase(step), noise, seed).multiple <= step


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_no_staircase_is_seen_in_a_slope(seed):
    assert read(staircase(1), 0.01, seed).multiple == 1


def test_where_noise_hides_everything_no_multiple_is_claimed():
    found = read(staircase(16), 0.8, seed=3)
    assert found.noise > 0.05
    assert found.multiple == 1


def test_counts_that_leave_the_fast_path_are_dearest():
    """As ONNX Runtime does: steps of 16, and odd counts dearer than the next step."""
    steps = staircase(16)
    found = read(lambda shape: steps(shape) * (1 if shape.c_in % 4 == 0 else 1.4))
    assert found.multiple == 16
    assert found.dearest == pytest.approx(1.4)


def test_the_time_of_a_count_is_the_median_of_its_passes():
    found = Staircase(CONV, ({64: 1.0, 65: 2.0}, {64: 4.0, 65: 2.0}, {64: 1.5, 65: 2.0}))
    assert found.ms == {64: 1.5, 65: 2.0}
    assert Staircase(CONV, ({64: 1.0}, {64: 1.0})).noise == 0


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_the_passes_say_what_noise_there_is(noise):
    found = [read(staircase(16), noise, seed).noise for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(noise * math.sqrt(math.pi / 2) / 2, rel=0.1)  # of a median of four


def test_counts_end_at_a_boundary_that_the_layer_has():
    assert max(counts_of(CONV)) == 128
    assert set(range(112, 129)) <= set(counts_of(CONV))
    assert max(counts_of(LayerShape("conv", 48, 100))) == 32
    assert counts_of(LayerShape("conv", 3, 64)) == ()
    assert counts_of(LayerShape("conv", 64, 64, groups=4)) == ()
    assert counts_of(LayerShape("depthwise", 64, 64, groups=64))


def test_the_layers_that_take_most_of_the_time_decide():
    sixteen, slope = read(staircase(16)), read(staircase(1))
    assert multiple_of([sixteen, slope], [2.0, 1.0]) == 16
    assert multiple_of([sixteen, slope, slope], [2.0, 1.5, 1.0]) == 1
    assert multiple_of([], []) == 1
