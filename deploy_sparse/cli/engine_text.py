"""What `inspect` prints of an engine or an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import key_values, table

if TYPE_CHECKING:
    from ..engine.inspection import Inspection, LayerInfo, TensorInfo


def engine_text(path: Path, kind: str | None) -> tuple[dict[str, Any], Callable[[], str]]:
    """The JSON value, and what makes the text.

    Args:
        path: an engine's folder or a file in it, or an ONNX file.
        kind: ``"engine"``, or anything else for an ONNX file.
    """
    facts, found = _of_engine(path) if kind == "engine" else _of_graph(path)
    layers = found.layers
    if found.source == "ONNX graph":
        facts["parameters"] = sum(layer.parameters or 0 for layer in layers)
        facts["MACs"] = sum(layer.macs or 0 for layer in layers)
    value = {"kind": "engine" if kind == "engine" else "onnx", **facts, **found.as_json()}

    def text() -> str:
        head = {**facts, "layers": f"{len(layers)}, from {found.source}"}
        notes = [f"TensorRT's inspector was not asked: {found.why}"] if found.why else []
        if found.batch > 1:
            notes.append(f"shapes and MACs are those of the graph's fixed batch of {found.batch}")
        rows = _node_rows(layers) if found.source == "ONNX graph" else _layer_rows(layers)
        columns = _NODE_COLUMNS if found.source == "ONNX graph" else _LAYER_COLUMNS
        return "\n".join([key_values(head), *notes, "", table(columns, rows)])

    return value, text


_NODE_COLUMNS = ("node", "operator", "output", "type", "parameters", "MACs")
_LAYER_COLUMNS = ("layer", "kind", "output", "precision", "layout", "tactic")


def _of_engine(path: Path) -> tuple[dict[str, Any], Inspection]:
    from ..engine.entry import open_entry
    from ..engine.inspection import inspect_engine

    engine = open_entry(path)
    facts = {
        "path": str(engine.folder),
        "target": engine.target.name,
        "runtime": " ".join(engine.manifest["runtime"].values()),
        "precision built": engine.manifest["precision"]["built"],
    }
    return facts, inspect_engine(engine)


def _of_graph(path: Path) -> tuple[dict[str, Any], Inspection]:
    from ..engine.inspection import Inspection, samples_of
    from ..engine.onnx.file import read_onnx
    from ..engine.onnx.nodes import nodes_of

    file = read_onnx(path)
    found = Inspection("ONNX graph", None, nodes_of(file.read(), {}, path), samples_of(file.inputs))
    return {"path": str(path), "opset": file.opset}, found


def _node_rows(layers: tuple[LayerInfo, ...]) -> list[tuple[Any, ...]]:
    """Shapes are those of one sample, or of the graph's fixed batch."""
    return [
        (layer.name, layer.kind, _shapes(layer.outputs), layer.precision, layer.parameters or None, layer.macs)
        for layer in layers
    ]


def _layer_rows(layers: tuple[LayerInfo, ...]) -> list[tuple[Any, ...]]:
    return [
        (
            layer.name,
            layer.kind,
            _shapes(layer.outputs),
            layer.precision,
            ", ".join(dict.fromkeys(tensor.layout for tensor in layer.outputs if tensor.layout)) or None,
            layer.tactic,
        )
        for layer in layers
    ]


def _shapes(tensors: tuple[TensorInfo, ...]) -> str:
    return ", ".join("×".join("?" if extent < 0 else str(extent) for extent in tensor.shape) for tensor in tensors)
