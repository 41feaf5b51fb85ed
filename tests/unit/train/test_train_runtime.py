"""Devices, precision, layouts and optional parts: what is refused, and that each does what it says."""

import sys
import types

import pytest
import torch
from train_samples import CONFIG, MASKS, network, same, splits, train

from deploy_sparse.errors import ConfigError, MissingDependencyError
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.train.board import Board
from deploy_sparse.train.distributed import World
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.loop import fit
from deploy_sparse.train.runtime import RuntimeConfig, check_runtime, start_runtime
from deploy_sparse.train.step import TrainStep


def started(**options):
    return start_runtime(RuntimeConfig(device="cpu", threads=1, **options))


@pytest.mark.parametrize(
    ("options", "gpus", "rank", "message"),
    [
        ({"device": "cuda"}, 0, 0, r'runtime.device = "cuda" without a usable GPU[\s\S]*"auto" or "cpu"'),
        ({"device": "cuda"}, 2, 2, r"process 3 of this machine has no GPU of its own, there are 2[\s\S]*per-node 2"),
        ({"device": "auto", "precision": "fp16"}, 0, 0, r'"fp16" on the CPU[\s\S]*--runtime.precision bf16'),
        ({"device": "cpu", "precision": "fp16"}, 1, 0, r'"fp16" on the CPU'),
        ({"device": "cpu", "sync_batchnorm": True}, 1, 0, r"sync_batchnorm on the CPU"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(monkeypatch, options, gpus, rank, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("deploy_sparse.train.runtime.world", lambda: World(rank, 4, rank))
    with pytest.raises(ConfigError, match=message):
        check_runtime(RuntimeConfig(**options))


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    for found in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        config = RuntimeConfig(precision="fp16")
        if found:
            check_runtime(config)
        else:
            with pytest.raises(ConfigError, match="fp16"):
                check_runtime(config)


def test_starting_sets_threads_and_determinism():
    runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
    assert runtime.device == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    start_runtime(RuntimeConfig(device="cpu", threads=1, deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


def test_bf16_computes_low_and_keeps_weights_gradients_and_evaluation_in_fp32(tmp_path):
    seen = set()
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    fit(model, splits(), CONFIG, Method(), seed=3, checkpoints=tmp_path, runtime=started(precision="bf16"))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_bf16_ends_close_to_fp32(tmp_path):
    low = train(tmp_path / "low", runtime=started(precision="bf16")).last
    full = train(tmp_path / "full", runtime=started()).last
    assert not same(low, full)
    for name, weight in full.items():
        torch.testing.assert_close(low[name], weight, atol=0.05, rtol=0.1)


def test_channels_last_reaches_weights_images_and_momentum_but_not_what_is_kept(tmp_path):
    runtime = started(channels_last=True)
    training = TrainStep(
        network(), CONFIG, StaticMasks(MASKS), runtime, {"momentum_buffer/0.weight": torch.ones(4, 1, 3, 3)}
    )
    layout = {"memory_format": torch.channels_last}
    images = torch.zeros(2, 3, 4, 4)
    assert not images.is_contiguous(**layout)
    assert next(runtime.batches([(images, torch.zeros(2))]))[0].is_contiguous(**layout)
    assert training.model[0].weight.is_contiguous(**layout)
    assert all(t.is_contiguous() for t in train(tmp_path, runtime=runtime).last.values())


def test_compile_wraps_the_training_forward_only(tmp_path, monkeypatch):
    calls = []

    def compiled(module):
        def forward(images):
            calls.append((type(module), module.training))
            return module(images)

        return forward

    plain = train(tmp_path / "plain", runtime=started())
    monkeypatch.setattr(torch, "compile", compiled)
    wrapped = train(tmp_path / "compiled", runtime=started(compile=True))
    assert calls == [(torch.nn.Sequential, True)] * 9
    assert same(wrapped.last, plain.last)


@pytest.mark.slow
def test_a_really_compiled_training_ends_close_to_a_plain_one(tmp_path):
    plain = train(tmp_path / "plain", runtime=started()).last
    compiled = train(tmp_path / "compiled", runtime=started(compile=True)).last
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        (RuntimeError("x_cuda does not have a deterministic implementation, but\nmore"), ConfigError, r"no reproducible form on this device \(x_cuda does[\s\S]*--runtime.deterministic false"),
        (torch.OutOfMemoryError("CUDA out of memory"), ConfigError, r"ran out of memory[\s\S]*smaller --fit.batch_size"),
        (RuntimeError("shapes"), RuntimeError, r"^shapes$"),
    ],
)  # fmt: skip
def test_errors_of_a_step_say_what_to_do(tmp_path, problem, kind, message):
    class Failing(Method):
        def after_backward_(self, model, step):
            raise problem

    with pytest.raises(kind, match=message):
        fit(network(), splits(), CONFIG, Failing(), seed=3, checkpoints=tmp_path)


def test_accuracy_takes_networks_and_functions():
    split = splits().validation
    model = network().train()
    found = accuracy(model, split)
    assert not model.training
    logits = model(split.read(torch.arange(len(split))))
    assert found == int((logits.argmax(1) == split.labels).sum()) / len(split)
    assert accuracy(lambda images: model(images).detach(), split, batch_size=5) == found
    perfect = iter(split.labels.split(5))
    assert accuracy(lambda images: torch.nn.functional.one_hot(next(perfect), 3), split, batch_size=5) == 1.0


def test_tensorboard_is_asked_for_by_name_when_missing(monkeypatch):
    monkeypatch.setattr("deploy_sparse.train.runtime.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"without the package tensorboard[\s\S]*deploy-sparse\[tensorb"):
        check_runtime(RuntimeConfig(tensorboard=True))
    check_runtime(RuntimeConfig())


class Writer:
    """Stands in for TensorBoard's, which need not be installed."""

    made = []  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def close(self):
        self.closed = True


def test_the_board_gets_the_rows_and_replaces_those_of_an_earlier_attempt(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    Writer.made.clear()
    with Board(tmp_path, on=True) as board:
        board.add({"epoch": 2, "loss": 0.5, "validation_accuracy": 0.75})
        board.add({"epoch": 3, "loss": 0.25, "validation_accuracy": 0.5})
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 2, True)
    assert writer.rows == [
        ("loss", 0.5, 2),
        ("validation_accuracy", 0.75, 2),
        ("loss", 0.25, 3),
        ("validation_accuracy", 0.5, 3),
    ]
    with Board(tmp_path, on=False) as board:
        board.add({"epoch": 0, "loss": 0.5})
    assert len(Writer.made) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_on_a_gpu_resumes_exactly(tmp_path, precision, optimizer):
    from train_samples import StopAfter

    from deploy_sparse.errors import Interrupted

    runtime = start_runtime(RuntimeConfig(device="cuda", precision=precision, channels_last=True))
    config = CONFIG.model_copy(update={"ema": 0.9, "optimizer": optimizer, "decay_norms": optimizer == "sgd"})
    whole = train(tmp_path / "whole", runtime=runtime, config=config)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", StopAfter(4), runtime=runtime, config=config)
    parts = train(tmp_path / "parts", runtime=runtime, config=config)
    assert same(parts.last, whole.last)
    assert same(parts.early_memory, whole.early_memory)
    assert {tensor.device.type for tensor in whole.last.values()} == {"cpu"}
