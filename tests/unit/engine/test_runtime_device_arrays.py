"""Arrays on the GPU by three protocols, and how a runner checks them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_fakes import FakeGpu, on_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_fakes import Foreign

from deploy_sparse.engine.cuda import arrays as device_arrays
from deploy_sparse.engine.cuda.arrays import DeviceView, device_views, view_of_capsule
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.runner import Runner, load_engine
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import EngineError


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    is_cuda = True


@given(
    st.sampled_from([np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]),
    st.lists(st.integers(0, 4), max_size=4),
    st.permutations(range(4)),
)
@settings(max_examples=60, deadline=None)
def test_what_a_capsule_says_is_what_numpy_knows(dtype, shape: list[int], order: list[int]) -> None:
    """The layout of DLPack's structure, against NumPy's own capsules."""
    array = np.zeros(shape, dtype).transpose([axis for axis in order if axis < len(shape)])
    view = view_of_capsule(array, array.__dlpack__())
    assert view.form[:5] == (
        str(array.dtype), array.shape, array.flags.c_contiguous or array.size == 0, array.ctypes.data, array.nbytes,
    )  # fmt: skip


def test_capsules_of_torch() -> None:
    base = torch.zeros(4, 6, dtype=torch.bfloat16)
    for tensor, dense in ((base, True), (base[1:], True), (base.t(), False), (base[:, 1:], False)):
        form = view_of_capsule(tensor, tensor.__dlpack__()).form
        assert form[:5] == ("bfloat16", tuple(tensor.shape), dense, tensor.data_ptr(), tensor.numel() * 2)


def test_an_array_may_begin_behind_its_address() -> None:
    array = np.arange(6, dtype=np.float32)
    capsule = array.__dlpack__()
    before = view_of_capsule(array, capsule).form.pointer
    address = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(capsule), b"dltensor")
    ctypes.cast(address, ctypes.POINTER(device_arrays._Tensor)).contents.byte_offset = 8
    assert view_of_capsule(array, capsule).form.pointer == before + 8


class Producer:
    """An array by DLPack alone."""

    def __init__(self, array: np.ndarray, device: int = 2) -> None:
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, *, stream: int) -> object:
        self.streams.append(stream)
        return on_cuda(self.array.__dlpack__())


def test_producers_are_told_which_stream_will_read() -> None:
    producer = Producer(np.ones((2, 3), np.float32))
    for stream in (0, 7):
        view = device_views({"x": producer}, stream)["x"]
        assert (view.form.dtype, view.form.shape, view.stream, view.owner) == ("float32", (2, 3), None, producer)
    assert producer.streams == [1, 7]  # DLPack has no stream 0 of CUDA: the default one is 1


def test_interfaces_and_their_streams(gpu: FakeGpu) -> None:
    array = np.ones((2, 3), np.float32)
    view = device_views({"x": Foreign(gpu, array, stream=7)}, 1)["x"]
    assert (view.form.dtype, view.form.shape, view.form.contiguous, view.stream) == ("float32", (2, 3), True, 7)
    for strides, dense in (((12, 4), True), ((4, 8), False), ((16, 4), False)):
        assert device_views({"x": Foreign(gpu, array, strides=strides)}, 1)["x"].form.contiguous is dense
    read_only = Foreign(gpu, array, data=(4096, True))
    assert device_views({"x": read_only}, 1)["x"].form.writeable is False


def test_torch_tensors() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16).as_subclass(OnGpu)
    view = device_views({"x": tensor}, 1)["x"]
    assert view.form[:5] == ("bfloat16", (2, 3), True, tensor.data_ptr(), 12)
    assert device_views({"x": tensor.t()}, 1)["x"].form.contiguous is False
    assert view.owner is tensor


@pytest.mark.parametrize(
    "array",
    [np.zeros(3), torch.zeros(3), [1.0], Producer(np.zeros(3), device=1)],
    ids=["numpy", "torch on the CPU", "a list", "DLPack on the CPU"],
)
def test_what_is_not_on_the_gpu(array: object) -> None:
    with pytest.raises(EngineError, match=r"'x' is a \w+, which is not on the GPU(.|\n)*call run"):
        device_views({"x": array}, 1)
    with pytest.raises(EngineError, match="a list was given"):
        device_views([array], 1)  # type: ignore[arg-type]


class Reluctant(Producer):
    def __dlpack__(self, *, stream: int) -> object:
        raise BufferError("it requires gradients")


def test_a_producer_that_refuses() -> None:
    with pytest.raises(EngineError, match="'x' is a Reluctant, which does not give its memory away: it requires grad"):
        device_views({"x": Reluctant(np.zeros(3))}, 1)


# What the runner does with them


class Recorded:
    """A session on a GPU that notes what reaches it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Mapping[str, DeviceView], Mapping[str, DeviceView], int]] = []

    def run_on_gpu(self, feeds, out, stream):
        self.calls.append((feeds, out, stream))
        return {"output": "result"}

    def close(self) -> None: ...


@pytest.fixture
def session() -> Recorded:
    return Recorded()


