"""From a module or an ONNX file to an engine for one target, kept in a folder that names its content."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import FORMAT_VERSION, digest_of, environment, write_artifact
from ..errors import ArtifactError, BuildError, ConfigError, nearest
from .backends import Backend, Built, Maker, backend_of
from .entry import KIND, ONNX_FILE, PLAN_FILE, PROGRAM_FILE, Engine, open_entry
from .onnx.file import OnnxFile, parity_as_json
from .precision.building import LoweredFile, calibration_of, is_lowering, lower, lowering_key
from .precision.calibration import Calibration
from .single_flight import single_flight
from .source import identity_of_file
from .target import Target, in_precision, in_runtime, load_target
from .watch import Flag, Progress, Watch

if TYPE_CHECKING:
    from .backends import Source


def build_engine(
    subject: Any,
    target: str | Path | Target = "cpu",
    example_inputs: Any = None,
    out: str | Path = "engines/out",
    *,
    name: str = "model",
    precision: str | None = None,
    exclude: str | Sequence[str] = (),
    calibration: Any = None,
    backend: str | None = None,
    progress: Callable[[Progress], object] | None = None,
    time_limit_s: float | None = None,
    cancel: Flag | Callable[[], object] | None = None,
) -> Engine:
    """Build an engine and return it, or return the verified one that an equal build left before.

    The entry is the folder ``out/<name>-<target>-<key>``. The key is the hash of the ONNX bytes (for torch, of the
    exported program), the target, the runtime's version and, for full TensorRT, the GPU; in a lower precision also of
    calibration data and the tools that lower the graph: equal keys mean interchangeable engines. The manifest also
    holds build time and environment, so the entry's own digest differs between two builds with one key. Compiled bytes
    are not part of the key: TensorRT-RTX mostly repeats them, but not for every network and GPU generation.

    Args:
        subject: an ``nn.Module`` (or an object with one in ``.module``), a path of an ONNX file, or an ``OnnxFile``;
            for torch a module.
        target: a shipped name, the path of a TOML file, or a ``Target``.
        example_inputs: a tensor or a tuple of tensors, batch on axis 0; needed for a bare module, unused for an ONNX
            file; a compact network brings its own.
        out: folder for entries.
        name: a plain name, the first part of the entry's.
        precision: instead of the target's: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"fp8"``; the target is
            then called ``<name>-<precision>``.
        exclude: names of nodes or modules, or one, with ``*`` and ``?``, that stay in fp32, besides the target's own.
        calibration: real inputs, which int8 and fp8 take their scales from, and on which every lower precision but
            torch's is compared with fp32: an iterable of batches, an array of samples, the path of an ``.npz`` file or
            of a folder of ``.npy`` files; see :func:`~deploy_sparse.engine.precision.calibration.read_calibration`.
            Without it fp16 and bf16 are compared on random numbers. Unused in fp32.
        backend: the runtime to use instead of the target's, for example ``"torch-tensorrt"``; the target is then called
            ``<name>-<runtime>``.
        progress: called with a :class:`~deploy_sparse.engine.watch.Progress` at each step of a TensorRT compilation,
            and before it at each batch of calibration and of the comparison with fp32.
        time_limit_s: seconds for all of it, waiting for another build of the same engine included; looked at between
            steps, and between batches of calibration.
        cancel: a ``threading.Event`` or a function; once that is set, or true, the build stops at its next step.

    Raises:
        ConfigError: unknown target, bad name or folder, int8 or fp8 without data, data that the inputs do not take.
        ExportError: the module does not export exactly. MissingDependencyError: the target's library is not installed.
        BuildError: it does not compile, or the engine's precision is not the one asked for, or the subject is of
        another type, or exclude names nothing, or a weight does not fit the precision. ArtifactError: a damaged file or
        entry, a folder instead of a file, or no room to write.
    """
    watch = Watch(progress, time_limit_s=time_limit_s, cancel=cancel)
    wanted = in_precision(in_runtime(load_target(target), backend), precision, exclude)
    _check_name(name)
    _check_out(out)
    way = backend_of(wanted)
    way.require(wanted)
    maker = way.maker(wanted)
    if not is_lowering(wanted) and (known := identity_of_file(subject)) is not None:
        key = _key("onnx", known, wanted, maker, {})  # the very same file may be built: no need to read its graph
        if (found := _existing(Path(out) / f"{name}-{wanted.name}-{key[:12]}", key)) is not None:
            return found
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-sparse-")))
        source, graph = way.source(subject, example_inputs, wanted, scratch)
        form = "onnx" if isinstance(source, OnnxFile) else "program"
        batch, axes = _batch_range(source, wanted), _axes(source, wanted)
        data = calibration_of(calibration, source, wanted)
        identity = source.identity if isinstance(source, OnnxFile) else source.sha256
        key = _key(form, identity, wanted, maker, lowering_key(wanted, data))
        folder = Path(out) / f"{name}-{wanted.name}-{key[:12]}"
        stack.enter_context(single_flight(folder, watch))
        if (found := _existing(folder, key)) is not None:
            return found
        started = time.perf_counter()
        built, made = _compile(way, source, graph, wanted, data, watch)
        seconds = time.perf_counter() - started
        engine_file = next(file for file in (PLAN_FILE, PROGRAM_FILE, ONNX_FILE) if file in built.payload)
        weights, whole = _weights(made.source if made else source), engine_file == ONNX_FILE
        manifest = {
            "name": name,
            "key": key,
            "engine_file": engine_file,
            "bytes": sum(len(built.payload[name]) for name in (engine_file, *(weights if whole else ()))),
            f"{form}_sha256": source.sha256,
            **({"opset": (made.source if made else source).opset} if isinstance(source, OnnxFile) else {}),
            "target": wanted.model_dump(mode="json"),
            "target_digest": wanted.digest,
            "runtime": {"name": wanted.runtime, "version": maker.version},
            "compute_capabilities": [maker.gpu["capability"]] if maker.gpu else list(wanted.compute_capabilities),
            "gpu": maker.gpu,
            "inputs": [spec.as_json() for spec in source.inputs],
            "outputs": [spec.as_json() for spec in source.outputs],
            "batch": batch,
            **({"axes": axes} if axes else {}),
            "precision": {
                "asked": wanted.precision,
                "built": built.precision,
                "read_from": built.read_from,
                "tf32": wanted.tf32,
                **(made.report if made else {}),
            },
            "parameters": source.parameters,
            "macs": source.macs,
            "parity": parity_as_json(source.parity),
            **built.facts,
            **({"agreement": made.agreement} if made else {}),
            **({"weights": weights} if weights else {}),
            "build_seconds": round(seconds, 3),
            "environment": environment(),
        }
        try:
            write_artifact(folder, KIND, built.payload, manifest)
        except ArtifactError:
            if (found := _existing(folder, key)) is None:
                raise
            return found  # another process finished the same build first
        return open_entry(folder)


def require_runtime(target: Target) -> None:
    """Check that this machine can build for ``target``, without building: before a long training, for example.

    Raises:
        MissingDependencyError: the target's library is not installed.
        BuildError: full TensorRT without a GPU.
    """
    backend_of(target).require(target)


def _compile(
    way: Backend, source: Source, graph: bytes, target: Target, data: Calibration | None, watch: Watch
) -> tuple[Built, LoweredFile | None]:
    """The engine, and the graph that it was made from where that had to be lowered first."""
    if not (isinstance(source, OnnxFile) and is_lowering(target)):
        return way.compile(source, graph, target, watch), None
    low = lower(source, graph, target, data, watch)
    return way.compile(low.source, low.graph, target, watch), low


def _existing(folder: Path, key: str) -> Engine | None:
    """The verified entry; None where there is none, or none any more: a clean-up may take it away meanwhile."""
    if not folder.exists():
        return None
    try:
        engine = open_entry(folder)
    except ArtifactError as problem:
        if not folder.exists():
            return None
        raise ArtifactError(
            problem.given, expected=problem.expected, fix=f"remove {folder} and build again"
        ) from problem
    if engine.manifest["key"] != key:
        raise ArtifactError(
            f"{folder} holds another engine", expected="a free folder", fix=f"remove {folder} or choose another --out"
        )
    with contextlib.suppress(OSError):  # a folder that may only be read serves as well
        os.utime(folder / f"{KIND}.json")  # its age counts from now: a clean-up keeps the latest of a name
    return replace(engine, cached=True)


def _check_name(name: str) -> None:
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)):
        raise ConfigError(
            f"engine name {name!r}",
            expected="up to 64 letters, digits, dots, dashes and underscores, not starting with a dot",
            fix="choose a plain name, for example resnet18",
        )


def _check_out(out: Any) -> None:
    if not isinstance(out, str | Path):
        raise ConfigError(
            f"the folder for engines is of type {type(out).__name__}",
            expected="the path of a folder",
            fix="give for example engines/out",
        )


def _weights(source: Source) -> list[str]:
    return [file.name for file in source.weights] if isinstance(source, OnnxFile) else []


def _key(form: str, identity: str, target: Target, maker: Maker, low: Mapping[str, Any]) -> str:
    return digest_of(
        {
            "format_version": FORMAT_VERSION,
            form: identity,
            "target": target.digest,
            "runtime": {target.runtime: maker.version},
            "gpu": maker.gpu,
            **low,
        }
    )


def _batch_range(source: Source, target: Target) -> dict[str, int]:
    if any(spec.batched for spec in source.inputs):
        return {"min": target.batch.min, "opt": target.batch.opt, "max": target.batch.max}
    fixed = next((spec.shape[0] for spec in source.inputs if spec.shape), 1)  # the file's own batch, no choice left
    return {"min": int(fixed), "opt": int(fixed), "max": int(fixed)}


def _axes(source: Source, target: Target) -> dict[str, dict[str, int]]:
    """Ranges of the dynamic axes other than the batch, by name; each has one in the target, and none is left over."""
    names = {name for spec in source.inputs for name in spec.axes.values()}
    for spec in source.inputs:
        for axis, name in spec.axes.items():
            if name not in target.axes:
                raise BuildError(
                    f"input {spec.name!r} has the dynamic axis {axis} ({name!r}): {spec}",
                    expected=f"a fixed extent there, or a range for it in target {target.name!r}",
                    fix=f"give the target a table [axes.{name}] with min, opt and max, or export with a fixed extent",
                )
    for name in target.axes:
        if name not in names:
            raise BuildError(
                f"target {target.name!r} has a range for the axis {name!r}, which no input has",
                expected=f"one of {', '.join(sorted(names))}" if names else "no [axes]: only the batch can be dynamic",
                fix=f"{nearest(name, sorted(names))}inputs are {', '.join(map(str, source.inputs))}",
            )
    return {name: target.axes[name].model_dump() for name in sorted(names)}
