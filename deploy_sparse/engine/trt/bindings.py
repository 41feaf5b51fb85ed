"""TensorRT and TensorRT-RTX behind one code path: the only module that imports either, and only when asked.

Versions 10.16, 11.x and RTX differ in flags that came and went; those are looked up with ``hasattr``. Networks are
strongly typed throughout: number formats come from the ONNX graph and are never chosen by the compiler.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import BuildError, MissingDependencyError
from ..cuda.gpu import Gpu
from ..cuda.gpu import local_gpu as local_gpu
from ..fit import Obstacle, gpu_takes, version_takes
from ..target import Target, list_targets
from ..tensors import TensorSpec
from ..watch import Watch
from .config import builder_config, label
from .messages import ran_out_of_memory, readable, refusal
from .monitor import progress_monitor
from .timings import attach_timings, save_timings, timing_file

log = logging.getLogger("deploy_sparse.tensorrt")

_IMPORT_NAMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "tensorrt": "pip install tensorrt (the extra 'tensorrt'; its libraries come from NVIDIA's own package index)",
    "tensorrt-rtx": "pip install tensorrt-rtx (the extra 'rtx')",
}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool", "FP8": "float8", "FP4": "float4"}
_ONE_AT_A_TIME = threading.Lock()  # concurrent builds in one process have crashed TensorRT 10.16
_errors: deque[str] = deque(maxlen=20)  # what TensorRT said last, since the start of a build
_watching = [Watch()]  # what the build under way reports to


@dataclass(frozen=True)
class Compiled:
    """A serialized engine, and the number formats of the network it was compiled from."""

    plan: bytes
    float_types: frozenset[str]


def library(runtime: str) -> Any:
    """The Python module of ``"tensorrt"`` or ``"tensorrt-rtx"``.

    Raises:
        MissingDependencyError: not installed, or its shared libraries do not load.
    """
    try:
        return importlib.import_module(_IMPORT_NAMES[runtime])
    except (ImportError, OSError) as problem:
        state = "is not installed" if isinstance(problem, ModuleNotFoundError) else f"does not load ({problem})"
        raise MissingDependencyError(
            f"{runtime} {state}",
            expected=f"the optional library {runtime}; targets with runtime onnxruntime need none",
            fix=_INSTALL[runtime],
        ) from problem


def plugin_library() -> tuple[Any, Any]:
    """The Python modules ``tensorrt`` and ``tensorrt.plugin``, for plugins compiled ahead of time.

    Raises:
        MissingDependencyError: full TensorRT is not installed, or has no such plugins.
    """
    trt = library("tensorrt")
    try:
        plugin = importlib.import_module("tensorrt.plugin")
        _ = plugin.aot_impl, plugin.KernelLaunchParams
    except (ImportError, AttributeError) as problem:
        raise MissingDependencyError(
            f"tensorrt {trt.__version__} has no plugins compiled ahead of time ({problem})",
            expected="tensorrt.plugin with aot_impl: TensorRT 10.16 or newer",
            fix=f"{_INSTALL['tensorrt']}; or leave plugins off: the layer's native form needs none",
        ) from problem
    return trt, plugin


def builder_library(target: Target) -> Any:
    """The Python module that compiles for a TensorRT target, once it is sure that it can do so here.

    Raises:
        MissingDependencyError: the library is not installed.
        BuildError: full TensorRT without a GPU, or with another than the target is for.
    """
    trt = library(target.runtime)
    if target.runtime != "tensorrt":
        return trt
    gpu = local_gpu()
    if gpu is None:
        raise BuildError(
            f"target {target.name!r} compiles for the GPU of this machine, which has none",
            expected="an NVIDIA GPU and its driver",
            fix="build on the machine that will run it, or take a target that compiles without a GPU: rtx-portable",
        )
    if target.compute_capabilities and gpu.capability not in target.compute_capabilities:
        raise BuildError(
            f"target {target.name!r} compiles for the GPU of this machine, which is a {gpu.name} ({gpu.capability})",
            expected=f"a GPU of {', '.join(target.compute_capabilities)}",
            fix="build on the machine that will run it, or take target tensorrt, which is for whatever GPU is there",
        )
    return trt


def process_logger(runtime: str) -> Any:
    """The one TensorRT logger of this process (a second one would be ignored); it feeds Python's logging.

    Errors are collected rather than printed: they come back in exceptions. TensorRT's error recorder would do the
    same, but destroying a network that has one ends TensorRT-RTX 1.7 with a segmentation fault.
    """
    return _logger(library(runtime))


def data_type_name(dtype: Any) -> str:
    """NumPy's name of a TensorRT data type, for example ``"float32"``."""
    return str(_DTYPES.get(dtype.name, dtype.name.lower()))


