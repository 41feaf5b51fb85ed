"""A float32 graph made ready to be lowered: plain, with named nodes, BatchNorm folded, at a high enough opset."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

from ...errors import BuildError

MAIN = ("", "ai.onnx")  # names of ONNX's own set of operators


def prepared(model: onnx.ModelProto, opset: int = 0) -> onnx.ModelProto:
    """An equal graph without local functions, float constants as initializers that are no inputs, every node named.

    BatchNorm is folded into the convolution or matrix product that it alone reads; one that stands alone stays.

    Args:
        opset: raise the version of ONNX's operators to this where it is lower.

    Raises:
        BuildError: it cannot be raised, or a node holds a graph of its own.
    """
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BuildError(
                f"node {node.name!r} ({node.op_type}) holds a graph of its own",
                expected="a graph without branches and loops: in them nothing can be lowered",
                fix="export without If, Loop and Scan, or build in fp32",
            )
    found = onnx.ModelProto()
    found.CopyFrom(model)
    name_nodes_(found.graph)
    _lift_constants_(found.graph)
    _close_weights_(found)
    if any(node.op_type == "BatchNormalization" for node in found.graph.node):
        found = _folded(found)
    found = _at_opset(found, opset)
    name_nodes_(found.graph)
    return found


def name_nodes_(graph: onnx.GraphProto) -> None:
    """Give a name, made of operator and position, to every node that has none or another node's."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators, 0 where the file names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in MAIN), 0)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element types (``TensorProto.FLOAT``…) of all tensors whose type is known, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, once per reading."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _lift_constants_(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        tensor = next(_constants(node), None) if node.op_type == "Constant" and node.domain in MAIN else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def _close_weights_(model: onnx.ModelProto) -> None:
    """Weights that a caller could replace, as all could in files of before 2019, become constants."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) < len(graph.input):
        del graph.input[:]
        graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, 4)  # before it every initializer had to be an input


def _constants(node: onnx.NodeProto) -> Iterator[TensorProto]:
    """What a Constant node holds as numbers, under the name of its output."""
    for attribute in node.attribute:
        tensor = TensorProto()
        if attribute.name == "value":
            tensor.CopyFrom(attribute.t)
        elif attribute.name == "value_float":
            tensor.CopyFrom(helper.make_tensor("", TensorProto.FLOAT, [], [attribute.f]))
        elif attribute.name == "value_floats":
            tensor.CopyFrom(helper.make_tensor("", TensorProto.FLOAT, [len(attribute.floats)], attribute.floats))
        else:
            continue
        tensor.name = node.output[0]
        yield tensor


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """With BatchNorm in the weights before it; what it is folded into keeps its name."""
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import (
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
    )

    makers = producers(model.graph)
    names = {
        node.output[0]: makers[node.input[0]].name
        for node in model.graph.node
        if node.op_type == "BatchNormalization" and node.input[0] in makers
    }
    rules = (
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
    )
    found: onnx.ModelProto = rewrite(model, pattern_rewrite_rules=rules)
    for node in found.graph.node:
        node.ClearField("metadata_props")  # how it was folded
        if node.op_type != "BatchNormalization" and node.output[0] in names:
            node.name = names[node.output[0]]
    return found


def _at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if opset_of(model) >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as problem:  # onnx raises what its C++ throws: RuntimeError and its own ConvertError
        lines = str(problem).strip().splitlines()
        raise BuildError(
            f"the graph cannot go from opset {opset_of(model)} to {opset} ({lines[0] if lines else repr(problem)})",
            expected=f"operators that exist in opset {opset}, which this precision needs",
            fix=f"export it at opset {opset}",
        ) from problem
