"""Torch engines on a real GPU, against the float32 module on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_samples import EXAMPLES, make_blocks, target_of

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.cuda.gpu import local_gpu
from deploy_sparse.errors import EngineError
from deploy_sparse.measure.profile import profile

pytestmark = pytest.mark.gpu

ERRORS = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 8e-2}  # of the largest output


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if local_gpu() is None:
        pytest.skip("no NVIDIA GPU here")


def options_of(precision: str) -> dict[str, object]:
    return {"precision": "fp32", "tf32": True} if precision == "tf32" else {"precision": precision}


@pytest.mark.parametrize("block_kernel", ["never", "timed", "always"])
@pytest.mark.parametrize("precision", list(ERRORS))
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_engine_computes_what_the_module_computes(
    precision: str, block_kernel: str, cuda_graph: bool, tmp_path: Path
) -> None:
    if block_kernel != "never":
        pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux")
    network = make_blocks()
    options = {**options_of(precision), "cuda_graph": cuda_graph, "block_kernel": block_kernel}
    engine = build_engine(network, target_of(device="cuda", **options), EXAMPLES, tmp_path)
    with engine.open() as runner:
        for batch in (1, 3, 64):
            feeds = runner.sample_inputs(batch, seed=batch)
            with torch.no_grad():
                expected = network(torch.from_numpy(feeds["input"])).numpy()
            found = runner.run(feeds)["output"]
            np.testing.assert_allclose(found, expected, atol=ERRORS[precision] * np.abs(expected).max())
            prepared = runner.prepare(feeds)
            prepared()
            held = prepared.__defaults__
            if cuda_graph:
                (replayed,) = held[0][1]
                replayed.zero_()
                prepared()
                np.testing.assert_allclose(
                    replayed.cpu().numpy(), expected, atol=ERRORS[precision] * np.abs(expected).max()
                )
        kernels = [choice.kernel for choice in runner._session.blocks]
        if block_kernel == "timed":
            assert len(kernels) == 4
            assert all(choice.native_ms > 0 and choice.kernel_ms > 0 for choice in runner._session.blocks)
        else:
            assert kernels == ([True] * 4 if block_kernel == "always" else [])


def test_settings_of_the_process_stay_what_they_were(tmp_path: Path) -> None:
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [kind.fp32_precision for kind in kinds], torch.backends.cudnn.benchmark
    engine = build_engine(make_blocks(), target_of(device="cuda", tf32=True), EXAMPLES, tmp_path)
    with engine.open() as runner:
        runner.run(runner.sample_inputs())
        runner.prepare(runner.sample_inputs())()
    assert before == ([kind.fp32_precision for kind in kinds], torch.backends.cudnn.benchmark)


class Waits(nn.Module):
    """PyTorch asks whether a matrix was singular, for which the host must wait."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x @ x.mT + torch.eye(3, device=x.device))


def test_what_cannot_be_captured_says_which_option_to_change(tmp_path: Path) -> None:
    target = target_of(device="cuda", cuda_graph=True)
    runner = build_engine(Waits(), target, torch.randn(2, 3, 3), tmp_path).open()
    with runner, pytest.raises(EngineError, match=r"being captured as a CUDA graph(.|\n)*set cuda_graph = false"):
        runner.prepare(runner.sample_inputs())


class OnADevice(nn.Module):
    """Makes tensors on a device that its code names, and takes views of channels-last activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.view(y.shape[0], -1) + torch.arange(8 * 4 * 3, device="cpu")


def test_programs_move_to_the_gpu_whole(tmp_path: Path) -> None:
    network = OnADevice()
    with build_engine(network, target_of(device="cuda"), EXAMPLES, tmp_path).open() as runner:
        feeds = runner.sample_inputs(2)
        expected = network(torch.from_numpy(feeds["input"])).detach().numpy()
        np.testing.assert_allclose(runner.run(feeds)["output"], expected, atol=1e-4 * np.abs(expected).max())


def test_profile_on_the_gpu(tmp_path: Path) -> None:
    engine = build_engine(make_blocks(), "torch-cuda", EXAMPLES, tmp_path)
    found = profile({"dense": engine, "same": engine}, duration_s=0.05, warmup_ms=0)
    assert [record.status for record in found.records] == ["timed", "timed"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensors_on_the_gpu(precision: str, tmp_path: Path) -> None:
    network = make_blocks()
    options = {**options_of(precision), "block_kernel": "never"}
    with build_engine(network, target_of(device="cuda", **options), EXAMPLES, tmp_path).open() as runner:
        feeds = runner.sample_inputs(5)
        expected = runner.run(feeds)["output"]
        images = torch.from_numpy(feeds["input"]).cuda()
        atol = ERRORS[precision] * np.abs(expected).max()
        stream = torch.cuda.Stream()
        for given in (None, {"output": torch.empty(5, 7, device="cuda")}):
            with torch.cuda.stream(stream):
                late = torch.zeros_like(images)
                torch.cuda._sleep(50_000_000)
                late.copy_(images)
                found = runner.run_on_gpu({"input": late}, given)["output"]
                assert given is None or found is given["output"]
                np.testing.assert_allclose(found.cpu().numpy(), expected, atol=atol)
