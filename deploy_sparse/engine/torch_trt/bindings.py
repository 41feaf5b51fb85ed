"""torch-tensorrt, which compiles parts of a torch program with TensorRT: is it here, and how is it asked?

The only modules that touch ``torch_tensorrt`` are this one, which imports it when asked, and those that take it from
here. Versions 2.8 to 2.14 differ in arguments that came and went; those are looked up in the function's signature.
Networks are strongly typed throughout, as with TensorRT itself.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from ...errors import BuildError, MissingDependencyError
from ..cuda.gpu import local_gpu
from ..fit import Obstacle, gpu_takes, release, version_takes
from ..target import Target

_INSTALL = (
    "pip install torch-tensorrt (the extra 'torch-tensorrt'; TensorRT's libraries come from NVIDIA's own package index)"
)
_WANTED = "the optional library torch-tensorrt, and an NVIDIA GPU with its driver; targets with runtime torch need none"
DEVICE = "cuda"
_SMALLEST_PART = 5  # operators that are worth an engine of their own: the library's default


def library() -> Any:
    """The Python module ``torch_tensorrt``.

    Raises:
        MissingDependencyError: not installed, for another PyTorch, no driver, or its shared libraries do not load.
    """
    version = _installed_version()
    if local_gpu() is None:  # its own error would be that of a device query deep within an import
        raise MissingDependencyError(
            f"torch-tensorrt {version} does not load: no NVIDIA driver or no GPU here",
            expected=_WANTED,
            fix="use a machine with a GPU; rtx-portable compiles without one",
        )
    shown = warnings.showwarning
    try:
        found = importlib.import_module("torch_tensorrt")
    except Exception as problem:  # ImportError, OSError, RuntimeError, or a plain Exception of its own
        raise MissingDependencyError(
            f"torch-tensorrt {version} does not load: {_first_line(problem)}",
            expected=f"{_WANTED}; the version of TensorRT that it was made for",
            fix=f"install it anew with what it needs: {_INSTALL}",
        ) from problem
    finally:
        if warnings.showwarning is not shown:
            logging.captureWarnings(False)  # it sends all warnings of the process to the log
    return found


def builder_library(target: Target) -> Any:
    """The Python module, once it is sure that it can build for ``target`` here.

    Raises:
        MissingDependencyError: as :func:`library`.
        BuildError: the GPU is another than the target is for, or the target asks for what there is not.
    """
    found, gpu = library(), local_gpu()
    if gpu is not None and target.compute_capabilities and gpu.capability not in target.compute_capabilities:
        raise BuildError(
            f"target {target.name!r} compiles for the GPU of this machine, which is a {gpu.name} ({gpu.capability})",
            expected=f"a GPU of {', '.join(target.compute_capabilities)}",
            fix="build on the machine that will run it, or leave compute_capabilities out",
        )
    if target.hardware_compatibility == "same-capability":
        raise BuildError(
            f"target {target.name!r} asks for hardware_compatibility 'same-capability', which torch-tensorrt has not",
            expected="'none' or 'ampere-plus'",
            fix="take one of these, or runtime tensorrt",
        )
    return found


def version() -> str:
    """Versions of torch-tensorrt and of the TensorRT that it uses, for example ``"2.14.0, TensorRT 11.1.0.106"``.

    Raises:
        MissingDependencyError: as :func:`library`.
    """
    from ..trt.bindings import library as tensorrt

    return f"{library().__version__}, TensorRT {tensorrt('tensorrt').__version__}"


def compile_options(compiler: Callable[..., Any], target: Target, timings: str, operators: int) -> dict[str, Any]:
    """The target as arguments of ``torch_tensorrt.dynamo.compile``, those of this version of it.

    Args:
        compiler: the function.
        timings: path of the file for kernel timings.
        operators: of the program; one of few is compiled all the same.

    Raises:
        BuildError: this version has no argument for something.
    """
    wanted = {
        "disable_tf32": not target.tf32,
        "sparse_weights": target.sparse_weights,
        "workspace_size": (target.workspace_mib or 0) << 20,
        "optimization_level": target.builder_level,
        "max_aux_streams": target.aux_streams,
        "version_compatible": target.version_compatible,
        "hardware_compatible": target.hardware_compatibility == "ampere-plus",
        "immutable_weights": target.refit == "none",
        "refit_identical_engine_weights": target.refit == "identical",
        "timing_cache_path": timings,
        "num_avg_timing_iters": 8,  # the default of 1 picks noisier kernels
        "min_block_size": max(1, min(_SMALLEST_PART, operators)),
        "cache_built_engines": False,
        "reuse_cached_engines": False,  # a folder for all users, whose files it would unpickle
    }
    known = inspect.signature(compiler).parameters
    if missing := [name for name in wanted if name not in known]:
        raise BuildError(
            f"this version of torch-tensorrt has no argument {missing[0]!r}",
            expected="torch-tensorrt 2.8 to 2.14",
            fix=f"install one of these: {_INSTALL}",
        )
    typed = {"use_explicit_typing": True}  # up to 2.12; later ones know no other way
    return wanted | (typed if typed.keys() <= known.keys() else {})


def engine_module(plan: bytes, taken: list[str], given: list[str], name: str, *, target: Target) -> Any:
    """The module that runs a serialized TensorRT engine.

    Args:
        plan: the engine.
        taken, given: names of its inputs and outputs, in the order of arguments and results.
        name: what it is called in messages.
        target: what it was built for.
    """
    found = library()
    settings = found.dynamo.CompilationSettings(
        version_compatible=target.version_compatible,
        hardware_compatible=target.hardware_compatibility == "ampere-plus",
    )
    return found.runtime.TorchTensorRTModule(plan, taken, given, name=name, settings=settings)


def obstacle(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the engine with this manifest cannot run on this machine, or None. Decided before touching the engine."""
    gpu, own = local_gpu(), str(manifest["target"]["name"])
    if gpu is None:
        fix = "load it on a machine with that GPU, or build for the CPU of this one"
        return Obstacle("no NVIDIA GPU", "an NVIDIA GPU and its driver", fix, "torch-cpu")
    try:
        here = version()
    except MissingDependencyError as problem:
        return Obstacle(problem.given, problem.expected, problem.fix, None)
    if not _takes(manifest, here):
        return _other_version(manifest, here)
    if not gpu_takes(manifest, gpu.name, gpu.capability):
        tuned_on = manifest["gpu"]
        expected = f"a {tuned_on['name']} ({tuned_on['capability']}), which it was tuned on"
        return Obstacle(f"{gpu.name} ({gpu.capability})", expected, "build it again here", own)
    return None


