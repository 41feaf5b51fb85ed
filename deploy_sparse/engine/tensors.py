"""What goes into an engine and comes out: names, types, shapes; checked feeds and seeded samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import EngineError, MissingDependencyError, nearest

Feeds = Mapping[str, np.ndarray]
NOTHING: Mapping[str, Any] = MappingProxyType({})


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

    def concrete(self, batch: int, extents: Mapping[str, int] = NOTHING) -> tuple[int, ...]:
        """The shape at this batch size, with these extents of the other dynamic axes."""
        first = tuple(batch if isinstance(extent, str) else extent for extent in self.shape[:1])
        return first + tuple(extents[extent] if isinstance(extent, str) else extent for extent in self.shape[1:])

    def as_json(self) -> dict[str, Any]:
        """JSON form, read back by :func:`spec_from_json`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(str(extent) for extent in self.shape)}]"


class Form(NamedTuple):
    """What is checked of an array, wherever it lies.

    Attributes:
        dtype: NumPy's name of its type.
        contiguous: whether it is C-contiguous.
        pointer, nbytes: the memory it takes.
        cast, copy: how its library converts it to a type, and makes it contiguous; for messages.
    """

    dtype: str
    shape: tuple[int, ...]
    contiguous: bool
    pointer: int = 0
    nbytes: int = 0
    writeable: bool = True
    cast: str = ".astype(np.{})"
    copy: str = "np.ascontiguousarray(array)"