def compile_onnx(
    graph: bytes,
    target: Target,
    inputs: Sequence[TensorSpec],
    *,
    watch: Watch | None = None,
    path: Path | None = None,
) -> Compiled:
    """Compile the bytes of an ONNX file for a TensorRT target.

    Args:
        inputs: the graph's inputs; dynamic axes get the target's ranges.
        watch: hears of the progress and may stop it.
        path: the file, where it keeps weights in others beside it.

    Raises:
        MissingDependencyError: the library is not installed.
        BuildError: full TensorRT without a GPU, an operator TensorRT does not take, a failed compilation, too little
            memory, or stopped by ``watch``.
    """
    trt = builder_library(target)
    watch = watch or Watch()
    with _turn(watch), watch.signals_kept():
        try:
            return _compile(trt, graph, target, inputs, watch, path)
        except MemoryError:
            raise _out_of_memory(trt, target, "no memory is left on this machine") from None


def _compile(
    trt: Any, graph: bytes, target: Target, inputs: Sequence[TensorSpec], watch: Watch, path: Path | None
) -> Compiled:
    builder = trt.Builder(_logger(trt))
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, graph, target, path)
    config = builder_config(trt, builder, target)
    _add_profile(builder, config, network, inputs, target)
    timings = _timing_file(trt, target)
    cache = attach_timings(config, timings)
    config.progress_monitor = progress_monitor(trt, watch)
    watch.check()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        watch.check()
        raise _failed(trt, target)
    watch.finish()
    if timings is not None and cache is not None:
        save_timings(config, cache, timings)
    return Compiled(bytes(plan), _float_types(network))


@contextmanager
def _turn(watch: Watch) -> Iterator[None]:
    """One build at a time; what TensorRT says meanwhile is of it."""
    watch.wait(lambda: _ONE_AT_A_TIME.acquire(blocking=False), "waiting for another build of this process")
    before = _watching[0]
    try:
        _errors.clear()
        _watching[0] = watch
        yield
    finally:
        _watching[0] = before
        _ONE_AT_A_TIME.release()


def _failed(trt: Any, target: Target) -> BuildError:
    if ran_out_of_memory(_errors):
        return _out_of_memory(trt, target, last_errors())
    return BuildError(
        f"{label(trt)} could not compile the network for {target.name!r}: {last_errors()}",
        expected="a network the compiler supports on this target",
        fix="try rtx-portable or a smaller batch range; replace the layer it names",
    )


def _out_of_memory(trt: Any, target: Target, why: str) -> BuildError:
    return BuildError(
        f"{label(trt)} ran out of memory while it compiled for {target.name!r}: {why}",
        expected="enough free memory, on the GPU too where the target compiles on it",
        fix="close what else uses it; or give the target a smaller batch.max, or a workspace_mib",
    )


def last_errors() -> str:
    """What TensorRT logged as errors since the last build began, in one line."""
    return readable(_errors) or "it gave no reason"


