"""A target's keys as TensorRT's builder settings. Takes the library as an argument, and imports none."""

from __future__ import annotations

from typing import Any

from ...errors import BuildError
from ..target import Target

_COMPATIBILITY = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
_REFIT = {"identical": "REFIT_IDENTICAL", "any": "REFIT"}


def builder_config(trt: Any, builder: Any, target: Target) -> Any:
    """A builder configuration with everything that the target says, but its shapes.

    Raises:
        BuildError: this version of the library lacks something that the target asks for.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.avg_timing_iterations = 8  # the API's default of 1 picks noisier kernels
    config.builder_optimization_level = target.builder_level
    if not target.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    if target.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace_mib << 20)
    if target.aux_streams is not None:
        config.max_aux_streams = target.aux_streams
    for flag in _flags(target):
        config.set_flag(_member(trt, "BuilderFlag", flag))
    if target.hardware_compatibility != "none":
        level = _COMPATIBILITY[target.hardware_compatibility]
        config.hardware_compatibility_level = _member(trt, "HardwareCompatibilityLevel", level)
    if hasattr(config, "num_compute_capabilities"):  # RTX; zero means its portable set
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, name in enumerate(target.compute_capabilities):
            config.set_compute_capability(_member(trt, "ComputeCapability", name), index)
    return config


def label(trt: Any) -> str:
    """The library's name and version, for people."""
    return f"{'TensorRT-RTX' if trt.__name__.endswith('rtx') else 'TensorRT'} {trt.__version__}"


def _flags(target: Target) -> list[str]:
    """Names of the builder flags that are off by default and that the target turns on."""
    asked = {
        "SPARSE_WEIGHTS": target.sparse_weights,
        "VERSION_COMPATIBLE": target.version_compatible,  # puts the lean runtime into the engine
        _REFIT.get(target.refit, ""): target.refit != "none",
        "STRIP_PLAN": target.strip,
    }
    return [flag for flag, on in asked.items() if on]


def _member(trt: Any, kind: str, name: str) -> Any:
    """A member of one of the library's enumerations.

    Raises:
        BuildError: this version does not have it.
    """
    members = getattr(trt, kind).__members__ if hasattr(trt, kind) else {}
    if name in members:
        return members[name]
    what = "compute capability" if kind == "ComputeCapability" else kind
    package = "tensorrt-rtx" if trt.__name__.endswith("rtx") else "tensorrt"
    raise BuildError(
        f"{label(trt)} does not know {what} {name}",
        expected=f"one of {', '.join(members)}" if members else "a newer version",
        fix=f"install a newer {package}, or take another target",
    )