@pytest.fixture
def runner(built: Engine, session: Recorded) -> Runner:
    return Runner(replace(built, target=load_target("rtx-sm89")), session)


def test_views_reach_the_session_with_the_callers_stream(
    runner: Runner, session: Recorded, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = Foreign(gpu, np.zeros((2, 1, 8, 8), np.float32)), Foreign(gpu, np.zeros((2, 10), np.float32))
    monkeypatch.setattr(device_arrays, "torch_with_cuda", lambda: None)
    assert runner.run_on_gpu({"input": x}, {"output": y}) == {"output": "result"}
    ((feeds, out, stream),) = session.calls
    assert (feeds["input"].owner, out["output"].owner, stream) == (x, y, 1)
    current = type("Stream", (), {"cuda_stream": 77})()
    cuda = type("cuda", (), {"current_stream": staticmethod(lambda: current)})
    monkeypatch.setattr(device_arrays, "torch_with_cuda", lambda: type("torch", (), {"cuda": cuda}))
    runner.run_on_gpu({"input": x})
    assert session.calls[-1][2] == 77


BAD_FEEDS = [
    ({}, "input 'input' is missing"),
    ({"imput": ((1, 1, 8, 8), np.float32, {})}, r"unknown input 'imput'(.|\n)*did you mean 'input'"),
    ({"input": ((1, 1, 8, 8), np.float64, {})}, r"has dtype float64(.|\n)*\.to\(torch\.float32\)"),
    ({"input": ((1, 8, 8), np.float32, {})}, "has 3 dimensions"),
    ({"input": ((1, 1, 8, 9), np.float32, {})}, "has 9 at axis 3"),
    ({"input": ((257, 1, 8, 8), np.float32, {})}, "batch 257 is outside"),
    ({"input": ((2, 1, 8, 8), np.float32, {"strides": (4, 4, 64, 8)})}, r"not contiguous(.|\n)*tensor\.contiguous\(\)"),
]


@pytest.mark.parametrize(("feeds", "text"), BAD_FEEDS, ids=[text[:24] for _, text in BAD_FEEDS])
def test_bad_feeds_reach_no_session(runner: Runner, session: Recorded, gpu: FakeGpu, feeds, text: str) -> None:
    made = {name: Foreign(gpu, np.zeros(shape, dtype), **rest) for name, (shape, dtype, rest) in feeds.items()}
    with pytest.raises(EngineError, match=text):
        runner.run_on_gpu(made)
    assert not session.calls


def test_bad_outputs_reach_no_session(runner: Runner, session: Recorded, gpu: FakeGpu) -> None:
    x = Foreign(gpu, np.zeros((2, 1, 8, 8), np.float32))
    inside = {"data": x.__cuda_array_interface__["data"]}
    for out, text in (
        (
            {"outptu": Foreign(gpu, np.zeros((2, 10), np.float32))},
            "unknown output 'outptu'(.|\\n)*did you mean 'output'",
        ),
        ({"output": Foreign(gpu, np.zeros((2, 10)))}, r"goes into an array float64 \[2, 10\](.|\n)*float32 \[2, 10\]"),
        ({"output": Foreign(gpu, np.zeros((3, 10), np.float32))}, r"float32 \[3, 10\](.|\n)*float32 \[2, 10\]"),
        ({"output": Foreign(gpu, np.zeros((2, 10), np.float32), data=(4096, True))}, "read-only"),
        ({"output": Foreign(gpu, np.zeros((2, 10), np.float32), **inside)}, "into memory of input 'input'"),
    ):
        with pytest.raises(EngineError, match=text):
            runner.run_on_gpu({"input": x}, out)
    assert not session.calls


def test_a_tensor_on_the_gpu_given_to_run(runner: Runner) -> None:
    tensor = torch.zeros(1, 1, 8, 8).as_subclass(OnGpu)
    with pytest.raises(EngineError, match=r"'input' is a OnGpu(.|\n)*call run_on_gpu, or convert it with \.detach"):
        runner.run({"input": tensor})


def test_engines_on_the_cpu_take_no_arrays_of_the_gpu(built: Engine, gpu: FakeGpu) -> None:
    with (
        load_engine(built) as runner,
        pytest.raises(EngineError, match=r"runs on the CPU(.|\n)*call run, which takes NumPy arrays"),
    ):
        runner.run_on_gpu({"input": Foreign(gpu, np.zeros((1, 1, 8, 8), np.float32))})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"typestr": None}, "KeyError"),
        ({"data": 256}, "TypeError"),
        ({"typestr": "zz"}, "TypeError"),
        ({"strides": (4,)}, "ValueError"),
        ({"mask": object()}, "it has a mask"),
    ],
)
def test_interfaces_that_say_too_little_or_too_much(change: dict[str, object], why: str) -> None:
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (256, False), "version": 3, **change}
    array = SimpleNamespace(
        __cuda_array_interface__={k: v for k, v in interface.items() if (k, v) != ("typestr", None)}
    )
    with pytest.raises(EngineError, match=rf"'input' is a SimpleNamespace whose __cuda_array_interface__ .*{why}"):
        device_views({"input": array}, 1)
