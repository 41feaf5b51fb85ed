"""int8 and fp8: ONNX Runtime's quantizer puts Q/DQ pairs around convolutions and matrix products, from real data."""

from __future__ import annotations

import contextlib
import errno
import logging
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...errors import ArtifactError, BuildError
from ..watch import Stopped
from .calibration import Calibration
from .delicate import DELICATE

OPSETS = {"int8": 13, "fp8": 19}
"""Versions of ONNX's operators from which on Q/DQ exist per channel, or with 8-bit floats."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ALONG = (  # operators between them that ONNX Runtime computes in int8, too, or that only move numbers
    *("Relu", "Clip", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Pad", "Split"),
)
_INT8_LARGEST, _FP8_LARGEST = 127.0, 448.0


def weighted_nodes(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Names of the nodes that can be quantized: convolutions and matrix products with constant weights."""
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    return tuple(
        node.name
        for node in graph.node
        if node.op_type in _WEIGHTED and any(name in weights for name in node.input[:2])
    )


def quantized(
    model: onnx.ModelProto,
    precision: str,
    excluded: Set[str],
    calibration: Calibration,
    *,
    fully: bool,
    between: Callable[[], object] = lambda: None,
) -> onnx.ModelProto:
    """The graph with Q/DQ pairs; weights per output channel, activations per tensor, ranges the largest ever seen.

    Args:
        model: a prepared float32 graph.
        precision: ``"int8"``, or ``"fp8"`` (E4M3).
        excluded: names of nodes that stay as they are.
        calibration: what to run to see the activations' ranges.
        fully: quantize results, biases and what lies between layers too, with zero points, as ONNX Runtime's kernels
            want it; otherwise only what weighted layers read, symmetrically, as TensorRT wants it.
        between: called before each batch of calibration; what it raises ends this.

    Raises:
        BuildError: nothing to quantize, or ONNX Runtime cannot do it. ArtifactError: no room for temporary files.
    """
    chosen = [name for name in weighted_nodes(model.graph) if name not in excluded]
    if not chosen:
        raise BuildError(
            f"no layer can be quantized to {precision}"
            + (f": all {len(excluded)} that exclude names are left out" if excluded else ""),
            expected="a convolution, a linear layer or a matrix product with constant weights",
            fix="build in fp16 or fp32, or exclude fewer layers",
        )
    float8 = precision == "fp8"
    if fully and not float8:
        results = {value.name for value in model.graph.output}
        chosen += [
            node.name
            for node in model.graph.node
            if node.op_type in _along(model) and node.name not in excluded and not _would_cut(node, results)
        ]
    options: dict[str, Any] = {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}}
    if float8 or not fully:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(_WEIGHTED),
            "DedicatedQDQPair": True,
            "AddQDQPairToWeight": float8,
        }
    found = _run(model, chosen, options, calibration, between)
    if float8:
        _to_float8_(found)
    return found


def _would_cut(node: onnx.NodeProto, results: Set[str]) -> bool:
    """Whether the quantizer would take the range after a ReLU for a result of the graph that is before it."""
    return node.op_type in ("Relu", "Clip") and node.input[0] in results


def _along(model: onnx.ModelProto) -> Set[str]:
    """What is quantized besides layers. Not sums where norms or softmax are left: a transformer's residual sums have
    too wide a range for 256 steps."""
    delicate = any(node.op_type in DELICATE for node in model.graph.node)
    return {*_ALONG} - ({"Add"} if delicate else set())


def _run(
    model: onnx.ModelProto,
    chosen: list[str],
    options: dict[str, Any],
    calibration: Calibration,
    between: Callable[[], object],
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    given = onnx.ModelProto()
    given.CopyFrom(model)
    del given.graph.value_info[:]
    helper.set_model_props(given, {"onnx.quant.pre_process": "onnxruntime.quant"})  # folded and inferred already
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch, _quiet():
        path = Path(scratch) / "quantized.onnx"
        try:
            quantize_static(
                given,
                path,
                _reader(calibration, between),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=options,
            )
        except Stopped:
            raise
        except Exception as problem:  # the quantizer raises what it meets: AssertionError, ValueError, ORT's own
            if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ArtifactError(
                    f"{scratch} cannot be written ({problem.strerror})",
                    expected="room for several copies of the network in the folder for temporary files",
                    fix="free the space, or set TMPDIR to a folder on another disk",
                ) from problem
            lines = str(problem).strip().splitlines()
            raise BuildError(
                f"ONNX Runtime could not quantize the graph ({lines[0] if lines else type(problem).__name__})",
                expected="operators that its CPU provider runs, for calibration, and weights that it can quantize",
                fix="exclude the layer it names, or build in fp16",
            ) from problem
        found = onnx.load(path)
    del found.metadata_props[:]
    return found


def _reader(calibration: Calibration, between: Callable[[], object]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration.batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            between()
            return next(self.batches, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer talks through the root logger, which would set up logging for the whole process."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _to_float8_(model: onnx.ModelProto) -> None:
    """Turn symmetric int8 pairs into E4M3 ones for the same ranges: what was 127 steps becomes 448, the largest E4M3.

    NVIDIA's quantizer takes the same way; ONNX Runtime's own for floats looks at the spread only and cuts outliers.
    """
    graph = model.graph
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales, zeros = {node.input[1] for node in pairs}, {node.input[2] for node in pairs}
    for tensor in graph.initializer:
        if tensor.name in scales:
            scale = numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                numpy_helper.from_array((scale * (_INT8_LARGEST / _FP8_LARGEST)).astype(scale.dtype), tensor.name)
            )
        elif tensor.name in zeros:
            count = int(np.prod(tensor.dims))
            tensor.CopyFrom(
                helper.make_tensor(tensor.name, TensorProto.FLOAT8E4M3FN, list(tensor.dims), bytes(count), raw=True)
            )