def version_obstacle(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the torch-tensorrt installed here does not take the engine, on whatever GPU; None where it does or is not
    installed. Nothing is imported for it."""
    try:
        here = _installed_version()
    except MissingDependencyError:
        return None
    built = str(manifest["runtime"]["version"]).partition(",")[0]
    if release(built)[:2] == release(here)[:2]:
        return None
    return _other_version(manifest, here)


def _installed_version() -> str:
    """Of the package, without importing it.

    Raises:
        MissingDependencyError: it is not installed, or was made for another PyTorch.
    """
    try:
        found, torch = metadata.version("torch-tensorrt"), metadata.version("torch")
    except metadata.PackageNotFoundError as problem:
        other = "; the package torch-tensorrt-rtx, which is, takes its place and is another library"
        raise MissingDependencyError(
            f"torch-tensorrt is not installed{other if _is_installed('torch-tensorrt-rtx') else ''}",
            expected=_WANTED,
            fix=_INSTALL,
        ) from problem
    if release(found)[:2] != release(torch)[:2]:  # which would crash rather than fail
        raise MissingDependencyError(
            f"torch-tensorrt {found} was made for another PyTorch than {torch}, which is installed",
            expected=f"PyTorch {'.'.join(map(str, release(found)[:2]))}, or the torch-tensorrt of {torch}",
            fix=f"pip install 'torch-tensorrt=={'.'.join(map(str, release(torch)[:2]))}.*'",
        )
    return found


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _takes(manifest: Mapping[str, Any], here: str) -> bool:
    """Whether versions, as :func:`version` gives them, go together: plans are TensorRT's, the rest torch-tensorrt's."""
    (old, _, old_trt), (new, _, new_trt) = (
        text.partition(", TensorRT ") for text in (str(manifest["runtime"]["version"]), here)
    )
    forward = bool(manifest["target"].get("version_compatible", False))
    same = release(old)[:2] == release(new)[:2] or (forward and release(new) >= release(old))
    return same and version_takes(old_trt, new_trt, version_compatible=forward)


def _other_version(manifest: Mapping[str, Any], here: str) -> Obstacle:
    expected = f"torch-tensorrt {manifest['runtime']['version']}: engines are not portable across versions"
    return Obstacle(f"torch-tensorrt {here}", expected, "build it again here", str(manifest["target"]["name"]))


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(problem).__name__
