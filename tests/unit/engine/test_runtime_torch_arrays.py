"""Torch engines on arrays that are on the GPU, with CUDA's streams recorded and everything computed on the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_fakes import on_cuda
from torch import nn
from torch_samples import target_of

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.cuda import arrays as device_arrays
from deploy_sparse.engine.pytorch import session as _torch_session
from deploy_sparse.engine.pytorch.session import TorchSession
from deploy_sparse.engine.runner import Runner
from deploy_sparse.errors import EngineError


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    is_cuda = True


class Several(nn.Module):
    """An output computed, one that is the input, one that is a weight, and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return x * 2, x, self.weight + 0, x.t()


class Stream:
    """A stream that notes what it waits for."""

    log: list[tuple[str, str]]
    device = torch.device("cuda", 0)

    def __init__(self, name: object = "own") -> None:
        self.name, self.cuda_stream = str(name), 77

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, other.name))

    def synchronize(self) -> None:
        self.log.append((self.name, "the host"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Who waited for whom; CUDA as far as a session asks for it."""
    Stream.log, current = [], [Stream("the caller's")]

    @contextmanager
    def on(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(_torch_session, "move_to_device_pass", lambda program, device: program)
    monkeypatch.setattr(TorchSession, "_ordered", lambda self, x: x)
    return Stream.log


@pytest.fixture
def runner(log, tmp_path: Path) -> Runner:
    engine = build_engine(Several(), target_of(), torch.randn(2, 3), tmp_path)
    target = target_of(device="cuda", block_kernel="never")
    names = [spec.name for spec in engine.inputs], [spec.name for spec in engine.outputs]
    session = TorchSession(engine.path.read_bytes(), target, *names, where="here", rebuild="again")
    return Runner(replace(engine, target=target), session)


def test_results_are_those_of_run_and_belong_to_the_caller(runner: Runner, log: list[tuple[str, str]]) -> None:
    feeds = runner.sample_inputs(4)
    expected = runner.run(feeds)
    log.clear()
    images = torch.from_numpy(feeds["input"]).as_subclass(OnGpu)
    results = runner.run_on_gpu({"input": images})
    assert log == [("own", "the caller's"), ("the caller's", "own")]  # and the host waits for nothing
    assert list(results) == [spec.name for spec in runner.outputs]
    for name, found in results.items():
        np.testing.assert_array_equal(found.numpy(), expected[name])
        assert found.is_contiguous()
        assert not found.requires_grad
        found.fill_(7)
    for name, found in runner.run_on_gpu({"input": images}).items():
        np.testing.assert_array_equal(found.numpy(), expected[name])


def test_results_go_where_the_caller_wants_them(runner: Runner) -> None:
    feeds = runner.sample_inputs(4)
    expected = runner.run(feeds)
    images = torch.from_numpy(feeds["input"]).as_subclass(OnGpu)
    first, second, *_ = expected
    given = torch.zeros(4, 3).as_subclass(OnGpu)
    results = runner.run_on_gpu({"input": images}, {second: given})
    assert results[second] is given
    np.testing.assert_array_equal(given.numpy(), expected[second])
    np.testing.assert_array_equal(results[first].numpy(), expected[first])
    with pytest.raises(EngineError, match=rf"'{first}' goes into an array float32 \[5, 3\](.|\n)*\[4, 3\]"):
        runner.run_on_gpu({"input": images}, {first: torch.zeros(5, 3).as_subclass(OnGpu)})


class Produced:
    """A tensor of another library, by DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        return on_cuda(self.tensor.__dlpack__())


def test_streams_of_other_libraries_are_waited_for(runner: Runner, log, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = runner.sample_inputs(4)
    expected, produced = runner.run(feeds), Produced(torch.from_numpy(feeds["input"]))
    views = device_arrays.device_views({"input": produced}, 77)
    monkeypatch.setattr(_torch_session, "_tensor", lambda array: array.tensor)
    log.clear()
    views = {"input": replace(views["input"], stream=5)}
    results = runner._session.run_on_gpu(views, {}, 77)
    assert log[0] == ("the caller's", "5")
    name = runner.outputs[0].name
    np.testing.assert_array_equal(results[name].numpy(), expected[name])
