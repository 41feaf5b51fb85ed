"""Running an ONNX file on the CPU, whatever it was lowered to: the reference that travels with a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..engine.onnx.file import parse_graph
from ..engine.onnx.runtime import OrtSession
from ..errors import BuildError

if TYPE_CHECKING:
    import onnx


def run_graph(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of an ONNX file in ONNX Runtime on the CPU, with one thread.

    ONNX Runtime's operators for the CPU lack bf16. A graph in that format is computed in float32 with the same
    weights: its outputs differ from those of an engine by what bf16 rounds off.

    Raises:
        ArtifactError: no ONNX file, or one with weights that are not in its own folder.
        BuildError: ONNX Runtime does not have one of its operators. EngineError: it fails on these inputs.
    """
    data = path.read_bytes()
    parse_graph(path, data)  # a graph from elsewhere may name any file of this machine as its weights
    try:
        session = OrtSession(data, folder=path.parent)
    except BuildError:
        widened = _without_bf16(path)
        if widened is None:
            raise
        session = OrtSession(widened)
    try:
        return session.run(feeds)
    finally:
        session.close()


def _without_bf16(path: Path) -> bytes | None:
    """The graph with float32 in the place of bf16; None where there is none of it, or in inputs and outputs."""
    import onnx

    model = onnx.load(str(path))
    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == bf16]
    casts = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.TENSOR and attribute.t.data_type == bf16:
                tensors.append(attribute.t)
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == bf16:
                casts.append(attribute)
    if not tensors and not casts:
        return None
    for tensor in tensors:
        _widen_(tensor)
    for attribute in casts:
        attribute.i = fp32
    values = (*model.graph.input, *model.graph.output)
    if any(value.type.tensor_type.elem_type == bf16 for value in values):
        return None  # its feeds are bf16 too
    del model.graph.value_info[:]
    return bytes(model.SerializeToString(deterministic=True))


def _widen_(tensor: onnx.TensorProto) -> None:
    import onnx

    entries = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(entries, tensor.name))
