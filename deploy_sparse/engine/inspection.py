"""What an engine consists of: layers, number formats, kernels and memory layouts.

TensorRT's engine inspector tells them where the engine can be opened; anywhere else the ONNX graph does, which says
what is computed but not how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import EngineError
from .entry import ONNX_FILE, Engine, open_entry, verified_bytes
from .tensors import TensorSpec

_FORMATS = {  # as TensorRT writes them, in either of its spellings -> as targets do
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16",
    "bfloat": "bf16", "fp8": "fp8", "fp4": "fp4", "e8m0": "e8m0", "int4": "int4", "int8": "int8", "uint8": "uint8",
    "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_WORD = re.compile(rf"\b({'|'.join(sorted(_FORMATS, key=len, reverse=True))})\b", re.IGNORECASE)
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor between layers.

    Attributes:
        name: in the engine, or in the ONNX graph.
        shape: extents; -1 where they are not known before an input is.
        precision: its number format by the name that targets use, such as ``"fp16"``; None where it is not told.
        layout: how TensorRT lays it out in memory; None where it is not told.
    """

    name: str
    shape: tuple[int, ...]
    precision: str | None
    layout: str | None = None


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a compiled engine, or one node of an ONNX graph.

    Attributes:
        name: the layer's, which often joins the names of what was fused; the node's.
        kind: TensorRT's type of layer, or the ONNX operator; ``"?"`` where only the name is told.
        inputs, outputs: its tensors; of an ONNX node without its weights.
        tactic: the kernel that TensorRT chose; None where it is not told.
        nodes: names of the ONNX nodes in it.
        parameters: entries of its weights, or None where that is not told.
        macs: multiply-accumulates, for one sample or a graph's fixed batch; None where they are not counted.
    """

    name: str
    kind: str
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    tactic: str | None = None
    nodes: tuple[str, ...] = ()
    parameters: int | None = None
    macs: int | None = None

    @property
    def precision(self) -> str | None:
        """Number formats of inputs and outputs: ``"fp16"``, or ``"int8 -> fp16"`` where they differ."""
        sides = [_joined(side) for side in (self.inputs, self.outputs)]
        told = list(dict.fromkeys(side for side in sides if side))
        return " -> ".join(told) or None


@dataclass(frozen=True)
class Inspection:
    """Layers of an engine.

    Attributes:
        source: who told them.
        why: why TensorRT's inspector did not; None where it did, or has nothing to do with the engine.
        layers: in the order of execution.
        batch: how many samples the shapes and multiply-accumulates of an ONNX graph are of: one, or as many as a graph
            with a fixed batch takes.
    """

    source: Literal["TensorRT's inspector", "ONNX graph"]
    why: str | None
    layers: tuple[LayerInfo, ...]
    batch: int = 1

    def as_json(self) -> dict[str, Any]:
        """JSON form."""
        layers = [{**asdict(layer), "precision": layer.precision} for layer in self.layers]
        return {"source": self.source, "why": self.why, "batch": self.batch, "layers": layers}


def inspect_engine(engine: str | Path | Engine) -> Inspection:
    """Layers of an engine, after verifying it.

    Args:
        engine: its folder, a file in it, or what :func:`deploy_sparse.build_engine` returned.

    Raises:
        ArtifactError: missing or damaged. EngineError: it holds no ONNX graph, or TensorRT rejects it.
    """
    found = open_entry(engine.folder if isinstance(engine, Engine) else engine)
    if ONNX_FILE not in found.manifest["files"]:
        raise EngineError(
            f"{found.folder} holds no ONNX graph, as its runtime is {found.target.runtime}",
            expected="an engine of ONNX Runtime or TensorRT",
            fix="build the network for cpu, and inspect that",
        )
    why = None
    if found.target.runtime in ("tensorrt", "tensorrt-rtx"):
        why = found.runnable()
        if found.target.version_compatible:
            why = "it holds host code, which inspecting does not run"
        if why is None:
            return Inspection("TensorRT's inspector", None, parse_inspector(_inspector_text(found)))
    from .onnx.nodes import nodes_of

    extents = {name: axis["opt"] for name, axis in found.axes.items()}
    nodes = nodes_of(verified_bytes(found, found.folder / ONNX_FILE), extents)
    return Inspection("ONNX graph", why, nodes, samples_of(found.inputs))


def samples_of(inputs: Sequence[TensorSpec]) -> int:
    """How many samples a graph with these inputs is inspected for: its own batch where that is fixed, otherwise one."""
    if any(spec.batched for spec in inputs):
        return 1
    return next((int(spec.shape[0]) for spec in inputs if spec.shape), 1)


def parse_inspector(text: str) -> tuple[LayerInfo, ...]:
    """The layers in the JSON text of TensorRT's engine inspector, as 10.x and as 11.x write it.

    10.x has one string ``"Format/Datatype"`` for each tensor, 11.x ``"Format"`` and ``"Datatype"``. An engine that was
    built without detailed profiling verbosity has names of layers only.

    Raises:
        EngineError: no such text.
    """
    try:
        value = json.loads(text)
        layers = value["Layers"]
        return tuple(_layer(layer) for layer in layers)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as problem:
        raise EngineError(
            f"this is no text of TensorRT's engine inspector ({type(problem).__name__}: {problem})",
            expected='a JSON object with "Layers", each a name or an object with "Name"',
            fix="write it with get_engine_information(LayerInformationFormat.JSON), or trtexec --exportLayerInfo",
        ) from None


def _layer(value: str | Mapping[str, Any]) -> LayerInfo:
    if isinstance(value, str):
        return LayerInfo(value, "?")
    weights = [value[key]["Count"] for key in ("Weights", "Bias") if isinstance(value.get(key), Mapping)]
    return LayerInfo(
        name=str(value["Name"]),
        kind=str(value.get("LayerType", "?")),
        inputs=tuple(_tensor(tensor) for tensor in value.get("Inputs", ())),
        outputs=tuple(_tensor(tensor) for tensor in value.get("Outputs", ())),
        tactic=value.get("TacticName") or value.get("TacticValue"),
        nodes=tuple(dict.fromkeys(_ONNX_NODE.findall(str(value.get("Metadata", ""))))),
        parameters=sum(map(int, weights)) if weights else None,
    )


def _tensor(value: Mapping[str, Any]) -> TensorInfo:
    joined = value.get("Format/Datatype")
    layout = value.get("Format") if joined is None else joined
    told = joined if joined is not None else value.get("Datatype", value.get("DataType", layout))
    found = _WORD.search(str(told or ""))
    if layout is not None and (layout.lower() in _FORMATS or layout.startswith("N/A")):
        layout = None  # the number format alone, or not told before shapes are set
    shape = tuple(int(extent) for extent in value.get("Dimensions", ()))
    return TensorInfo(str(value["Name"]), shape, _FORMATS[found[1].lower()] if found else None, layout)


def _joined(tensors: tuple[TensorInfo, ...]) -> str:
    return " + ".join(sorted({tensor.precision for tensor in tensors if tensor.precision}))


def _inspector_text(engine: Engine) -> str:
    """What the inspector says of an engine that runs on this machine, at the shapes that it is tuned for."""
    from .trt.bindings import last_errors, library, process_logger

    trt = library(engine.target.runtime)
    runtime = trt.Runtime(process_logger(engine.target.runtime))  # must outlive the engine
    runtime.engine_host_code_allowed = False
    plan = runtime.deserialize_cuda_engine(verified_bytes(engine, engine.path))
    context = None if plan is None else plan.create_execution_context()
    if context is None:
        raise EngineError(
            f"TensorRT rejects the engine in {engine.folder}: {last_errors()}",
            expected="an engine built for this GPU by this version, and free memory on it",
            fix=f"build it again here: {engine.build_command()}",
        )
    extents = {name: axis["opt"] for name, axis in engine.axes.items()}
    for spec in engine.inputs:  # formats of dynamic tensors are told for given shapes only
        context.set_input_shape(spec.name, spec.concrete(engine.manifest["batch"]["opt"], extents))
    inspector = plan.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
