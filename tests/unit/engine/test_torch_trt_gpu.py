"""Engines of torch-tensorrt on a real GPU, against the float32 module on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_samples import TinyNet, make_tiny
from torch import nn
from torch_trt_fake import (
    Views,
    built,
)

from deploy_sparse.engine.cuda.gpu import local_gpu
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.torch_trt import bindings as torch_trt_bindings
from deploy_sparse.engine.torch_trt import build as torch_trt_build
from deploy_sparse.engine.torch_trt.bindings import library
from deploy_sparse.errors import MissingDependencyError

pytestmark = pytest.mark.gpu


@pytest.fixture
def _real() -> None:
    if local_gpu() is None:
        pytest.skip("no NVIDIA GPU here")
    try:
        library()
    except MissingDependencyError as problem:
        pytest.skip(problem.given)


@pytest.mark.usefixtures("_real")
@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, 1e-4),
        ({"tf32": True}, 1e-2),
        ({"precision": "fp16"}, 1e-2),
        ({"precision": "bf16"}, 8e-2),
        ({"refit": "any"}, 1e-4),
        ({"batch": {"min": 4, "opt": 4, "max": 4}}, 1e-4),
    ],
)
def test_real_engines_compute_what_the_module_computes(tmp_path: Path, values: dict[str, object], error: float) -> None:
    network = make_tiny().eval()
    engine = built(network, tmp_path, **values)
    assert engine.manifest["partition"]["engines"] >= 1
    assert engine.manifest["partition"]["tensorrt_operators"] > 0
    with engine.open() as runner, torch.no_grad():
        smallest, largest = engine.batch_range
        for batch in {smallest, largest}:
            feeds = runner.sample_inputs(batch, seed=batch)
            expected = network(torch.from_numpy(feeds["input"])).numpy()
            limit = error * float(np.abs(expected).max())
            np.testing.assert_allclose(runner.run(feeds)["output"], expected, atol=limit)
            runner.prepare(feeds)()
            on_gpu = runner.run_on_gpu({"input": torch.from_numpy(feeds["input"]).cuda()})
            np.testing.assert_allclose(on_gpu["output"].cpu().numpy(), expected, atol=limit)


@pytest.mark.usefixtures("_real")
@pytest.mark.parametrize("make", [Views, TinyNet])
def test_real_engines_with_parts_in_pytorch(
    tmp_path: Path, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make().eval()
    relu = {torch.ops.aten.relu.default}
    asked = torch_trt_bindings.compile_options
    monkeypatch.setattr(
        torch_trt_build.torch_trt_bindings,
        "compile_options",
        lambda *given: {**asked(*given), "torch_executed_ops": relu, "min_block_size": 1},
    )
    engine = built(network, tmp_path)
    assert engine.manifest["partition"]["pytorch"] == {"relu": 2}
    with engine.open() as runner, torch.no_grad():
        feeds = runner.sample_inputs(3)
        expected = network(torch.from_numpy(feeds["input"]))
        for ours, theirs in zip(
            runner.run(feeds).values(), [expected] if torch.is_tensor(expected) else expected, strict=True
        ):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.usefixtures("_real")
def test_real_engines_in_a_cuda_graph(tmp_path: Path) -> None:
    engine = built(make_tiny(), tmp_path)
    with load_engine(engine, cuda_graph=True) as runner:
        run = runner.prepare(runner.sample_inputs(4))
        run()
        run()
