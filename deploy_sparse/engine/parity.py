"""Does the exported graph compute the module's function? Compared in ONNX Runtime, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BuildError, ExportError
from .onnx.file import Parity
from .onnx.runtime import OrtSession
from .tensors import Feeds, TensorSpec

TOLERANCE = 1e-4  # of the largest output magnitude; a correct fp32 graph stays near 1e-6


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a module's output in the order the exporter names them.

    Raises:
        ExportError: something in it is no tensor.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in tensors_of(entry)]
    if isinstance(value, tuple | list):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    raise ExportError(
        f"the module returns a {type(value).__name__}",
        expected="a tensor, or tuples, lists or dictionaries of tensors",
        fix="wrap the module so that forward returns tensors only",
    )


def with_batch(inputs: Sequence[torch.Tensor], batch: int) -> tuple[torch.Tensor, ...]:
    """The inputs cut, or repeated row by row, to this batch size along axis 0."""
    rows = [torch.arange(batch) % tensor.shape[0] for tensor in inputs]
    return tuple(tensor[index.to(tensor.device)] for tensor, index in zip(inputs, rows, strict=True))


def check_parity(
    module: torch.nn.Module,
    graph: bytes,
    inputs: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    batches: Sequence[int],
    *,
    folder: Path | None = None,
) -> Parity:
    """Run module (in its present mode) and graph on the same rows at each batch size.

    Args:
        inputs: one tensor per graph input, batch on axis 0.
        specs: the graph's inputs, in the same order.
        folder: where the files lie in which the graph keeps weights, for graphs that do.

    Raises:
        ExportError: NaN or infinite outputs, other shapes, or a difference above ``TOLERANCE``.
    """
    try:
        session = OrtSession(graph, folder=folder)
    except BuildError as problem:
        raise ExportError(
            f"the graph cannot be compared with the module: {problem.given}",
            expected="a float32 module of operators that ONNX Runtime has",
            fix="convert it first: module.float(); or replace the operator it names",
        ) from problem
    return compare_outputs(module, session.run, inputs, specs, batches)


def compare_outputs(
    module: torch.nn.Module,
    run: Callable[[Feeds], Mapping[str, np.ndarray]],
    inputs: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    batches: Sequence[int],
    *,
    runtime: str = "ONNX Runtime",
    tolerance: float | None = TOLERANCE,
) -> Parity:
    """Run module (in its present mode) and ``run`` on the same rows at each batch size.

    Args:
        run: from arrays by input name to arrays in the order of the module's outputs.
        inputs, specs, batches: as for :func:`check_parity`.
        runtime: what runs, for messages.
        tolerance: largest difference, of the largest output; None to tell any, which finite outputs are asked for.

    Raises:
        ExportError: NaN or infinite outputs, other shapes, or a difference above ``tolerance``.
    """
    worst_abs, worst_rel, hits, samples = 0.0, 0.0, 0, 0
    for batch in batches:
        rows = with_batch(inputs, batch)
        with torch.no_grad():
            own = (tensor.clone() for tensor in rows)  # forward may write into them
            expected = [tensor.detach().cpu().numpy() for tensor in tensors_of(module(*own))]
        feeds = {spec.name: tensor.detach().cpu().numpy() for spec, tensor in zip(specs, rows, strict=True)}
        actual = list(run(feeds).values())
        for index, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
            difference, relative = _compare(ours, theirs, f"output {index} at batch {batch}", runtime, tolerance)
            worst_abs, worst_rel = max(worst_abs, difference), max(worst_rel, relative)
        if expected[0].ndim and expected[0].size:
            rows_of = [array.reshape(array.shape[0], -1) for array in (expected[0], actual[0])]  # [rows, n]
            hits += int((rows_of[0].argmax(axis=1) == rows_of[1].argmax(axis=1)).sum())
            samples += expected[0].shape[0]
    return Parity(worst_abs, worst_rel, hits / samples if samples else 1.0, tuple(batches))


def _compare(
    ours: np.ndarray, theirs: np.ndarray, where: str, runtime: str, tolerance: float | None
) -> tuple[float, float]:
    if ours.shape != theirs.shape:
        raise ExportError(
            f"{where} has shape {theirs.shape} in {runtime} and {ours.shape} in the module",
            expected="a graph whose batch axis is dynamic throughout",
            fix="take the batch size from the input's shape in forward, never as a constant",
        )
    if not np.isfinite(ours).all():
        raise ExportError(
            f"{where} of the module has NaN or infinite entries",
            expected="finite outputs on the example inputs",
            fix="check the weights and the example inputs; an earlier checkpoint may be sound",
        )
    if ours.size == 0:
        return 0.0, 0.0
    scale = float(np.abs(ours).max()) or 1.0
    difference = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    if not np.isfinite(theirs).all() and tolerance is None:
        raise ExportError(
            f"{where} has NaN or infinite entries in {runtime}, outputs reach {scale:.3g} in the module",
            expected="numbers that fit the precision",
            fix="build it in bf16, which has the range of fp32, or in fp32",
        )
    if tolerance is not None and not difference <= tolerance * scale:  # also true when the graph's output is NaN
        raise ExportError(
            f"{where} differs by {difference:.3g} in {runtime}, outputs reach {scale:.3g}",
            expected=f"a difference of at most {tolerance:g} of the largest output",
            fix="look for randomness or a batch-dependent constant in forward; compare layer by layer",
        )
    return difference, difference / scale
