"""The learning rate at every moment, and what is refused before training."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.config import config_from
from deploy_sparse.errors import ConfigError
from deploy_sparse.train.loop import FitConfig, check_batch_size, learning_rate


def test_cosine_warms_up_and_decays_to_zero():
    config = FitConfig(epochs=11, warmup_epochs=1, lr=1.0)
    assert learning_rate(config, 0) < 0.01
    assert learning_rate(config, 0.5) == pytest.approx(0.5, abs=0.01)
    assert learning_rate(config, 1) == pytest.approx(1.0)
    assert learning_rate(config, 6) == pytest.approx(0.5)
    assert learning_rate(config, 11) == pytest.approx(0.0, abs=1e-12)


def test_steps_fall_at_a_half_and_three_quarters_by_default():
    config = FitConfig(epochs=8, warmup_epochs=0, lr=1.0, schedule="step")
    assert [round(learning_rate(config, e), 6) for e in (0, 3.9, 4, 5.9, 6)] == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_steps_fall_at_the_milestones_by_gamma_and_warm_up_counts():
    config = FitConfig(epochs=160, warmup_epochs=5, lr=0.1, schedule="step", milestones=(80, 120), gamma=0.5)
    rates = [round(learning_rate(config, e), 6) for e in (2.5, 5, 79.99, 80, 119.99, 120, 159.99)]
    assert rates == [pytest.approx(0.05, abs=1e-4), 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(0, 20), st.sampled_from(["cosine", "step"]), st.floats(0, 1))
def test_a_rate_is_never_above_the_peak_nor_below_zero(epochs, warmup, schedule, where):
    config = FitConfig(epochs=epochs, warmup_epochs=warmup, lr=0.3, schedule=schedule)
    assert 0 <= learning_rate(config, where * epochs) <= 0.3 * (1 + 1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"milestones": [0]}, r"milestones.0 = 0"),
        ({"shift": 1}, r"unknown key 'shift'"),
        ({"ema": 1.0}, r"ema = 1.0[\s\S]*less than 1"),
    ],
)
def test_unusable_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from(FitConfig, values)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match=r"fit.batch_size = 64 with 26 training images[\s\S]*at most 26"):
        check_batch_size(FitConfig(batch_size=64), 26)
    check_batch_size(FitConfig(batch_size=26), 26)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    from deploy_sparse.train import schedule
    from deploy_sparse.train.distributed import World

    monkeypatch.setattr(schedule, "world", lambda: World(1, 3, 1))
    with pytest.raises(ConfigError, match=r"fit.batch_size = 64 on 3 processes[\s\S]*--fit.batch_size 66"):
        check_batch_size(FitConfig(batch_size=64), 1000)
