"""When connectivity moves, and how far: the published settings' numbers."""

from dataclasses import replace

import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.exploration import PRESETS, Exploration, SoftBound

CIFAR = PRESETS["chase"](500, 160 * 500)
CIFAR = replace(CIFAR, soft=SoftBound(0.05, 130 * 500))
IMAGENET = PRESETS["chase"](2502, 100 * 2502)
IMAGENET = replace(IMAGENET, soft=SoftBound(0.05, 80 * 2502, final=0.005))


@pytest.mark.parametrize(
    ("soft", "epoch", "steps", "surplus"),
    [
        (CIFAR.soft, 0, 500, 0.05),
        (CIFAR.soft, 65, 500, 0.025),
        (CIFAR.soft, 129.99, 500, 0.0),
        (CIFAR.soft, 130, 500, 0.0),
        (IMAGENET.soft, 0, 2502, 0.05),
        (IMAGENET.soft, 40, 2502, 0.0275),
        (IMAGENET.soft, 79.99, 2502, 0.005),
        (IMAGENET.soft, 80, 2502, 0.0),  # the budget is met from here on
    ],
)
def test_chases_soft_bound_falls_by_a_cosine(soft, epoch, steps, surplus):
    assert soft.at(round(epoch * steps)) == pytest.approx(surplus, abs=1e-6)


@pytest.mark.parametrize(
    ("exploration", "epoch", "steps", "rate"),
    [(CIFAR, 130, 500, 0.0467), (CIFAR, 160, 500, 0.005), (IMAGENET, 80, 2502, 0.0523), (IMAGENET, 100, 2502, 0.005)],
)
def test_chases_late_exploration_rate(exploration, epoch, steps, rate):
    assert exploration.fraction_at(epoch * steps) == pytest.approx(rate, abs=1e-4)


def test_chase_prunes_to_the_budget_and_grows_the_surplus_then_moves_a_fraction():
    assert CIFAR.bounds(1000, 100, 150) == (100, 150)
    assert CIFAR.bounds(65_000, 100, 100) == (100, 100)
    assert CIFAR.bounds(66_000, 1000, 1000) == (1000 - 42, 1000)  # ⌈0.04147 · 1000⌉
    events = [taken for taken in range(1, 80_001) if CIFAR.due(taken)]
    assert events == list(range(1000, 80_000, 1000))  # none at the last step, after which nothing is trained


def test_the_soft_bound_ends_at_its_step_even_off_the_interval():
    odd = replace(CIFAR, soft=SoftBound(0.05, 1234))
    assert odd.due(1234)
    assert odd.bounds(1234, 100, 100) == (100, 100)
    late = Exploration(100, 200, soft=SoftBound(0.05, 300))
    assert [taken for taken in range(1, 500) if late.due(taken)] == [100, 300]


def test_rigl():
    rigl = PRESETS["rigl"](500, 1000)
    assert (rigl.growth, rigl.scope, rigl.interval, rigl.stop, rigl.soft) == ("gradient", "layer", 100, 750, None)
    assert [rigl.fraction_at(taken) for taken in (0, 375, 750)] == pytest.approx([0.3, 0.15, 0.0])
    assert [taken for taken in range(1001) if rigl.due(taken)] == [100, 200, 300, 400, 500, 600, 700]
    assert rigl.bounds(375, 100, 100) == (85, 100)


def test_set_is_random_and_constant_once_an_epoch():
    found = PRESETS["set"](37, 370)
    assert (found.growth, found.scope, found.interval) == ("random", "layer", 37)
    # not at the end of an epoch: it is validated there
    assert [taken for taken in range(371) if found.due(taken)] == [1 + 37 * epoch for epoch in range(1, 10)]
    assert [taken for taken in range(6) if PRESETS["set"](1, 5).due(taken)] == [1, 2, 3, 4]
    assert {found.fraction_at(taken) for taken in (1, 100, 369)} == {0.5}
    assert not any(found.listens(taken) for taken in range(370))  # it never needs a gradient


@pytest.mark.parametrize(
    ("name", "growth", "interval"), [("set-itop", "random", 1500), ("rigl-itop", "gradient", 4000)]
)
def test_itop_explores_longer_and_to_the_end(name, growth, interval):
    found = PRESETS[name](500, 100_000)
    assert (found.growth, found.interval, found.stop) == (growth, interval, 100_000)
    assert (found.fraction_at(0), found.fraction_at(100_000)) == pytest.approx((0.5, 0.005))


def test_mest_grows_at_random_under_a_soft_bound_that_ends_at_the_budget():
    found = PRESETS["mest"](500, 10_000)
    assert (found.growth, found.soft) == ("random", SoftBound(0.05, 8000))
    assert max(taken for taken in range(10_001) if found.due(taken)) == 8000
    assert found.bounds(8000, 100, 100) == (100, 100)


def test_chases_own_soft_bound_and_pool():
    found = PRESETS["chase"](500, 10_000)
    assert (found.soft, found.scope, found.growth, found.stop) == (SoftBound(0.05, 8000), "global", "gradient", 10_000)


@pytest.mark.parametrize(
    ("exploration", "total", "moves"),
    [
        (Exploration(10, 100), 11, True),
        (Exploration(10, 100), 10, False),  # nothing is trained after the last step
        (Exploration(10, 10), 100, False),
        (Exploration(1000, 2000, soft=SoftBound(0.1, 400)), 500, False),  # the end of a soft bound grows nothing
        (Exploration(10, 100, offset=5), 15, False),
    ],
)
def test_whether_anything_moves(exploration, total, moves):
    assert exploration.moves(total) is moves


def test_gradients_are_wanted_of_the_last_batches_before_an_update():
    one, three = Exploration(10, 100), Exploration(10, 100, gradient_batches=3)
    assert [taken for taken in range(1, 25) if one.listens(taken)] == [10, 20]
    assert [taken for taken in range(1, 25) if three.listens(taken)] == [8, 9, 10, 18, 19, 20]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interval": 0}, "interval 0"),
        ({"fraction": 0.1, "final_fraction": 0.2}, "fractions from 0.1 to 0.2"),
        ({"offset": 10}, "offset 10 of updates every 10 steps"),
        ({"gradient_batches": 11}, "averaged over 11 batches every 10 steps"),
        ({"growth": "gradents"}, "did you mean 'gradient'"),
        ({"scope": "all"}, "unknown scope 'all'"),
        ({"decay": "linear"}, "unknown decay 'linear'"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Exploration(**{"interval": 10, "stop": 100, **wrong})


@pytest.mark.parametrize("wrong", [(-0.1, 10, 0.0), (0.05, 0, 0.0), (0.05, 10, 0.06), (1.0, 10, 0.0)])
def test_a_nonsensical_soft_bound_is_refused(wrong):
    with pytest.raises(ConfigError, match="soft bound"):
        SoftBound(*wrong)
