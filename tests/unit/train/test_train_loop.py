"""Training: exact resume at every step, masks held, best epoch by validation, clear failure."""

import pytest
import torch
from torch import nn
from train_samples import CONFIG, MASKS, STEPS, GradientMemory, StopAfter, network, same, splits, train

from deploy_sparse.errors import ConfigError, Interrupted, TicketError
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.train.average import MovingAverage
from deploy_sparse.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.loop import FitConfig, fit
from deploy_sparse.train.runtime import RuntimeConfig, start_runtime
from deploy_sparse.train.step import TrainStep
from deploy_sparse.train.tensors import copy_state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def assert_equal(resumed, whole):
    assert same(resumed.last, whole.last)
    assert same(resumed.best, whole.best)
    assert same(resumed.early, whole.early)
    assert same(resumed.early_memory, whole.early_memory)
    assert same(resumed.best_masks, whole.best_masks)
    assert same(resumed.last_masks, whole.last_masks)
    assert (resumed.best_epoch, resumed.validation_accuracy) == (whole.best_epoch, whole.validation_accuracy)


@pytest.mark.parametrize("step", range(STEPS))
def test_interrupted_at_any_step_ends_with_the_same_bits(tmp_path, undisturbed, step):
    with pytest.raises(Interrupted, match=f"saved at step {step}"):
        train(tmp_path, StopAfter(step))
    assert_equal(train(tmp_path), undisturbed)


VARIANTS = {
    "moving average": {"config": CONFIG.model_copy(update={"ema": 0.9})},
    "no momentum": {"config": CONFIG.model_copy(update={"momentum": 0.0})},
    "plain momentum": {"config": CONFIG.model_copy(update={"nesterov": False, "schedule": "step"})},
    "method with a state": {"method": GradientMemory},
    "bf16, channels last": {"runtime": {"precision": "bf16", "channels_last": True}},
    "late start": {"start_epoch": 1, "memory": {"momentum_buffer/0.weight": torch.ones(4, 1, 3, 3)}, "keep_epoch": 2},
}


def variant(name):
    options = dict(VARIANTS[name])
    if "method" in options:
        options["method"] = options["method"]()
    if "runtime" in options:
        options["runtime"] = start_runtime(RuntimeConfig(device="cpu", threads=1, **options["runtime"]))
    return options


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_training_resumes_exactly(tmp_path, undisturbed, name):
    whole = train(tmp_path / "whole", **variant(name))
    for step in (1, 4):
        folder = tmp_path / str(step)
        with pytest.raises(Interrupted):
            train(folder, StopAfter(step), **variant(name))
        assert_equal(train(folder, **variant(name)), whole)
    assert not same(whole.last, undisturbed.last)  # the variant does something


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


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_masks_hold_in_every_state_that_is_returned(tmp_path, ema):
    fitted = train(tmp_path, config=CONFIG.model_copy(update={"ema": ema}))
    buffer = fitted.early_memory["momentum_buffer/0.weight"]
    for weight in (*(state["0.weight"] for state in (fitted.last, fitted.best, fitted.early)), buffer):
        assert bool((weight[~MASKS["0.weight"]] == 0).all())
        assert bool((weight[MASKS["0.weight"]] != 0).any())


def test_the_kept_epoch_is_its_start(tmp_path, undisturbed):
    first = train(tmp_path, keep_epoch=0)
    started = network()
    StaticMasks(MASKS).start_(started)
    assert same(first.early, copy_state(started))
    assert first.early_memory == {}
    assert not same(first.early, undisturbed.early)
    assert undisturbed.early_memory.keys() == {f"momentum_buffer/{n}" for n, _ in started.named_parameters()}


def test_the_rest_of_a_training_from_its_kept_epoch_is_the_training_itself(tmp_path, undisturbed):
    model = network()
    model.load_state_dict(undisturbed.early)
    options = {"seed": 3, "start_epoch": 1}
    rest = fit(model, splits(), CONFIG, StaticMasks(MASKS), checkpoints=tmp_path / "a", memory=undisturbed.early_memory, **options)  # fmt: skip
    assert same(rest.last, undisturbed.last)
    model.load_state_dict(undisturbed.early)
    fresh = fit(model, splits(), CONFIG, StaticMasks(MASKS), checkpoints=tmp_path / "b", **options)
    assert not same(fresh.last, undisturbed.last)


def test_momentum_of_masked_weights_is_not_taken_up(tmp_path):
    seen = []

    class Watching(StaticMasks):
        def after_backward_(self, model, step):
            seen.append(model[0].weight.detach().clone())

    memory = {"momentum_buffer/0.weight": torch.full((4, 1, 3, 3), 5.0)}
    runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
    training = TrainStep(network(), CONFIG, Watching(MASKS), runtime, memory)
    buffer = training.optimizer.state[training.model[0].weight]["momentum_buffer"]
    assert torch.equal(buffer, 5.0 * MASKS["0.weight"])


