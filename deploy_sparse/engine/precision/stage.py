"""The stage between export and compilation: a float32 graph in, the graph of a target's precision out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from ...errors import BuildError, ConfigError
from . import floats, quantize
from .calibration import Calibration
from .delicate import delicate_nodes
from .graph import name_nodes_, prepared, types_of
from .names import matching, names_of
from .reading import is_lowered, layer_formats, others_than

RULES = 2
"""Part of the keys of lowered engines; raised when the same graph and target come out otherwise than before."""

_HOW = {
    "fp16": "float32 with every operator's result rounded to fp16",
    "bf16": "float32 with every operator's result rounded to bf16",
    "int8": "the Q/DQ graph",
    "fp8": "the Q/DQ graph",
}


@dataclass(frozen=True)
class Lowered:
    """A graph in a lower precision.

    Attributes:
        data: its bytes.
        report: for the manifest: ``layers`` (convolutions and matrix products by number format), ``excluded`` (names of
            nodes that the target left out), and for fp16 and bf16 ``in_fp32`` (numbers of other nodes that stay in
            float32, by reason), for int8 and fp8 ``unquantized`` (names of layers without Q/DQ) and ``calibration``.
        compared: bytes to compare with float32 on the CPU; None for a graph that came lowered.
        how: what these compute, for people.
    """

    data: bytes
    report: Mapping[str, Any] = field(repr=False)
    compared: bytes | None = field(repr=False)
    how: str


def lowered(
    graph: bytes,
    precision: str,
    *,
    exclude: Sequence[str] = (),
    calibration: Calibration | None = None,
    runtime: str = "onnxruntime",
    between: Callable[[], object] = lambda: None,
) -> Lowered:
    """Lower a float32 graph. A graph that comes in the precision is checked and returned as it is.

    Inputs and outputs stay float32. BatchNorm is folded first.

    Args:
        graph: bytes of a valid ONNX file.
        precision: ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
        exclude: patterns of node names or module paths that stay in float32, or without Q/DQ.
        calibration: real data; needed for int8 and fp8.
        runtime: for ``"onnxruntime"`` int8 is quantized throughout, for others around weighted layers only.
        between: called before each batch of calibration; what it raises ends this.

    Raises:
        BuildError: a pattern that matches nothing, a weight beyond the format, nothing to lower, or a layer that does
            not come out in the precision. ConfigError: no calibration data.
    """
    model = onnx.load_model_from_string(graph)
    if is_lowered(model):
        return _as_it_came(model, graph, precision, exclude)
    if precision in floats.CODES:
        return _in_format(prepared(model, floats.OPSETS[precision]), precision, exclude)
    if calibration is None:
        raise ConfigError(
            f"{precision} without calibration data",
            expected="real inputs, some hundred samples: their ranges become the scales of the quantized tensors",
            fix="give build_engine(…, calibration=batches), or --calibration FILE.npz",
        )
    base = prepared(model, quantize.OPSETS[precision])
    excluded = matching(names_of(base.graph), exclude)
    fully = runtime == "onnxruntime"
    found = quantize.quantized(base, precision, excluded, calibration, fully=fully, between=between)
    source = {"source": calibration.source, "samples": calibration.samples, "sha256": calibration.digest}
    data = _bytes(found, precision)
    report = _report(found, precision, excluded) | {"calibration": source}
    return Lowered(data, report, data, _HOW[precision])


def _in_format(base: onnx.ModelProto, precision: str, exclude: Sequence[str]) -> Lowered:
    excluded = matching(names_of(base.graph), exclude)
    delicate = delicate_nodes(base.graph, floats.low_type(precision))
    kept = excluded | delicate.keys()
    found = floats.in_format(base, precision, kept)
    simulated = floats.in_format(base, precision, kept, simulated=True)
    reasons = Counter(why for name, why in delicate.items() if name not in excluded)
    report = _report(found, precision, excluded) | {"in_fp32": dict(sorted(reasons.items()))}
    return Lowered(_bytes(found, precision), report, _bytes(simulated, precision), _HOW[precision])


def _as_it_came(model: onnx.ModelProto, graph: bytes, precision: str, exclude: Sequence[str]) -> Lowered:
    name_nodes_(model.graph)
    excluded = matching(names_of(model.graph), exclude)
    return Lowered(graph, _report(model, precision, excluded), None, "the graph was given in this precision")


def _report(model: onnx.ModelProto, precision: str, excluded: frozenset[str]) -> dict[str, Any]:
    """What the graph's layers came out as.

    Raises:
        BuildError: something else than asked for.
    """
    formats = layer_formats(model)
    others = others_than(formats, precision, excluded)
    by_format = dict(sorted(Counter(formats.values()).items()))
    quantized = precision not in floats.CODES
    there = precision in by_format if formats or quantized else floats.CODES[precision] in types_of(model).values()
    if not there or (others and not quantized):
        shown = ", ".join(f"{name!r} is {formats[name]}" for name in others[:3]) or f"none is {precision}"
        raise BuildError(
            f"asked for {precision}, but of {len(formats)} layers {shown}",
            expected=f"{precision} in all convolutions and matrix products that are not excluded",
            fix="exclude these, or start from the float32 graph"
            if others
            else "exclude fewer layers, or build in fp32",
        )
    found: dict[str, Any] = {"layers": by_format, "excluded": sorted(excluded)}
    return found | ({"unquantized": sorted(n for n in formats if formats[n] != precision)} if quantized else {})


def _bytes(model: onnx.ModelProto, precision: str) -> bytes:
    data: bytes = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        lines = str(problem).strip().splitlines()
        raise BuildError(
            f"the graph has no valid form in {precision} ({lines[0] if lines else problem!r})",
            expected="operators that exist in this precision",
            fix="exclude the layer it names, or build in fp32",
        ) from problem
    return data
