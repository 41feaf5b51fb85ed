"""The parity sample: inputs and the outputs that ONNX Runtime gave, by which another machine proves its own engine."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.tensors import TensorSpec
from ..errors import EngineError
from .archive import checked_archive, refusal, write_archive
from .placing import content

BATCH = 2
"""Rows of a sample, where the engine takes that many."""

# Largest difference that counts as equal, of the largest output. fp32: what an export is held to. The others: sixteen
# spacings of the format's numbers at 1, but for fp8 and fp4, of which that would be everything.
_TOLERANCES = {"fp64": 1e-4, "fp32": 1e-4, "tf32": 2**-6, "fp16": 2**-6, "bf16": 2**-3, "int8": 2**-3,
               "no floating point": 1e-4}  # fmt: skip
_COARSEST = 2**-2


@dataclass(frozen=True)
class Sample:
    """Arrays by name, in the order of the engine's inputs and outputs; axis 0 is the batch where it has one."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def as_bytes(self) -> bytes:
        """An ``.npz`` file with the arrays ``input_0``…, ``output_0``…; the same bytes every time."""
        stream = io.BytesIO()
        arrays = {f"input_{i}.npy": array for i, array in enumerate(self.inputs.values())}
        arrays |= {f"output_{i}.npy": array for i, array in enumerate(self.outputs.values())}
        write_archive(stream, {name: content(_npy(array)) for name, array in arrays.items()})
        return stream.getvalue()


@dataclass(frozen=True)
class Difference:
    """How far outputs are from those of a sample.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: the largest, over outputs, of that difference over the output's largest magnitude.
        top1: share of rows whose largest entry of the first output is the same one.
    """

    max_abs: float
    max_rel: float
    top1: float


def tolerance_of(precision: Mapping[str, Any]) -> float:
    """The largest difference, of the largest output, that rounding explains; ``precision`` is a manifest's."""
    formats = [*str(precision["built"]).split(" + "), *(["tf32"] if precision.get("tf32") else [])]
    return max(_TOLERANCES.get(name, _COARSEST) for name in formats)


def is_plain(spec: TensorSpec) -> bool:
    """Whether NumPy itself, without other packages, has the tensor's type."""
    try:
        return np.dtype(spec.dtype).isbuiltin == 1 and np.dtype(spec.dtype).kind in "fiub"
    except TypeError:
        return False


def check_sample(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Sample:
    """A sample of these arrays.

    Raises:
        EngineError: outputs with NaN or infinite entries, to which nothing can be compared.
    """
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise EngineError(
                f"output {name!r} has NaN or infinite entries on the sample",
                expected="finite outputs, which another machine's can be compared with",
                fix="give inputs of your own: bundle_engine(…, sample={name: array})",
            )
    return Sample(dict(inputs), dict(outputs))


def read_sample(path: Path, data: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Sample:
    """The sample in an ``.npz`` file, as :meth:`Sample.as_bytes` writes it; nothing is unpickled.

    Args:
        path: the bundle that it is from, for messages.
        data: the ``.npz`` file.
        inputs, outputs: what the arrays are of.

    Raises:
        ArtifactError: no whole file of that kind, or other arrays than these tensors need.
    """
    with checked_archive(path, io.BytesIO(data)) as archive:
        members = {name: archive.read(name, len(data)) for name in archive.sizes}
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, specs in (("input", inputs), ("output", outputs)):
        found[kind] = {}
        for index, spec in enumerate(specs):
            member = f"{kind}_{index}.npy"
            try:
                array = _array(members[member])
                if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
                    raise ValueError(f"{array.dtype} {array.shape} for {spec}")
                if (spec.batched and not len(array)) or (kind == "output" and not np.isfinite(array).all()):
                    raise ValueError("no rows" if not array.size else "NaN or infinite entries")
            except (KeyError, ValueError, TypeError) as problem:
                raise refusal(path, f"its parity sample has no usable {member} for {spec} ({problem})") from None
            found[kind][spec.name] = array
    return Sample(found["input"], found["output"])


def difference(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Difference:
    """Compare outputs by name with those of a sample.

    Raises:
        EngineError: an output is missing, or of another shape, or not finite.
    """
    worst_abs, worst_rel, top1 = 0.0, 0.0, 1.0
    for index, (name, theirs) in enumerate(expected.items()):
        ours = actual.get(name)
        if ours is None or ours.shape != theirs.shape or not np.isfinite(ours).all():
            what = "is missing" if ours is None else f"has shape {ours.shape}"
            if ours is not None and ours.shape == theirs.shape:
                what = "has NaN or infinite entries"
            raise EngineError(
                f"output {name!r} {what}",
                expected=f"finite numbers of shape {theirs.shape}, as in the parity sample",
                fix="build in another precision, or for another target",
            )
        if not theirs.size:
            continue
        distance = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
        worst_abs = max(worst_abs, distance)
        worst_rel = max(worst_rel, distance / (float(np.abs(theirs.astype(np.float64)).max()) or 1.0))
        if index == 0 and theirs.ndim > 1:
            answers = [array.reshape(array.shape[0], -1).argmax(axis=1) for array in (ours, theirs)]  # [rows]
            top1 = float((answers[0] == answers[1]).mean())
    return Difference(worst_abs, worst_rel, top1)


def resized(arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], batch: int) -> dict[str, np.ndarray]:
    """The arrays with this many rows, cut or repeated; those without a batch axis as they are."""
    rows = {spec.name: np.arange(batch) % arrays[spec.name].shape[0] for spec in specs if spec.batched}
    return {name: array[rows[name]] if name in rows else array for name, array in arrays.items()}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _array(data: bytes) -> np.ndarray:
    """The array of an ``.npy`` file; its size is checked before any memory is taken. ValueError on anything else."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version of the format")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as problem:  # the header is parsed as Python, whose tokenizer has errors of its own
        raise ValueError(f"no header: {problem}") from problem
    body = data[stream.tell() :]
    if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError("its header does not fit its content")
    return np.frombuffer(body, dtype).reshape(shape).copy()