def obstacle(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the engine with this manifest cannot run on this machine, or None. Decided before touching the engine."""
    gpu = local_gpu()
    if gpu is None:
        fix = "load it on a machine with that GPU, or build for the CPU of this one"
        return Obstacle("no NVIDIA GPU", "an NVIDIA GPU and its driver", fix, "cpu")
    try:
        return other_version(manifest) or _other_gpu(manifest, gpu)
    except MissingDependencyError as problem:
        return Obstacle(problem.given, problem.expected, problem.fix, None)


def other_version(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the library installed here does not take the engine, on whatever GPU, or None.

    Raises:
        MissingDependencyError: it is not installed.
    """
    runtime, version, target = manifest["runtime"]["name"], manifest["runtime"]["version"], manifest["target"]
    forward = bool(target.get("version_compatible", False))
    here = str(library(runtime).__version__)
    if version_takes(version, here, version_compatible=forward):
        return None
    why = ", or a later one of its major version" if forward else ": engines are not portable across versions"
    return Obstacle(f"{runtime} {here}", f"{runtime} {version}{why}", "build it again here", target["name"])


def _other_gpu(manifest: Mapping[str, Any], gpu: Gpu) -> Obstacle | None:
    if gpu_takes(manifest, gpu.name, gpu.capability):
        return None
    wanted, tuned_on, own = manifest["compute_capabilities"], manifest["gpu"], manifest["target"]["name"]
    if gpu.capability in wanted:
        return Obstacle(gpu.name, f"a {tuned_on['name']}, which it was tuned on", "build it again here", own)
    if manifest["runtime"]["name"] == "tensorrt":
        limited = manifest["target"].get("compute_capabilities")
        better = "tensorrt" if limited and gpu.capability not in limited else own
    else:
        close = f"rtx-{gpu.capability.lower()}"
        better = close if close in list_targets() else "rtx-portable"
    return Obstacle(f"{gpu.name} ({gpu.capability})", f"a GPU of {', '.join(wanted)}", "build it for this GPU", better)


def refitted(trt: Any, engine: Any, graph: bytes, logger: Any, path: Path | None = None) -> bool:
    """Fill the weights of an ONNX file into an engine that was compiled without them; whether all went in.

    Args:
        path: the file, where it keeps weights in others beside it.
    """
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    return bool(parser.refit_from_bytes(graph, *_place(path)) and refitter.refit_cuda_engine())


def _place(path: Path | None) -> tuple[str, ...]:
    """The argument that tells a parser where the file lies, in whose folder it looks for weights."""
    return () if path is None else (str(path.absolute()),)


def _timing_file(trt: Any, target: Target) -> Path | None:
    gpu = local_gpu() if target.runtime == "tensorrt" else None
    return timing_file(target, str(trt.__version__), gpu.name) if gpu else None


def _network_flags(trt: Any) -> int:
    """Strongly typed: an option on 10.x, the only kind on 11.x and RTX."""
    if trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _parse(trt: Any, network: Any, graph: bytes, target: Target, path: Path | None) -> None:
    parser = trt.OnnxParser(network, _logger(trt))
    if parser.parse(graph, *_place(path)):
        return
    if ran_out_of_memory(_errors):
        raise _out_of_memory(trt, target, last_errors())
    problems = dict.fromkeys(refusal(parser.get_error(index), _errors) for index in range(parser.num_errors))
    raise BuildError(
        f"{label(trt)} does not accept the graph for {target.name!r}: {'; '.join(problems) or last_errors()}",
        expected="operators that TensorRT's ONNX parser supports",
        fix="replace that operator in the module, or take target cpu",
    )


def _add_profile(builder: Any, config: Any, network: Any, inputs: Sequence[TensorSpec], target: Target) -> None:
    dynamic = [spec for spec in inputs if spec.batched or spec.axes]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for spec in dynamic:
        profile.set_shape(
            spec.name,
            spec.concrete(target.batch.min, {name: extents.min for name, extents in target.axes.items()}),
            spec.concrete(target.batch.opt, {name: extents.opt for name, extents in target.axes.items()}),
            spec.concrete(target.batch.max, {name: extents.max for name, extents in target.axes.items()}),
        )
    if config.add_optimization_profile(profile) < 0:
        axes = "".join(f", {name} {extents.min} to {extents.max}" for name, extents in target.axes.items())
        raise BuildError(
            f"TensorRT refuses the batch range {target.batch.min} to {target.batch.max}{axes}: {last_errors()}",
            expected="ranges the network accepts",
            fix="change [batch] or [axes] of the target",
        )


def _float_types(network: Any) -> frozenset[str]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors += [layer.get_output(position) for position in range(layer.num_outputs)]
    names = {data_type_name(tensor.dtype) for tensor in tensors if tensor is not None}
    return frozenset(name for name in names if "float" in name)


@cache
def _logger(trt: Any) -> Any:
    levels = {"INTERNAL_ERROR": logging.DEBUG, "ERROR": logging.DEBUG, "WARNING": logging.WARNING}

    class ProcessLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            def act() -> None:
                if severity.name.endswith("ERROR"):
                    _errors.append(message)
                level = levels.get(severity.name, logging.DEBUG)
                log.log(level, "TensorRT: %s", readable([message]) if level == logging.WARNING else message.strip())

            _watching[0].safely(act)

    return ProcessLogger()
