"""What a graph's layers compute in, read from the graph itself."""

from __future__ import annotations

from collections.abc import Mapping, Set

import onnx
from onnx import TensorProto

from .graph import producers, types_of

LAYERS = frozenset({
    "Conv", "ConvTranspose", "DeformConv", "MatMul", "Gemm", "Einsum", "Attention", "LSTM", "GRU", "RNN",
})  # fmt: skip
"""Operators that take nearly all of a network's time: convolutions, matrix products and what is made of them."""

_INTEGER = frozenset({"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"})
_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})
_FORMATS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
}


def layer_formats(model: onnx.ModelProto) -> dict[str, str]:
    """The number format of each convolution and matrix product, by node name, for example ``{"conv1": "fp16"}``.

    A layer is ``"int8"`` or ``"fp8"`` where both of its factors come out of a DequantizeLinear of that type.
    """
    types, makers = types_of(model), producers(model.graph)
    found = {}
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        if node.op_type in _INTEGER:
            found[name] = "int8"
        elif node.op_type in LAYERS:
            factors = {_quantized_as(factor, makers, types) for factor in node.input[:2]}
            only = factors.pop() if len(factors) == 1 else ""
            plain = types.get(node.input[0], 0)
            found[name] = only or _FORMATS.get(plain, TensorProto.DataType.Name(plain).lower())
    return found


def is_lowered(model: onnx.ModelProto) -> bool:
    """Whether a graph holds more than float32: 16-bit floats, or Q/DQ pairs."""
    codes = set(types_of(model).values())
    low = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return bool(codes & low) or any(node.op_type in {"DequantizeLinear", *_INTEGER} for node in model.graph.node)


def others_than(formats: Mapping[str, str], precision: str, excluded: Set[str]) -> list[str]:
    """Names of the layers that compute in another format than this one, and that nobody excluded."""
    return [name for name, built in formats.items() if built != precision and name not in excluded]


def _quantized_as(name: str, makers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    """``"int8"`` or ``"fp8"`` of a tensor that was dequantized, and perhaps moved since; otherwise nothing."""
    node = makers.get(name)
    while node is not None and node.op_type in _MOVES:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return ""
    return _FORMATS.get(types.get(node.input[0], 0), "")
