"""Networks of the kinds that lower precisions meet, exported once, and calibration data for them."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.engine.onnx.file import OnnxFile

IMAGE = (3, 16, 16)


class Residual(nn.Module):
    """conv - BN - ReLU - conv - BN, and a convolution as shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class TinyResNet(nn.Module):
    """Stem, two residual blocks, a linear head; ``[n, 3, 16, 16]`` to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.layer1, self.layer2 = Residual(16, 32), Residual(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


class RMSNorm(nn.Module):
    """As written in many networks: operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class TinyAttention(nn.Module):
    """Patches, one attention layer with LayerNorm, an MLP with RMSNorm, a linear head."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)  # [n, tokens, width]
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(mixed)
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Packed(nn.Module):
    """Blocks of channels as packing leaves them: channels looked up, then a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.register_buffer("index", torch.tensor([0, 3, 5, 1, 8, 2, 9, 4, 0, 7, 11, 13, 15, 14, 12, 6]))
        self.blocks = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.cut = nn.Conv2d(32, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x)).index_select(1, self.index)
        x = torch.relu(self.cut(torch.relu(self.blocks(x))))
        return self.head(x.mean((2, 3)))


NETWORKS = {"resnet": TinyResNet, "attention": TinyAttention, "packed": Packed}


@cache
def exported_network(name: str) -> OnnxFile:
    """One of ``NETWORKS`` with seeded weights and statistics, as an ONNX file."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = NETWORKS[name]()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean, std=0.1)
        folder = Path(mkdtemp(prefix="precision-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return export_onnx(network, torch.randn(2, *IMAGE), folder / f"{name}.onnx")


def images(count: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth seeded pictures ``[count, 3, 16, 16]``, float32: what real inputs are and noise is not."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((count, 3, 4, 4)).astype(np.float32)
    return np.ascontiguousarray(coarse.repeat(4, axis=2).repeat(4, axis=3))


def elements(model: onnx.ModelProto) -> dict[str, str]:
    """Element types of all tensors by name, as ONNX calls them."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: TensorProto.DataType.Name(code) for name, code in found.items()}


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    shape: tuple[int | str, ...] = ("n", 4),
    out_shape: tuple[int | str, ...] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """A graph from ``input`` to ``output``, as another tool might write it."""
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape if out_shape is None else out_shape)],
        initializer=[numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def conv_and_norm(scale: float = 1.0, opset: int = 20) -> onnx.ModelProto:
    """Conv and BatchNorm that nobody folded, as other exporters leave them; ``scale`` multiplies the weights."""
    generator = np.random.default_rng(0)
    weights = {
        "conv.weight": scale * generator.standard_normal((4, 2, 3, 3)),
        "norm.weight": generator.uniform(0.5, 2, 4),
        "norm.bias": generator.standard_normal(4),
        "norm.running_mean": generator.standard_normal(4),
        "norm.running_var": generator.uniform(0.5, 2, 4),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["a"], "the_conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", *[*weights][1:]], ["b"], "the_norm"),
        helper.make_node("Relu", ["b"], ["output"]),
    ]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    return model_of(nodes, arrays, shape=("n", 2, 8, 8), out_shape=("n", 4, 8, 8), opset=opset)
