"""From a module or an ONNX file to an engine for one target, kept in a folder that names its content."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import FORMAT_VERSION, digest_of, environment, write_artifact
from ..errors import ArtifactError, BuildError, ConfigError, nearest
from .entry import KIND, ONNX_FILE, PLAN_FILE, PROGRAM_FILE, Engine, open_entry
from .float_formats import check_precision, precision_of
from .onnx_file import OnnxFile, float_types, parity_as_json, parse_graph, sidecar_path
from .source import module_of, onnx_of
from .target import Target, load_target

if TYPE_CHECKING:
    from ._torch_build import TorchProgram


@dataclass(frozen=True)
class _Maker:
    """What compiles: the runtime's version, and the GPU when the result is tied to it."""

    version: str
    gpu: Mapping[str, str] | None


def build_engine(
    subject: Any,
    target: str | Path | Target = "cpu",
    example_inputs: Any = None,
    out: str | Path = "engines/out",
    *,
    name: str = "model",
) -> Engine:
    """Build an engine and return it, or return the verified one that an equal build left before.

    The entry is the folder ``out/<name>-<target>-<key>``. The key is the hash of the ONNX bytes (for torch, of the
    exported program), the target, the runtime's version and, for full TensorRT, the GPU: equal keys mean
    interchangeable engines. The manifest also holds build time and environment, so the entry's own digest differs
    between two builds with one key. Compiled bytes are not part of the key: TensorRT-RTX mostly repeats them, but not
    for every network and GPU generation.

    Args:
        subject: an ``nn.Module`` (or an object with one in ``.module``), a path of an ONNX file, or an ``OnnxFile``;
            for torch a module.
        target: a shipped name, the path of a TOML file, or a ``Target``.
        example_inputs: a tensor or a tuple of tensors, batch on axis 0; needed for a bare module, unused for an ONNX
            file; a compact network brings its own.
        out: folder for entries.
        name: a plain name, the first part of the entry's.

    Raises:
        ConfigError: unknown target, bad name or folder. ExportError: the module does not export exactly.
        MissingDependencyError: the target's library is not installed. BuildError: it does not compile, or the
        engine's precision is not the one asked for, or the subject is of another type. ArtifactError: a damaged file
        or entry, a folder instead of a file, or no room to write.
    """
    wanted = load_target(target)
    _check_name(name)
    _check_out(out)
    require_runtime(wanted)
    maker = _maker(wanted)
    source, graph = _source(subject, example_inputs, wanted)
    form = "program" if wanted.runtime == "torch" else "onnx"
    batch, axes = _batch_range(source, wanted), _axes(source, wanted)
    key = digest_of(
        {
            "format_version": FORMAT_VERSION,
            form: source.sha256,
            "target": wanted.digest,
            "runtime": {wanted.runtime: maker.version},
            "gpu": maker.gpu,
        }
    )
    folder = Path(out) / f"{name}-{wanted.name}-{key[:12]}"
    if (found := _existing(folder, key)) is not None:
        return found
    started = time.perf_counter()
    payload, built, read_from = _compile(source, graph, wanted)
    seconds = time.perf_counter() - started
    engine_file = next(file for file in (PLAN_FILE, PROGRAM_FILE, ONNX_FILE) if file in payload)
    manifest = {
        "name": name,
        "key": key,
        "engine_file": engine_file,
        "bytes": len(payload[engine_file]),
        f"{form}_sha256": source.sha256,
        **({"opset": source.opset} if isinstance(source, OnnxFile) else {}),
        "target": wanted.model_dump(mode="json"),
        "target_digest": wanted.digest,
        "runtime": {"name": wanted.runtime, "version": maker.version},
        "compute_capabilities": [maker.gpu["capability"]] if maker.gpu else list(wanted.compute_capabilities),
        "gpu": maker.gpu,
        "inputs": [spec.as_json() for spec in source.inputs],
        "outputs": [spec.as_json() for spec in source.outputs],
        "batch": batch,
        **({"axes": axes} if axes else {}),
        "precision": {"asked": wanted.precision, "built": built, "read_from": read_from, "tf32": wanted.tf32},
        "parameters": source.parameters,
        "macs": source.macs,
        "parity": parity_as_json(source.parity),
        "build_seconds": round(seconds, 3),
        "environment": environment(),
    }
    try:
        write_artifact(folder, KIND, payload, manifest)
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
    if target.on_gpu and target.runtime != "torch":  # a program is exported on the CPU
        from ._trt import builder_library

        builder_library(target)


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


def _source(subject: Any, example_inputs: Any, target: Target) -> tuple[OnnxFile | TorchProgram, bytes]:
    """What the engine is made from, and its bytes."""
    if target.runtime == "torch":
        module, inputs = module_of(subject, example_inputs)
        from ._torch_build import torch_program

        program = torch_program(module, inputs, target)
        return program, program.data
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        source = onnx_of(subject, example_inputs, Path(scratch) / ONNX_FILE)
        return source, source.read()


def _maker(target: Target) -> _Maker:
    if target.runtime == "torch":
        from ._torch_build import VERSION

        return _Maker(VERSION, None)
    if not target.on_gpu:
        from . import _ort

        return _Maker(_ort.VERSION, None)
    from . import _trt

    version = str(_trt.library(target.runtime).__version__)
    gpu = _trt.local_gpu() if target.runtime == "tensorrt" else None  # RTX compiles ahead of time, for no one GPU
    return _Maker(version, {"name": gpu.name, "capability": gpu.capability} if gpu else None)


def _batch_range(source: OnnxFile | TorchProgram, target: Target) -> dict[str, int]:
    if any(spec.batched for spec in source.inputs):
        return {"min": target.batch.min, "opt": target.batch.opt, "max": target.batch.max}
    fixed = next((spec.shape[0] for spec in source.inputs if spec.shape), 1)  # the file's own batch, no choice left
    return {"min": int(fixed), "opt": int(fixed), "max": int(fixed)}


def _axes(source: OnnxFile | TorchProgram, target: Target) -> dict[str, dict[str, int]]:
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


def _compile(source: OnnxFile | TorchProgram, graph: bytes, target: Target) -> tuple[dict[str, bytes], str, str]:
    """Payload files, the precision built, and where it was read."""
    if not isinstance(source, OnnxFile):
        border = "" if target.precision == "fp32" else " between its float32 inputs and outputs"
        where = f"the torch program, every tensor{border}"
        return {PROGRAM_FILE: graph}, precision_of(source.float_types), where
    types = float_types(parse_graph(source.path, graph))
    check_precision(types, target, "the ONNX graph")
    payload = {ONNX_FILE: graph, sidecar_path(Path(ONNX_FILE)).name: _sidecar_bytes(source)}
    if not target.on_gpu:
        from ._ort import OrtSession

        OrtSession(graph, target.threads).close()  # refuses operators it does not have
        return payload, precision_of(types), "the ONNX graph, every tensor"
    from ._trt import compile_onnx

    compiled = compile_onnx(graph, target, source.inputs)
    check_precision(compiled.float_types, target, "the parsed network")
    payload[PLAN_FILE] = compiled.plan
    return payload, precision_of(compiled.float_types), "the parsed, strongly typed network, every layer output"


def _sidecar_bytes(source: OnnxFile) -> bytes:
    """The ONNX file's own facts travel with it, so that a rebuild elsewhere keeps parameters, MACs and parity."""
    return (json.dumps(source.sidecar(), indent=2) + "\n").encode()
