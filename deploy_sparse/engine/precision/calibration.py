"""Real data that a lower precision is calibrated on and compared with float32 on: read, checked, named by a digest."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import ArtifactError, ConfigError, EngineError
from ..tensors import TensorSpec, check_feeds

ROWS = 32  # of one batch, where the data is one long array
_FORMS = "an .npz file, a folder of .npy files, an array of samples, a mapping of such, or an iterable of input batches"


@dataclass(frozen=True)
class Calibration:
    """Checked input batches.

    Attributes:
        batches: arrays by input name, of the types and shapes that the graph takes.
        digest: SHA-256 of names, types, shapes and numbers.
        source: where they come from, for people.
        samples: rows of all batches together.
    """

    batches: tuple[dict[str, np.ndarray], ...]
    digest: str
    source: str
    samples: int


def read_calibration(
    given: Any, inputs: Sequence[TensorSpec], ranges: Mapping[str, tuple[int, int]]
) -> Calibration | None:
    """Calibration data in any of its forms, for a graph with these inputs.

    Args:
        given: the path of an ``.npz`` file with one array per input, ``[samples, …]``, or of a folder of ``.npy``
            files, each a batch for the only input; one array of samples; a mapping of such by input name, such as
            ``np.load`` returns; or an iterable of batches, each an array or tensor for the only input, a tuple of them
            in the order of the inputs, or a mapping by input name. None stays None.
        inputs: the graph's.
        ranges: smallest and largest extents of dynamic axes other than the batch, by name.

    Raises:
        ArtifactError: no such file, or one that is damaged. ConfigError: no data in it, or data that the inputs do not
            take.
    """
    if given is None or isinstance(given, Calibration):
        return given
    if isinstance(given, str | Path):
        path = Path(given)
        source, raw = path.name, _from_folder(path) if path.is_dir() else _from_npz(path, inputs)
    elif hasattr(given, "__array__"):
        source, raw = "the array given", _split({inputs[0].name: _array(given)}, inputs)
    elif isinstance(given, Mapping):
        source, raw = "the arrays given", _of_inputs({str(key): _array(value) for key, value in given.items()}, inputs)
    elif isinstance(given, Iterable) and not isinstance(given, bytes):
        source, raw = "the batches given", list(given)
    else:
        raise ConfigError(f"calibration data is a {type(given).__name__}", expected=_FORMS, fix="pass one of these")
    batches = tuple(_named(batch, inputs, index) for index, batch in enumerate(raw))
    if not batches or not all(array.size for batch in batches for array in batch.values()):
        raise ConfigError(
            f"{source} holds no samples" if not batches else f"{source} has an empty batch",
            expected="samples of real data, some hundred of them",
            fix="give some that the network was not trained on",
        )
    rows = sum(_checked(batch, inputs, ranges, source, index) for index, batch in enumerate(batches))
    if all(_is_one_number(batches, spec.name) for spec in inputs):
        raise ConfigError(
            f"{source} is the same number everywhere",
            expected="real inputs: the ranges within the network follow from them",
            fix="give samples as the network will see them, preprocessed in the same way",
        )
    return Calibration(batches, _digest(batches), source, rows)


def _from_npz(path: Path, inputs: Sequence[TensorSpec]) -> list[Any]:
    if path.suffix != ".npz":
        state = "is no .npz file" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {state}", expected=_FORMS, fix="np.savez(path, input=images) writes one")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = _read_array(file)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist", expected=_FORMS, fix="check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        raise _damaged(path, problem) from problem
    if not arrays:
        raise ConfigError(f"{path} holds no arrays", expected=_FORMS, fix="np.savez(path, input=images) writes one")
    return _of_inputs(arrays, inputs)


def _from_folder(path: Path) -> list[Any]:
    batches = []
    for file in sorted(path.glob("*.npy")):
        try:
            with file.open("rb") as stream:
                batches.append(_read_array(stream))
        except (OSError, ValueError, EOFError) as problem:
            raise _damaged(file, problem) from problem
    return batches


def _read_array(file: IO[bytes]) -> np.ndarray:
    """Numbers in NumPy's own format; never objects, which would be unpickled."""
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _damaged(path: Path, problem: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read ({problem})",
        expected="arrays of numbers, as np.savez and np.save write them",
        fix="write it again: np.savez(path, input=images)",
    )


def _of_inputs(arrays: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec]) -> list[Any]:
    """Long arrays by name as batches; a single one for a single input may have any name."""
    if len(arrays) == len(inputs) == 1:
        arrays = {inputs[0].name: next(iter(arrays.values()))}
    return _split(arrays, inputs)


def _split(arrays: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec]) -> list[Any]:
    """Long arrays ``[samples, …]`` as batches; where an input has a fixed batch, of that many rows."""
    rows = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(rows) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ConfigError(
            f"calibration arrays have shapes {shapes or 'of nothing'}",
            expected="as many samples, on axis 0, of each input",
            fix="cut them to one length",
        )
    fixed = next((spec.shape[0] for spec in inputs if spec.shape and not spec.batched), None)
    step, total = int(fixed or ROWS), rows.pop()
    whole = total - total % step if fixed else total  # what does not fill a fixed batch is left out
    return [{name: array[start : start + step] for name, array in arrays.items()} for start in range(0, whole, step)]


def _named(batch: Any, inputs: Sequence[TensorSpec], index: int) -> dict[str, np.ndarray]:
    if isinstance(batch, Mapping):
        return {str(name): _array(value) for name, value in batch.items()}
    values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(values) != len(inputs):
        raise ConfigError(
            f"calibration batch {index} holds {len(values)} arrays",
            expected=f"one for each of {', '.join(map(str, inputs))}",
            fix="leave labels out: (images for images, labels in loader)",
        )
    return {spec.name: _array(value) for spec, value in zip(inputs, values, strict=True)}


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if isinstance(value, np.ma.MaskedArray):
        raise ConfigError(
            "calibration data is a masked array", expected="numbers only", fix="fill in what is masked: array.filled(0)"
        )
    return np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)


def _checked(
    batch: Mapping[str, np.ndarray],
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, tuple[int, int]],
    source: str,
    index: int,
) -> int:
    """Rows of a batch that the inputs take."""
    try:
        rows = check_feeds(batch, inputs, (1, 2**62), ranges)
    except EngineError as problem:
        raise ConfigError(
            f"calibration batch {index} of {source}: {problem.given}", expected=problem.expected, fix=problem.fix
        ) from problem
    for name, array in batch.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(
                f"calibration batch {index} of {source} has NaN or infinite numbers in {name!r}",
                expected="finite numbers",
                fix="leave such samples out",
            )
    first = next(iter(batch.values()))
    return rows if any(spec.batched for spec in inputs) else int(first.shape[0]) if first.ndim else 1


def _is_one_number(batches: Sequence[Mapping[str, np.ndarray]], name: str) -> bool:
    """Whether an input has more than one entry over all batches, and all of them are equal."""
    first = batches[0][name].flat[0]
    several = sum(batch[name].size for batch in batches) > 1
    return several and all(bool((batch[name] == first).all()) for batch in batches)


def _digest(batches: Sequence[Mapping[str, np.ndarray]]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            array = batch[name]
            found.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            found.update(array.tobytes())
    return found.hexdigest()
