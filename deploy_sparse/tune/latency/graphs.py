"""One layer as an ONNX graph, written directly: exporting takes seconds, and a table needs hundreds of layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ...engine.onnx.export import BATCH_AXIS, OPSET
from .shapes import LayerShape

IR_VERSION = 10
_BLOCKED = "com.microsoft.nchwc"  # ONNX Runtime's own operators on channels in blocks


def layer_graph(shape: LayerShape) -> bytes:
    """The layer with random weights; a convolution is followed by the ReLU that runtimes compute with it.

    The input ``input`` is ``[batch, c_in, height, width]``; of linear layers ``[batch, c_in]``, and
    ``[batch, tokens, c_in]`` where there are several tokens. The output is called ``output``.
    """
    if shape.kind == "linear":
        return _model(*_linear(shape))
    per_group = shape.c_in // shape.groups
    tensors = [_random("weight", (shape.c_out, per_group, *shape.kernel)), _random("bias", (shape.c_out,))]
    (top, left), (high, wide) = shape.padding, shape.output
    options: dict[str, Any] = {
        "kernel_shape": shape.kernel,
        "strides": shape.stride,
        "pads": (top, left, top, left),
        "dilations": shape.dilation,
        "group": shape.groups,
    }
    nodes = [
        helper.make_node("Conv", ["input", "weight", "bias"], ["sum"], name="layer", **options),
        helper.make_node("Relu", ["sum"], ["output"], name="relu"),
    ]
    return _model(nodes, tensors, (shape.c_in, shape.height, shape.width), (shape.c_out, high, wide))


def _linear(
    shape: LayerShape,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], tuple[int, ...], tuple[int, ...]]:
    if shape.tokens == 1:
        tensors = [_random("weight", (shape.c_out, shape.c_in))]
        names = ["input", "weight"]
        nodes = []
    else:
        tensors = [_random("weight", (shape.c_in, shape.c_out))]
        nodes = [helper.make_node("MatMul", ["input", "weight"], ["sum"], name="layer")]
        names = ["sum"]
    if shape.bias:
        tensors.append(_random("bias", (shape.c_out,)))
        names.append("bias")
    if shape.tokens == 1:
        nodes = [helper.make_node("Gemm", names, ["output"], name="layer", transB=1)]
        return nodes, tensors, (shape.c_in,), (shape.c_out,)
    if shape.bias:
        nodes.append(helper.make_node("Add", names, ["output"], name="add"))
    else:
        nodes[0].output[0] = "output"
    return nodes, tensors, (shape.tokens, shape.c_in), (shape.tokens, shape.c_out)


def without_reorders(graph: bytes, threads: int) -> bytes | None:
    """A graph of one convolution on ONNX Runtime's blocked layout, as it runs amid a network; None where it runs plain.

    Alone, a convolution has its input put into blocks of channels and its output back, which takes up to a fifth of the
    time; amid a network neither happens. The result computes on blocked tensors and runs on the CPU that wrote it.
    """
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as folder:
        file = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.optimized_model_filepath = str(file)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        model = onnx.load(file)
    found = model.graph
    convs = [node for node in found.node if node.op_type == "Conv" and node.domain == _BLOCKED]
    into = [node for node in found.node if node.op_type == "ReorderInput"]
    back = [node for node in found.node if node.op_type == "ReorderOutput"]
    if len(convs) != 1 or len(into) > 1 or len(back) != 1 or len(found.node) != 1 + len(into) + len(back):
        return None
    conv = convs[0]
    dims = next(list(tensor.dims) for tensor in found.initializer if tensor.name == conv.input[1])
    groups = next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)
    extents = [d.dim_value for d in found.input[0].type.tensor_type.shape.dim]
    if into:
        channels = dims[0] if dims[1] == 1 and groups > 1 else dims[1] * groups  # padded to whole blocks
        _replace(found.input, _value("input", channels, *extents[2:]))
        conv.input[0] = "input"
        found.node.remove(into[0])
    extents = [d.dim_value for d in found.output[0].type.tensor_type.shape.dim]
    _replace(found.output, _value("output", dims[0], *extents[2:]))
    conv.output[0] = "output"
    found.node.remove(back[0])
    del found.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def _value(name: str, *extents: int) -> onnx.ValueInfoProto:
    """A float32 tensor with a dynamic batch before these extents."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH_AXIS, *extents])


def _replace(values: Any, value: onnx.ValueInfoProto) -> None:
    """Make it the only one of a graph's inputs or outputs."""
    del values[:]
    values.append(value)


def _model(
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto],
    given: tuple[int, ...],
    made: tuple[int, ...],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "layer",
        [_value("input", *given)],
        [_value("output", *made)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


_NUMBERS = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32) / 64


def _random(name: str, extents: tuple[int, ...]) -> onnx.TensorProto:
    """Small numbers, the same few over and over: what they are does not matter, making many does."""
    return numpy_helper.from_array(np.resize(_NUMBERS, extents), name)
