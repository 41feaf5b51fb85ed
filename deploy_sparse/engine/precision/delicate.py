"""Operators that stay in float32 where the rest is fp16 or bf16, because rounding or overflow would ruin them.

What frameworks do in mixed precision: statistics of norms, softmax, exponentials, powers, roots and sums of squares are
taken in float32 and their results rounded. Products of matrices and convolutions never are.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .graph import consumers, producers

DELICATE = frozenset({
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization",
    "MeanVarianceNormalization", "LpNormalization", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "CumSum", "Exp", "Log", "Pow", "Sqrt", "Reciprocal",
})  # fmt: skip
"""Operators whose numbers need the range or the digits of float32."""

_NO_BF16 = frozenset({"HardSwish", "Mish"})  # which TensorRT's parser takes in fp16 and fp32 only
_BEFORE_ROOT = frozenset({"Add", "Max", "Clip", "ReduceMean", "ReduceSum", "Pow", "Mul", "Div"})
_MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Gather", "Slice",
})  # fmt: skip


def delicate_nodes(graph: onnx.GraphProto, low: np.dtype) -> dict[str, str]:
    """Names of the nodes that stay in float32, and why.

    Args:
        low: NumPy's type of the lower precision.
    """
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    constants = {tensor.name for tensor in graph.initializer}
    vanishing = {name for name, tensor in weights.items() if _vanishes(tensor, low)}
    makers = producers(graph)
    kept = {node.name: node.op_type for node in graph.node if node.op_type in DELICATE}
    if low != np.float16:
        kept |= {
            node.name: f"{node.op_type} has no bf16 in TensorRT" for node in graph.node if node.op_type in _NO_BF16
        }
    for node in graph.node:
        if node.op_type in ("Sqrt", "Reciprocal", "Log"):
            for name in _under_root(node, makers, constants):
                kept.setdefault(name, "sum of squares")
    for node in graph.node:
        if any(name in vanishing for name in node.input):
            kept.setdefault(node.name, "constant too small")
    for node in graph.node:  # in topological order
        if node.op_type == "Div" and (below := makers.get(node.input[1])) is not None and below.name in kept:
            kept.setdefault(node.name, "division by a float32 result")
    return kept | _between(graph, kept, constants)


def _under_root(root: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: Set[str]) -> set[str]:
    """From a root back to the squares that are summed below it, of RMSNorm and of norms written as operators."""
    chain: set[str] = set()
    node = makers.get(root.input[0])
    while node is not None and node.op_type in _BEFORE_ROOT:
        changing = [name for name in node.input if name and name not in constants]
        if node.op_type in ("Pow", "Mul"):
            square = node.op_type == "Pow" or node.input[0] == node.input[1]
            return chain | {node.name} if square else set()
        chain.add(node.name)
        reads = changing[:1] if node.op_type in ("ReduceMean", "ReduceSum", "Clip") else changing
        node = makers.get(reads[0]) if len(reads) == 1 else None
    return set()


def _between(graph: onnx.GraphProto, kept: Mapping[str, str], constants: Set[str]) -> dict[str, str]:
    """Nodes that only move numbers from one node in float32 to others: rounding there would gain nothing."""
    makers, readers = producers(graph), consumers(graph)
    return {
        node.name: "between float32 results"
        for node in graph.node
        if node.op_type in _MOVES
        and (source := makers.get(node.input[0])) is not None
        and source.name in kept
        and (after := readers.get(node.output[0]))
        and all(reader.name in kept for reader in after)
    }


def _vanishes(tensor: TensorProto, low: np.dtype) -> bool:
    """Whether a single number, such as the epsilon of a norm, would become zero."""
    if int(np.prod(tensor.dims)) != 1:
        return False
    value = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        return bool((value != 0).all() and (value.astype(low) == 0).all())
