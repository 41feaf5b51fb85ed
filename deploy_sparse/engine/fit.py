"""Which library versions and GPUs take an engine: decided from its manifest, before the engine is touched."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ..errors import MissingDependencyError


@dataclass(frozen=True)
class Obstacle:
    """Why an engine cannot run here, and what to do: ``fix``, for which ``target`` (None: not by a build)."""

    reason: str
    expected: str
    fix: str
    target: str | None


def obstacle(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the engine with this manifest cannot run on this machine, or None; for every runtime."""
    runtime = manifest["runtime"]["name"]
    if runtime == "onnxruntime":
        return None
    if runtime == "torch-tensorrt":
        from .torch_trt import bindings as torch_trt_bindings

        return torch_trt_bindings.obstacle(manifest)
    from .trt import bindings as trt_bindings

    if runtime != "torch":
        return trt_bindings.obstacle(manifest)
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        built = f"PyTorch {manifest['runtime']['version']} or newer"
        return Obstacle("PyTorch is not installed", built, "install it: pip install torch", None)
    if (found := _older_torch(manifest)) is not None:
        return found
    if manifest["target"]["device"] == "cuda" and trt_bindings.local_gpu() is None:
        fix = "load it on a machine with one, or build for the CPU"
        return Obstacle("no NVIDIA GPU", "an NVIDIA GPU and its driver", fix, "torch-cpu")
    return None


def version_obstacle(manifest: Mapping[str, Any]) -> Obstacle | None:
    """Why the library installed here does not take the engine on any GPU; None where it does or is not installed."""
    runtime = manifest["runtime"]["name"]
    if runtime == "onnxruntime":
        return None
    if runtime == "torch":
        return _older_torch(manifest)
    if runtime == "torch-tensorrt":
        from .torch_trt import bindings as torch_trt_bindings

        return torch_trt_bindings.version_obstacle(manifest)
    from .trt import bindings as trt_bindings

    try:
        return trt_bindings.other_version(manifest)
    except MissingDependencyError:
        return None


def version_takes(built: str, here: str, *, version_compatible: bool) -> bool:
    """Whether TensorRT ``here`` loads an engine built by ``built``.

    The very same version does. With ``version_compatible`` later ones of the same major version do too, and those of
    11 for engines of 10 ("Engine compatibility" of TensorRT's documentation).
    """
    if built == here:
        return True
    old, new = release(built), release(here)
    same_line = old[:1] == new[:1] or (old[:1], new[:1]) == ((10,), (11,))
    return version_compatible and same_line and new >= old


def gpu_takes(manifest: Mapping[str, Any], name: str, capability: str) -> bool:
    """Whether an engine of a TensorRT flavour was compiled for this GPU.

    TensorRT-RTX compiles for generations, and an empty list is its portable set. Full TensorRT compiles for one model
    of GPU, unless ``hardware_compatibility`` says otherwise.
    """
    compatibility = manifest["target"].get("hardware_compatibility", "none")
    if compatibility == "ampere-plus":
        return int(capability.removeprefix("SM")) >= 80
    if manifest["compute_capabilities"] and capability not in manifest["compute_capabilities"]:
        return False
    tuned_on = manifest["gpu"]
    return compatibility == "same-capability" or not tuned_on or tuned_on["name"] == name


def gpus(manifest: Mapping[str, Any]) -> str:
    """What the engine runs on, in words."""
    target, capabilities = manifest["target"], ", ".join(manifest["compute_capabilities"])
    if manifest["runtime"]["name"] in ("onnxruntime", "torch"):
        return "any NVIDIA GPU" if target.get("device") == "cuda" else "any CPU"
    compatibility = target.get("hardware_compatibility", "none")
    if compatibility == "ampere-plus":
        return "SM80 and newer"
    if manifest["gpu"] and compatibility == "none":
        return f"{manifest['gpu']['name']} ({capabilities})"
    return capabilities or "portable set"


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.14.1+cpu"`` is ``(2, 14, 1)``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _older_torch(manifest: Mapping[str, Any]) -> Obstacle | None:
    built = str(manifest["runtime"]["version"])
    try:
        here = metadata.version("torch")  # asked without importing it
    except metadata.PackageNotFoundError:
        return None
    if release(here)[:2] >= release(built)[:2]:
        return None
    fix = "install a newer PyTorch, or build it again here"
    return Obstacle(f"torch {here}", f"torch {built} or newer", fix, manifest["target"]["name"])
