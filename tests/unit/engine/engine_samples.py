"""Networks and graphs for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn


class TinyNet(nn.Module):
    """conv - BN - ReLU - conv - ReLU - mean - linear on ``[n, 1, 8, 8]``, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.head(x)


def make_tiny(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TinyNet()
        with torch.no_grad():
            network.norm.running_mean.normal_()
            network.norm.running_var.uniform_(0.5, 2.0)
            network.norm.weight.uniform_(0.5, 2.0)
            network.norm.bias.normal_()
    return network


def write_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    shape: tuple[int | str, ...] = ("n", 4),
    out_shape: tuple[int | str, ...] | None = None,
    dtype: int = TensorProto.FLOAT,
    initializers: tuple[onnx.TensorProto, ...] = (),
    domain: str | None = None,
) -> Path:
    """An ONNX file as another tool might write it: one ``input``, one ``output``, no sidecar."""
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info("output", dtype, shape if out_shape is None else out_shape)],
        initializer=initializers,
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path
