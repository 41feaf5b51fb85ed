"""Methods whose masks move: which epoch is kept, with which masks, and exact resume with either optimizer."""

import pytest
import torch
from train_samples import CONFIG, STEPS, Moving, StopAfter, same, train

from deploy_sparse.errors import Interrupted
from deploy_sparse.sparsify.method import Method
from deploy_sparse.train import loop

READY = 5  # the last step of epoch 1; the masks move again at step 7
ADAM = {"optimizer": "adamw", "lr": 0.01}
VARIANTS = {
    "sgd, norms not decayed": {"decay_norms": False},
    "adamw": ADAM,
    "adamw, norms not decayed": {**ADAM, "decay_norms": False},
    "adamw, moving average": {**ADAM, "ema": 0.9},
    "adamw, rare checkpoints": {**ADAM, "checkpoint_every": 3},
}


@pytest.fixture(autouse=True)
def falling(monkeypatch):
    """Validation accuracies that fall from epoch to epoch."""
    monkeypatch.setattr(loop, "accuracy", lambda model, *_, **__: 1.0 - int(model[1].num_batches_tracked) / 100)


def moving(folder, change, poll=lambda saved: None, **options):
    return train(folder, poll, config=CONFIG.model_copy(update=change), method=Moving(READY), **options)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_interrupted_at_any_step_ends_with_the_same_bits_masks_and_rows(tmp_path, change):
    rows = []
    whole = moving(tmp_path / "whole", change, on_epoch=rows.append)
    for step in range(STEPS):
        folder, found = tmp_path / str(step), []
        with pytest.raises(Interrupted):
            moving(folder, change, StopAfter(step), on_epoch=found.append)
        resumed = moving(folder, change, on_epoch=found.append)
        for part in ("last", "last_masks", "best", "best_masks", "early", "early_memory"):
            assert same(getattr(resumed, part), getattr(whole, part)), part
        assert (resumed.best_epoch, resumed.validation_accuracy) == (whole.best_epoch, whole.validation_accuracy)
        assert found == rows


def test_the_best_epoch_is_one_that_is_ready_and_has_the_masks_of_its_own_weights(tmp_path):
    fitted = moving(tmp_path, {})
    assert (fitted.best_epoch, fitted.validation_accuracy) == (1, pytest.approx(0.94))
    best, last = fitted.best_masks["0.weight"], fitted.last_masks["0.weight"]
    assert bool((fitted.best["0.weight"][~best] == 0).all())
    assert bool((fitted.best["0.weight"][~last] != 0).any())
    assert bool((fitted.last["0.weight"][~last] == 0).all())
    assert bool((fitted.last["0.weight"][~best] != 0).any())


@pytest.mark.parametrize(("ready", "best"), [(0, 0), (2, 0), (3, 1), (6, 2), (STEPS, 2)])
def test_a_network_that_is_not_ready_is_not_kept_unless_it_is_the_last(tmp_path, ready, best):
    assert train(tmp_path, method=Moving(ready)).best_epoch == best


def test_a_method_that_is_always_ready_keeps_the_first_of_falling_epochs(tmp_path):
    fitted = train(tmp_path, method=Method())
    assert (fitted.best_epoch, fitted.best_masks, fitted.last_masks) == (0, {}, {})


def test_rows_hold_the_methods_figures(tmp_path):
    rows = []
    moving(tmp_path, {}, on_epoch=rows.append)
    assert [row.keys() for row in rows] == [{"epoch", "loss", "validation_accuracy", "learning_rate", "moved"}] * 3
    assert 0 < rows[0]["moved"] < rows[1]["moved"] < rows[2]["moved"]


def test_the_masks_that_come_back_are_copies(tmp_path):
    method = Moving()
    fitted = train(tmp_path, method=method)
    last = fitted.last_masks["0.weight"].clone()
    method.masks["0.weight"].logical_not_()
    assert torch.equal(fitted.last_masks["0.weight"], last)


def test_a_moving_average_is_kept_under_the_masks_of_its_epoch(tmp_path):
    fitted = moving(tmp_path, {"ema": 0.9})
    for weights, masks in ((fitted.best, fitted.best_masks), (fitted.last, fitted.last_masks)):
        mask = masks["0.weight"]
        assert bool((weights["0.weight"][~mask] == 0).all())
        assert bool((weights["0.weight"][mask] != 0).any())