def test_hooks_get_the_model_itself_the_step_and_dense_gradients(tmp_path):
    seen = []

    class Watching(StaticMasks):
        def after_backward_(self, model, step):
            masked = model[0].weight.grad[~self.masks["0.weight"]]
            seen.append(("backward", type(model), step, bool((masked != 0).any())))

        def after_step_(self, model, optimizer, step):
            super().after_step_(model, optimizer, step)
            seen.append(("step", type(model), step, bool((model[0].weight[~self.masks["0.weight"]] == 0).all())))

    model = network()
    with torch.no_grad():
        model[1].bias.fill_(1.0)  # dead rows still get gradients through a live BatchNorm
    fit(model, splits(), CONFIG, Watching(MASKS), seed=3, checkpoints=tmp_path, start_epoch=2)
    assert seen == [(kind, nn.Sequential, step, True) for step in (6, 7, 8) for kind in ("backward", "step")]


def test_the_best_epoch_is_the_earliest_with_the_best_validation_accuracy(tmp_path):
    rows = []
    model = network()
    fitted = fit(model, splits(), CONFIG, Method(), seed=0, checkpoints=tmp_path, on_epoch=rows.append)
    best = max(row["validation_accuracy"] for row in rows)
    assert fitted.best_epoch == next(row["epoch"] for row in rows if row["validation_accuracy"] == best)
    model.load_state_dict(fitted.best)
    assert accuracy(model, splits().validation) == fitted.validation_accuracy == best
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(0 < row["loss"] < 5 and 0 <= row["learning_rate"] <= CONFIG.lr for row in rows)


def test_rows_are_the_same_after_a_resume(tmp_path):
    whole, parts = [], []
    train(tmp_path / "whole", on_epoch=whole.append)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", StopAfter(4), on_epoch=parts.append)
    train(tmp_path / "parts", on_epoch=parts.append)
    assert parts == whole


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(TicketError, match=r"loss is nan in epoch 0[\s\S]*lower fit.lr"):
        fit(model, splits(), CONFIG, Method(), seed=0, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FitConfig(batch_size=64), {}, r"fit.batch_size = 64[\s\S]*at most 26"),
        (CONFIG, {"start_epoch": 3}, r"starts at epoch 3 with fit.epochs = 3[\s\S]*from 0 to 2"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, config, options, message):
    with pytest.raises(ConfigError, match=message):
        fit(network(), splits(), config, Method(), seed=0, checkpoints=tmp_path, **options)


def test_augmentation_can_be_left_out(tmp_path, undisturbed):
    plain = train(tmp_path, config=CONFIG.model_copy(update={"augment": False}))
    assert not same(plain.last, undisturbed.last)


def test_the_moving_average_is_the_one_it_says():
    """Weights and running statistics averaged, counters copied."""
    model, decay = network(), 0.3
    average, expected = MovingAverage(model, decay), copy_state(model)
    for number in range(4):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
        average.update_(model)
        keep = min(decay, (1 + number) / (10 + number))
        new = copy_state(model)
        expected = {k: keep * expected[k] + (1 - keep) * v if v.is_floating_point() else v for k, v in new.items()}
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert int(average.module[1].num_batches_tracked) == 4


def test_the_average_is_evaluated_and_kept_and_the_model_is_rewound_to(tmp_path):
    rows, model = [], network()
    config = CONFIG.model_copy(update={"ema": 0.9})
    fitted = fit(model, splits(), config, Method(), seed=3, checkpoints=tmp_path, keep_epoch=1, on_epoch=rows.append)
    assert not same(fitted.last, copy_state(model))
    kept = network()
    kept.load_state_dict(fitted.last)
    assert accuracy(kept, splits().validation) == rows[-1]["validation_accuracy"]
    plain = train(tmp_path / "plain", method=Method())
    assert same(fitted.early, plain.early)


def test_the_average_obeys_masks_that_moved(tmp_path):
    class Moving(StaticMasks):
        def after_step_(self, model, optimizer, step):
            if step == 5:
                self.__init__(MASKS)
                self.start_(model)
            super().after_step_(model, optimizer, step)

    fitted = train(tmp_path, config=CONFIG.model_copy(update={"ema": 0.9}), method=Moving({}))
    assert bool((fitted.last["0.weight"][~MASKS["0.weight"]] == 0).all())
    assert bool((fitted.last["0.weight"][MASKS["0.weight"]] != 0).all())


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
