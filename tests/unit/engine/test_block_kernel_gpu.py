"""The block kernel on a real GPU, against float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_kernel_cases import Case, try_case

from deploy_sparse.engine.blocks.kernel import block_conv2d
from deploy_sparse.engine.cuda.gpu import local_gpu

pytestmark = pytest.mark.gpu

HALVES = [(list(range(0, 128, 2)), list(range(64))), (list(range(1, 128, 2)), list(range(32, 96)))]
RAGGED = [(list(range(37)), [1, 2, 3, 90, 95]), (list(range(40, 101)), list(range(0, 96, 3)))]
SMALL = Case(3, 96, 128, (15, 13), (3, 3), HALVES, padding=(1, 1), column_tile=32)


@pytest.fixture(scope="module", autouse=True)
def _needs_a_gpu() -> None:
    pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux")
    if local_gpu() is None:
        pytest.skip("no NVIDIA GPU here")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"relu": True, "bias": False, "channels_last": False},
        {"blocks": RAGGED},
        {"blocks": RAGGED, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "kernel": (2, 3)},
        {"order": list(range(127, 5, -1))},
        {"channels": 97, "column_tile": 64},
        {"tile": (64, 64, 32)},
        {"batch": 0},
    ],
    ids=str,
)
def test_gpu_block_convolution_equals_the_masked_dense_one(change: dict, dtype: str) -> None:
    case = replace(SMALL, dtype=dtype, **change)
    answer = try_case(case, "cuda")
    assert answer["finite"]
    assert answer["shape"] == list(case.expected()[0].shape)
    assert answer["worst"] <= 1


def test_tf32_is_used_when_asked() -> None:
    """That it is not used otherwise is what the tolerance above for float32 says."""
    case = replace(SMALL, tf32=True)
    assert try_case(case, "cuda")["worst"] <= 1
    x, layout = case.tensors()[0].cuda(), case.layout().to("cuda")
    assert not torch.equal(block_conv2d(x, layout, tf32=True), block_conv2d(x, layout))


def test_a_captured_graph_replays_the_kernel() -> None:
    x, layout = SMALL.tensors()[0].cuda(), SMALL.layout().to("cuda")
    expected = block_conv2d(x, layout)  # also times the tiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block_conv2d(x, layout)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
