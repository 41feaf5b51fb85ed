"""The nodes of an ONNX graph as layers: operator, output, parameters, multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import shape_inference

from ...errors import ArtifactError
from ..inspection import LayerInfo, TensorInfo

_Shapes = Mapping[str, tuple[int, ...]]
_NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def nodes_of(graph: bytes, extents: Mapping[str, int], path: Path = Path("model.onnx")) -> tuple[LayerInfo, ...]:
    """Every node of an ONNX graph, in order.

    Shapes and multiply-accumulates are those of one sample where the batch is dynamic, else of the graph's own batch.

    Args:
        graph: bytes of an ONNX file; weights that it keeps in a second file are counted without being read.
        extents: of dynamic axes other than the batch, by name; -1 stands for those that are not here.
        path: the file, for messages.

    Raises:
        ArtifactError: no ONNX file.
    """
    from google.protobuf.message import DecodeError

    try:
        model = _fixed(_inlined(onnx.load_model_from_string(graph)), extents)
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        _check_names(inferred)
    except (DecodeError, shape_inference.InferenceError, ValueError) as problem:
        raise ArtifactError(
            f"{path} is not a valid ONNX file ({str(problem).strip().partition(chr(10))[0] or type(problem).__name__})",
            expected="a whole, unaltered .onnx file",
            fix="export or build it again",
        ) from problem
    weights = {tensor.name: tensor for tensor in inferred.initializer}
    tensors = {
        value.name: _tensor(value.name, value.type.tensor_type)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.name not in weights
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes |= {name: tuple(tensor.dims) for name, tensor in weights.items()}
    counted: set[str] = set()
    layers = []
    for index, node in enumerate(inferred.node):
        own = [weights[name] for name in dict.fromkeys(node.input) if name in weights and name not in counted]
        counted |= {tensor.name for tensor in own}
        layers.append(
            LayerInfo(
                name=node.name or f"{node.op_type}_{index}",
                kind=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
                inputs=tuple(_known(tensors, name) for name in node.input if name and name not in weights),
                outputs=tuple(_known(tensors, name) for name in node.output if name),
                nodes=(node.name,) if node.name else (),
                parameters=sum(math.prod(tensor.dims) for tensor in own if _is_parameter(tensor, node)),
                macs=_macs(node, shapes),
            )
        )
    return tuple(layers)


def place_of(graph: bytes, domain: str, operator: str) -> str:
    """Where in a graph an operator is used first: ``node 'name'``, or without a name what the node writes."""
    model = onnx.load_model_from_string(graph)
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for body in bodies:  # which grows: branches and loops have some of their own
        for node in body.node:
            if node.op_type == operator and (node.domain or "ai.onnx") == (domain or "ai.onnx"):
                return f"node {node.name!r}" if node.name else f"the node that writes {', '.join(node.output)!r}"
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.HasField("g") else attribute.graphs
    return "a node"


def _check_names(graph: onnx.GraphProto) -> None:
    """ValueError where a name is no text: protobuf reads one that is no UTF-8 all the same, as bytes."""
    for node in graph.node:
        for name in (node.name, node.op_type, node.domain, *node.input, *node.output):
            if not isinstance(name, str):
                raise ValueError(f"the name {name!r} is not UTF-8")


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.inliner import inline_local_functions

    return inline_local_functions(model) if model.functions else model


def _fixed(model: onnx.ModelProto, extents: Mapping[str, int]) -> onnx.ModelProto:
    """The model at one sample if its batch is dynamic, with all that it says of shapes further on left to inference."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in weights:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and (axis == 0 or dim.dim_param in extents):
                dim.dim_value = 1 if axis == 0 else extents[dim.dim_param]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def _tensor(name: str, kind: onnx.TypeProto.Tensor) -> TensorInfo:
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return TensorInfo(name, shape, _format(kind.elem_type) if kind.elem_type else None)


def _is_parameter(tensor: onnx.TensorProto, node: onnx.NodeProto) -> bool:
    """Whether it holds weights; of what is quantized or not any more, the numbers but not their scales."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return bool(tensor.name == node.input[0])
    return "float" in str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _format(code: int) -> str:
    """A data type of ONNX by the name that targets use, or else NumPy's."""
    name = str(onnx.helper.tensor_dtype_to_np_dtype(code))
    return _NAMES.get(name, name.replace("float8", "fp8 ").split(" ")[0])


def _known(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    return tensors.get(name, TensorInfo(name, (), None))


def _macs(node: onnx.NodeProto, shapes: _Shapes) -> int | None:
    """Multiply-accumulates, as PyTorch's own counter has them: of convolutions and matrix products."""
    inputs = [shapes.get(name, (-1,)) for name in node.input]
    output = shapes.get(node.output[0], (-1,)) if node.output else (-1,)
    count = _product(node, inputs, output)
    return None if count is None or count < 0 or any(-1 in shape for shape in (*inputs[:2], output)) else count


def _product(node: onnx.NodeProto, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int | None:
    if node.op_type == "Conv":  # weight [out, in / groups, *kernel]
        return math.prod(output) * math.prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":  # weight [in, out / groups, *kernel]
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type == "MatMul":
        return math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = next((attribute.i for attribute in node.attribute if attribute.name == "transA"), 0)
        return math.prod(output) * inputs[0][0 if transposed else -1]
    if node.op_type == "Einsum" and len(inputs) == 2:
        equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
        letters = [part.strip() for part in equation.replace(" ", "").split("->")[0].split(",")]
        if "." not in equation and [len(part) for part in letters] == [len(shape) for shape in inputs]:
            return math.prod(
                {letter: extent for part, shape in zip(letters, inputs, strict=True)
                 for letter, extent in zip(part, shape, strict=True)}.values()
            )  # fmt: skip
    return None