def spec_from_json(entry: Mapping[str, Any]) -> TensorSpec:
    """Inverse of :meth:`TensorSpec.as_json`; KeyError or TypeError on anything else."""
    return TensorSpec(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's type of this name; bfloat16 is the package ml_dtypes'.

    Raises:
        MissingDependencyError: bfloat16 without that package.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as problem:
        raise MissingDependencyError(
            "NumPy alone has no bfloat16", expected="the package ml_dtypes", fix="pip install ml-dtypes"
        ) from problem
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def numpy_form(name: str, array: Any, wanted: TensorSpec) -> Form:
    """The form of a NumPy array, without its place: that takes as long to find out as all the rest.

    Raises:
        EngineError: it is something else.
    """
    if not isinstance(array, np.ndarray):
        hint = ".detach().cpu().numpy()" if hasattr(array, "detach") else "np.asarray(…)"
        there = "call run_on_gpu, or " if getattr(array, "is_cuda", False) else ""
        raise EngineError(
            f"{name} is a {type(array).__name__}",
            expected=f"a NumPy array {wanted}",
            fix=f"{there}convert it with {hint}",
        )
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise EngineError(
            f"{name} is a masked array, of which the engine would read what is masked too",
            expected=f"a NumPy array {wanted}",
            fix="fill in what is masked: array.filled(0)",
        )
    flags = array.flags
    return Form(_name_of(array.dtype), array.shape, flags.c_contiguous, writeable=flags.writeable)


def placed_form(name: str, array: Any, wanted: TensorSpec) -> Form:
    """:func:`numpy_form` with the array's place."""
    form = numpy_form(name, array, wanted)
    return form._replace(pointer=array.ctypes.data, nbytes=array.nbytes)


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    """NumPy's name of a type, which takes NumPy a microsecond; ``">f4"`` for one with its bytes swapped."""
    return str(dtype)


def check_feeds(
    feeds: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    batch_range: tuple[int, int],
    ranges: Mapping[str, tuple[int, int]] = NOTHING,
    form: Callable[[str, Any, TensorSpec], Form] = numpy_form,
) -> int:
    """Check names, types, shapes and batch of ``feeds``; return the batch size (1 when it is not dynamic).

    Nothing is cast or reshaped silently.

    Args:
        ranges: smallest and largest extent of dynamic axes other than the batch, by name.
        form: what is known of a feed, from what it is called in messages, itself and its specification.

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
        found = form(f"input {spec.name!r}", feeds[spec.name], spec)
        _check_form(found, spec, ranges)
        if spec.batched:
            batches[spec.name] = found.shape[0]
    if len(set(batches.values())) > 1:
        raise EngineError(
            f"inputs have different batch sizes: {', '.join(f'{n} {b}' for n, b in batches.items())}",
            expected="one batch size for all inputs",
            fix="slice or pad the inputs to one batch size",
        )
    batch = next(iter(batches.values()), 1)
    if batches:
        check_batch(batch, batch_range)
    return batch


def check_batch(batch: int, batch_range: tuple[int, int]) -> None:
    """Refuse what is no batch size in the range.

    Raises:
        EngineError: it is not.
    """
    smallest, largest = batch_range
    if not isinstance(batch, int | np.integer) or not smallest <= batch <= largest:
        raise EngineError(
            f"batch {batch!r} is outside this engine's range",
            expected=f"a batch of {smallest} to {largest}",
            fix="split or pad the batch, or build with a target whose [batch] range holds it",
        )


def check_outputs(
    out: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    feeds: Mapping[str, Form],
    inputs: Sequence[TensorSpec],
    form: Callable[[str, Any, TensorSpec], Form] = placed_form,
) -> None:
    """Check arrays that results are to be written into: names, types, shapes, and that nothing else lies there.

    Args:
        out: arrays by name of output, not necessarily for all.
        specs: the engine's outputs.
        feeds: the forms of checked feeds, by name of input.
        inputs: the engine's inputs.
        form: as for :func:`check_feeds`.

    Raises:
        EngineError: an array that cannot take the result; the message says how to mend it.
    """
    if not isinstance(out, Mapping):
        raise EngineError(
            f"out is a {type(out).__name__}",
            expected="a dictionary from output name to array",
            fix="pass {name: array}",
        )
    extents = {
        named: extent
        for spec in inputs
        for named, extent in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(named, str)
    }
    by_name, taken = {spec.name: spec for spec in specs}, [(f"input {name!r}", f) for name, f in feeds.items()]
    for name, array in out.items():
        if name not in by_name:
            raise EngineError(
                f"unknown output {name!r}",
                expected=f"the outputs {', '.join(map(str, specs))}",
                fix=f"{nearest(str(name), list(by_name))}rename that key of out",
            )
        spec, called = by_name[name], f"output {name!r}"
        found = form(called, array, spec)
        wanted = tuple(extents.get(extent, extent) if isinstance(extent, str) else extent for extent in spec.shape)
        fits = len(wanted) == len(found.shape) and all(
            isinstance(w, str) or w == got for w, got in zip(wanted, found.shape, strict=True)
        )
        if found.dtype != spec.dtype or not fits:
            shape = ", ".join(map(str, wanted))
            raise EngineError(
                f"{called} goes into an array {found.dtype} {list(found.shape)}",
                expected=f"{spec.dtype} [{shape}]",
                fix="allocate it with that type and shape, or leave it out",
            )
        if not (found.contiguous and found.writeable):
            raise EngineError(
                f"{called} goes into an array that is {'read-only' if found.contiguous else 'not contiguous'}",
                expected="a C-contiguous array that may be written to",
                fix="allocate a new one, or leave it out",
            )
        for other, there in taken:
            if found.pointer < there.pointer + there.nbytes and there.pointer < found.pointer + found.nbytes:
                raise EngineError(
                    f"{called} goes into memory of {other}", expected="memory of its own", fix="allocate a new array"
                )
        taken.append((called, found))


def sample_feeds(
    specs: Sequence[TensorSpec], batch: int, seed: int = 0, extents: Mapping[str, int] = NOTHING
) -> dict[str, np.ndarray]:
    """Seeded inputs of one batch size: standard normal for floats, 0 and 1 for everything else."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for spec in specs:
        shape, dtype = spec.concrete(batch, extents), numpy_dtype(spec.dtype)
        if "float" in spec.dtype:
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(dtype)
    return feeds


def _check_form(found: Form, spec: TensorSpec, ranges: Mapping[str, tuple[int, int]]) -> None:
    if found.dtype != spec.dtype:
        raise EngineError(
            f"input {spec.name!r} has dtype {found.dtype}",
            expected=spec.dtype,
            fix=f"convert it on purpose: {found.cast.format(spec.dtype)}",
        )
    if len(found.shape) != len(spec.shape):
        hint = "add the batch axis: array[None]" if len(found.shape) == len(spec.shape) - 1 else "reshape it"
        raise EngineError(
            f"input {spec.name!r} has {len(found.shape)} dimensions, shape {found.shape}",
            expected=f"{len(spec.shape)} dimensions: {spec}",
            fix=hint,
        )
    for axis, (extent, wanted) in enumerate(zip(found.shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and extent != wanted:
            raise EngineError(
                f"input {spec.name!r} has {extent} at axis {axis}, shape {found.shape}",
                expected=f"{wanted} there: {spec}",
                fix="resize the input, or build an engine for this shape",
            )
        if axis and isinstance(wanted, str) and not ranges[wanted][0] <= extent <= ranges[wanted][1]:
            raise EngineError(
                f"input {spec.name!r} has {extent} at axis {axis} ({wanted}), shape {found.shape}",
                expected=f"{ranges[wanted][0]} to {ranges[wanted][1]} there: {spec}",
                fix=f"resize the input, or build with a target whose [axes.{wanted}] range holds it",
            )
    if not found.contiguous:
        raise EngineError(
            f"input {spec.name!r} is not contiguous in memory",
            expected="a C-contiguous array",
            fix=f"copy it: {found.copy}",
        )
