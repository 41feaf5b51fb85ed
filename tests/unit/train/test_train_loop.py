"""Training: exact resume at every step, masks held, best epoch by validation, clear failure."""

import pytest
import torch
from torch import nn

from deploy_sparse.data.splits import Split, Splits
from deploy_sparse.errors import ConfigError, Interrupted, TicketError
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from deploy_sparse.train.loop import FitConfig, accuracy, copy_state, fit, learning_rate

CONFIG = FitConfig(epochs=3, batch_size=8, lr=0.05, warmup_epochs=1, checkpoint_every=1, shift=1)
STEPS = 3 * 3


def splits(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def split(count):
        labels = torch.arange(count) % 3
        images = torch.randn(count, 1, 4, 4, generator=generator) + labels[:, None, None, None]
        return Split(images, labels)

    return Splits("toy", 3, split(26), split(12), split(12))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


MASKS = {"0.weight": torch.tensor([True, True, False, True]).reshape(4, 1, 1, 1).expand(4, 1, 3, 3)}


class StopAfter:
    def __init__(self, polls):
        self.left = polls

    def __call__(self, saved):
        self.left -= 1
        if self.left < 0:
            raise Interrupted(f"stopped: {saved}", signal_number=15, fix="go on")


def train(folder, poll=lambda saved: None, **options):
    model = network()
    return fit(
        model, splits(), CONFIG, StaticMasks(MASKS), seed=3, checkpoints=folder, keep_epoch=1, poll=poll, **options
    )


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", range(STEPS))
def test_interrupted_at_any_step_ends_with_the_same_bits(tmp_path, undisturbed, step):
    with pytest.raises(Interrupted, match=f"saved at step {step}"):
        train(tmp_path, StopAfter(step))
    resumed = train(tmp_path)
    assert same(resumed.last, undisturbed.last)
    assert same(resumed.best, undisturbed.best)
    assert same(resumed.early, undisturbed.early)
    assert (resumed.best_epoch, resumed.validation_accuracy) == (
        undisturbed.best_epoch,
        undisturbed.validation_accuracy,
    )


def test_interrupted_again_and_again(tmp_path, undisturbed):
    for _ in range(STEPS - 1):
        with pytest.raises(Interrupted):
            train(tmp_path, StopAfter(1))
    assert same(train(tmp_path).last, undisturbed.last)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, undisturbed):
    with pytest.raises(Interrupted):
        train(tmp_path, StopAfter(8))
    newest = sorted(tmp_path.glob("step-*"))[-1] / "checkpoint.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said = []
    assert same(train(tmp_path, warn=said.append).last, undisturbed.last)
    assert len(said) == 1
    assert "passing over a damaged checkpoint" in said[0]


def test_masks_hold_in_every_state_that_is_returned(undisturbed):
    for state in (undisturbed.last, undisturbed.best):
        assert bool((state["0.weight"][~MASKS["0.weight"]] == 0).all())


def test_the_kept_epoch_is_its_start(tmp_path, undisturbed):
    first = fit(network(), splits(), CONFIG, StaticMasks(MASKS), seed=3, checkpoints=tmp_path, keep_epoch=0)
    started = network()
    StaticMasks(MASKS).start_(started)
    assert same(first.early, copy_state(started))
    assert not same(first.early, undisturbed.early)


def test_the_best_epoch_is_the_earliest_with_the_best_validation_accuracy(tmp_path):
    rows = []
    model = network()
    fitted = fit(model, splits(), CONFIG, Method(), seed=0, checkpoints=tmp_path, on_epoch=rows.append)
    best = max(row["validation_accuracy"] for row in rows)
    assert fitted.best_epoch == next(row["epoch"] for row in rows if row["validation_accuracy"] == best)
    model.load_state_dict(fitted.best)
    assert accuracy(model, splits().validation) == fitted.validation_accuracy == best


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(TicketError, match=r"loss is nan in epoch 0[\s\S]*lower fit.lr"):
        fit(model, splits(), CONFIG, Method(), seed=0, checkpoints=tmp_path)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fit.batch_size = 64[\s\S]*at most 26"):
        fit(network(), splits(), FitConfig(batch_size=64), Method(), seed=0, checkpoints=tmp_path)


def test_learning_rate_warms_up_and_decays():
    config = FitConfig(epochs=11, warmup_epochs=1, lr=1.0)
    assert learning_rate(config, 0) < 0.01
    assert learning_rate(config, 1) == pytest.approx(1.0)
    assert learning_rate(config, 6) == pytest.approx(0.5)
    assert learning_rate(config, 11) == pytest.approx(0.0, abs=1e-12)
    stepped = FitConfig(epochs=8, warmup_epochs=0, lr=1.0, schedule="step")
    assert [round(learning_rate(stepped, e), 6) for e in (0, 3.9, 4, 6)] == [1.0, 1.0, 0.1, 0.01]


def test_only_the_two_newest_checkpoints_stay(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Checkpoint(step, {"x": torch.tensor([float(step)])}, {"v": step}))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    found = load_checkpoint(tmp_path)
    assert (found.step, found.values, found.tensors["x"].item()) == (3, {"v": 3}, 3.0)
    assert load_checkpoint(tmp_path / "none") is None


def test_random_layers_do_not_depend_on_where_a_training_was_stopped(tmp_path):
    def run(folder, poll=lambda saved: None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
        return fit(model, splits(), CONFIG, Method(), seed=3, checkpoints=folder, poll=poll).last

    whole = run(tmp_path / "a")
    with pytest.raises(Interrupted):
        run(tmp_path / "b", StopAfter(4))
    assert same(run(tmp_path / "b"), whole)


def test_a_stop_while_the_loss_is_not_finite_saves_nothing_and_still_stops(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(Interrupted):
        fit(model, splits(), CONFIG, Method(), seed=0, checkpoints=tmp_path, poll=StopAfter(2))
    assert not list(tmp_path.iterdir())
