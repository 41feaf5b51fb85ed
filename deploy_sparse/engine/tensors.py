"""What goes into an engine and comes out: names, types, shapes; checked feeds and seeded samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import EngineError, nearest

Feeds = Mapping[str, np.ndarray]
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as in the ONNX graph.
        dtype: NumPy's name, for example ``"float32"``.
        shape: fixed extents as integers, dynamic ones by name; of the first axis that is the batch.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def batched(self) -> bool:
        """Whether the first axis is dynamic."""
        return bool(self.shape) and isinstance(self.shape[0], str)

    @property
    def axes(self) -> dict[int, str]:
        """Names of the dynamic axes but the batch, by their position."""
        return {axis: extent for axis, extent in enumerate(self.shape) if axis and isinstance(extent, str)}

    def concrete(self, batch: int, extents: Mapping[str, int] = _NONE) -> tuple[int, ...]:
        """The shape at this batch size, with these extents of the other dynamic axes."""
        first = tuple(batch if isinstance(extent, str) else extent for extent in self.shape[:1])
        return first + tuple(extents[extent] if isinstance(extent, str) else extent for extent in self.shape[1:])

    def as_json(self) -> dict[str, Any]:
        """JSON form, read back by :func:`spec_from_json`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(str(extent) for extent in self.shape)}]"


def spec_from_json(entry: Mapping[str, Any]) -> TensorSpec:
    """Inverse of :meth:`TensorSpec.as_json`; KeyError or TypeError on anything else."""
    return TensorSpec(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))


def check_feeds(
    feeds: Feeds,
    specs: Sequence[TensorSpec],
    batch_range: tuple[int, int],
    ranges: Mapping[str, tuple[int, int]] = _NONE,
) -> int:
    """Check names, types, shapes and batch of ``feeds``; return the batch size (1 when it is not dynamic).

    Nothing is cast or reshaped silently.

    Args:
        ranges: smallest and largest extent of dynamic axes other than the batch, by name.

    Raises:
        EngineError: feeds the engine does not accept; the message says how to mend them.
    """
    if not isinstance(feeds, Mapping):
        raise EngineError(
            f"feeds is a {type(feeds).__name__}",
            expected="a dictionary from input name to NumPy array",
            fix=f"pass {{{specs[0].name!r}: array}}" if specs else "pass {}",
        )
    known = [spec.name for spec in specs]
    for name in feeds:
        if name not in known:
            raise EngineError(
                f"unknown input {name!r}",
                expected=f"the inputs {', '.join(map(str, specs))}",
                fix=f"{nearest(str(name), known)}rename that key of the feeds",
            )
    batches: dict[str, int] = {}
    for spec in specs:
        if spec.name not in feeds:
            raise EngineError(
                f"input {spec.name!r} is missing", expected=f"an array for {spec}", fix="add it to the feeds"
            )
        array = feeds[spec.name]
        _check_array(array, spec, ranges)
        if spec.batched:
            batches[spec.name] = array.shape[0]
    if len(set(batches.values())) > 1:
        raise EngineError(
            f"inputs have different batch sizes: {', '.join(f'{n} {b}' for n, b in batches.items())}",
            expected="one batch size for all inputs",
            fix="slice or pad the inputs to one batch size",
        )
    batch = next(iter(batches.values()), 1)
    smallest, largest = batch_range
    if batches and not smallest <= batch <= largest:
        raise EngineError(
            f"batch {batch} is outside this engine's range",
            expected=f"a batch of {smallest} to {largest}",
            fix="split or pad the batch, or build with a target whose [batch] range holds it",
        )
    return batch


def sample_feeds(
    specs: Sequence[TensorSpec], batch: int, seed: int = 0, extents: Mapping[str, int] = _NONE
) -> dict[str, np.ndarray]:
    """Seeded inputs of one batch size: standard normal for floats, 0 and 1 for everything else."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in specs:
        shape, dtype = spec.concrete(batch, extents), np.dtype(spec.dtype)
        if dtype.kind == "f":
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(dtype)
    return feeds


def _check_array(array: Any, spec: TensorSpec, ranges: Mapping[str, tuple[int, int]]) -> None:
    if not isinstance(array, np.ndarray):
        hint = ".detach().cpu().numpy()" if hasattr(array, "detach") else "np.asarray(…)"
        raise EngineError(
            f"input {spec.name!r} is a {type(array).__name__}",
            expected=f"a NumPy array {spec}",
            fix=f"convert it with {hint}",
        )
    if array.dtype != np.dtype(spec.dtype):
        raise EngineError(
            f"input {spec.name!r} has dtype {array.dtype}",
            expected=spec.dtype,
            fix=f"convert it on purpose: .astype(np.{spec.dtype})",
        )
    if array.ndim != len(spec.shape):
        hint = "add the batch axis: array[None]" if array.ndim == len(spec.shape) - 1 else "reshape it"
        raise EngineError(
            f"input {spec.name!r} has {array.ndim} dimensions, shape {array.shape}",
            expected=f"{len(spec.shape)} dimensions: {spec}",
            fix=hint,
        )
    for axis, (extent, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and extent != wanted:
            raise EngineError(
                f"input {spec.name!r} has {extent} at axis {axis}, shape {array.shape}",
                expected=f"{wanted} there: {spec}",
                fix="resize the input, or build an engine for this shape",
            )
        if axis and isinstance(wanted, str) and not ranges[wanted][0] <= extent <= ranges[wanted][1]:
            raise EngineError(
                f"input {spec.name!r} has {extent} at axis {axis} ({wanted}), shape {array.shape}",
                expected=f"{ranges[wanted][0]} to {ranges[wanted][1]} there: {spec}",
                fix=f"resize the input, or build with a target whose [axes.{wanted}] range holds it",
            )
    if not array.flags.c_contiguous:
        raise EngineError(
            f"input {spec.name!r} is not contiguous in memory",
            expected="a C-contiguous array",
            fix="copy it: np.ascontiguousarray(array)",
        )
