"""The stage as building an engine sees it: which files, which data, what of it is in an engine's key and manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from ...errors import BuildError
from ..onnx.file import OnnxFile, describe_graph, parse_graph
from ..target import RUNTIMES_OF, Target
from ..tensors import TensorSpec, sample_feeds
from ..watch import Watch
from .calibration import Calibration, read_calibration

SAMPLES = 16
"""Rows of random inputs that stand in where no data is given."""

_TOOLS = ("onnx", "onnxruntime", "onnxscript")  # what folds, converts and quantizes


@dataclass(frozen=True)
class LoweredFile:
    """An ONNX file in the precision of a target.

    Attributes:
        source: the lowered graph, described; facts of the module it came from are kept, parity is not.
        graph: its bytes.
        report: what the manifest says of it under ``precision``.
        agreement: what the manifest says of it under ``agreement``.
    """

    source: OnnxFile
    graph: bytes
    report: Mapping[str, Any]
    agreement: Mapping[str, Any]


def is_lowering(target: Target) -> bool:
    """Whether engines of this target are made from a lowered ONNX graph; torch converts the module instead."""
    return target.precision != "fp32" and target.runtime in RUNTIMES_OF["exclude"]


def calibration_of(given: Any, source: Any, target: Target) -> Calibration | None:
    """Calibration data for this file; None where the target has no use for it, or none was given.

    Raises:
        ArtifactError, ConfigError: as :func:`read_calibration`.
    """
    if not is_lowering(target):
        return None
    ranges = {name: (extents.min, extents.max) for name, extents in target.axes.items()}
    return read_calibration(given, source.inputs, ranges)


def lowering_key(target: Target, calibration: Calibration | None) -> dict[str, Any]:
    """What tells engines apart that come from one graph and target: rules and tools, and the data; empty for fp32."""
    if not is_lowering(target):
        return {}
    from .stage import RULES

    tools = {name: version(name) for name in _TOOLS}
    return {"lowering": {"rules": RULES, **tools, "calibration": calibration.digest if calibration else None}}


def lower(source: OnnxFile, graph: bytes, target: Target, calibration: Calibration | None, watch: Watch) -> LoweredFile:
    """Lower a file to the precision of its target, and compare the two; ``watch`` may stop it between batches.

    Raises:
        BuildError, ConfigError: as :func:`~.stage.lowered`, :func:`~.agreement.agreement` and ``watch``.
    """
    from .agreement import agreement
    from .stage import lowered

    whole = _whole(source, graph)
    watch.check()
    made = lowered(
        whole,
        target.precision,
        exclude=target.exclude,
        calibration=calibration,
        runtime=target.runtime,
        between=_told(watch, "calibrating", len(calibration.batches) if calibration else 0),
    )
    found: dict[str, Any] = {"against": "fp32", "data": None, "computed": made.how}
    if made.compared is not None:
        batches = calibration.batches if calibration else _random(source.inputs, target)
        found["data"] = calibration.source if calibration else "random numbers, seed 0"
        found |= agreement(
            whole,
            made.compared,
            batches,
            precision=target.precision,
            as_written=target.runtime != "onnxruntime",
            between=_told(watch, f"comparing {target.precision} with fp32", len(batches)),
        )
    described = describe_graph(source.path, made.data, parse_graph(source.path, made.data))
    kept = replace(described, parameters=source.parameters, macs=source.macs)
    return LoweredFile(kept, made.data, made.report, found)


def _whole(source: OnnxFile, graph: bytes) -> bytes:
    """The graph with all its weights in it.

    Raises:
        BuildError: they are more than one file can hold.
    """
    if not source.weights:
        return graph
    import onnx
    from google.protobuf.message import EncodeError
    from onnx.external_data_helper import load_external_data_for_model

    model = onnx.load_model_from_string(graph)
    source.read_weights()  # verified; their names are plain
    load_external_data_for_model(model, str(source.path.parent))
    try:
        whole: bytes = model.SerializeToString(deterministic=True)
        return whole
    except (EncodeError, ValueError) as problem:
        size = sum(file.bytes for file in source.weights)
        raise BuildError(
            f"{source.path} has {size / 1e9:.2f} GB of weights",
            expected="less than 2 GB, which is what a graph that is lowered can hold",
            fix="build it in fp32, or for PyTorch: a target with runtime torch",
        ) from problem


def _told(watch: Watch, what: str, total: int) -> Callable[[], None]:
    """What is called before each of so many batches: it reports that one, and may stop the build."""
    done = 0

    def between() -> None:
        nonlocal done
        done = min(done + 1, total)  # the quantizer asks once more at the end
        watch.tell(f"{what}, batch {done} of {total}")

    return between


def _random(inputs: Sequence[TensorSpec], target: Target) -> list[dict[str, np.ndarray]]:
    rows = max(target.batch.min, min(SAMPLES, target.batch.max))
    return [sample_feeds(inputs, rows, 0, {name: extents.opt for name, extents in target.axes.items()})]
