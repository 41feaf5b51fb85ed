"""A target: where an engine runs and the shapes, precision and options it is compiled with. Read from TOML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from ..artifact import digest_of
from ..config import Config, config_from, not_together, read_toml
from ..errors import ConfigError, nearest

ComputeCapability = Literal["SM75", "SM80", "SM86", "SM87", "SM89", "SM90", "SM100", "SM103", "SM110", "SM120", "SM121"]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "torch-tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
_RTX_TAKES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
_WITHOUT_FP8 = ("SM75", "SM80", "SM86", "SM87")
_WITHOUT_BF16 = ("SM75",)
_TRT: frozenset[Runtime] = frozenset({"tensorrt"})
_FULL: frozenset[Runtime] = frozenset({"tensorrt", "torch-tensorrt"})
_COMPILED: frozenset[Runtime] = frozenset({"tensorrt", "tensorrt-rtx", "torch-tensorrt"})
_TORCH: frozenset[Runtime] = frozenset({"torch"})

RUNTIMES_OF: Mapping[str, frozenset[Runtime]] = {
    "precision": frozenset(get_args(Runtime)),
    "exclude": frozenset({"onnxruntime", "tensorrt", "tensorrt-rtx"}),
    "axes": frozenset({"onnxruntime", "tensorrt", "tensorrt-rtx"}),
    "threads": frozenset({"onnxruntime", "torch"}),
    "device": _TORCH,
    "cuda_graph": _TORCH,
    "block_kernel": _TORCH,
    "tf32": _COMPILED | _TORCH,
    "compute_capabilities": _COMPILED,
    "builder_level": _COMPILED,
    "workspace_mib": _COMPILED,
    "aux_streams": _COMPILED,
    "sparse_weights": _COMPILED,
    "timing_cache": _FULL,
    "version_compatible": _FULL,
    "hardware_compatibility": _FULL,
    "refit": _FULL,
    "strip": _TRT,
}
"""The runtimes that take a key; keys that are not here go with all of them."""

_OF_TORCH = frozenset({"device", "cuda_graph", "block_kernel"})  # left out of the digests of other runtimes
_LATER = frozenset({  # left out of a digest while they have their defaults: engines from before they existed stay
    "axes", "exclude", "aux_streams", "sparse_weights", "timing_cache", "version_compatible", "hardware_compatibility",
    "refit", "strip",
})  # fmt: skip


class Batch(Config):
    """Batch sizes an engine accepts, and the one it is tuned for: ``1 <= min <= opt <= max``."""

    min: int = Field(default=1, ge=1, description="smallest batch the engine accepts")
    opt: int = Field(default=1, ge=1, description="batch the compiler tunes for")
    max: int = Field(default=64, ge=1, description="largest batch the engine accepts")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError("min <= opt <= max")
        return self


class Extents(Config):
    """Extents of one dynamic axis, and the one it is tuned for: ``1 <= min <= opt <= max``."""

    min: int = Field(ge=1, description="smallest extent the engine accepts")
    opt: int = Field(ge=1, description="extent the compiler tunes for")
    max: int = Field(ge=1, description="largest extent the engine accepts")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError("min <= opt <= max")
        return self


class Target(Config):
    """One deployment target. Frozen; ``digest`` names its content and is part of every engine's key."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="a plain name, part of folder names")
    runtime: Runtime = Field(description="what compiles and runs the engine")
    precision: Precision = Field(
        default="fp32", description="number format of weights and activations; int8 and fp8 need calibration data"
    )
    exclude: tuple[str, ...] = Field(
        (), description="layers that stay in fp32 in a lower precision: nodes of the graph or modules, with * and ?"
    )
    tf32: bool = Field(
        default=False, description="let the GPU round fp32 products to TF32; off, so that fp32 means fp32"
    )
    batch: Batch = Batch()
    axes: dict[str, Extents] = Field(
        default_factory=dict, description="other dynamic axes of an ONNX file, by their names in it, such as height"
    )
    threads: int = Field(default=1, ge=1, le=1024, description="threads within one operator; on the CPU only")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where PyTorch runs the engine; torch only")
    cuda_graph: bool = Field(
        default=False, description="replay timed runs as one CUDA graph, without the cost of launches; torch on cuda"
    )
    block_kernel: Literal["timed", "always", "never"] = Field(
        default="timed",
        description="where blocks of channels run in the Triton kernel; timed: where it is faster here; torch on cuda",
    )
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        (),
        description="GPU generations compiled for; empty: with tensorrt-rtx the library's portable set, with "
        "tensorrt the GPU of the building machine whatever it is",
    )
    builder_level: int = Field(default=3, ge=0, le=5, description="TensorRT's optimisation level")
    workspace_mib: int | None = Field(
        default=None, ge=1, description="scratch memory the compiler may plan with, in MiB; all of it by default"
    )
    aux_streams: int | None = Field(
        default=None, ge=0, le=64, description="streams beside the main one; 0: none; the library's choice by default"
    )
    sparse_weights: bool = Field(
        default=False, description="let the compiler take kernels for 2:4 sparse weights where weights are and they win"
    )
    timing_cache: bool = Field(
        default=True, description="keep kernel timings of this GPU in the user's cache, and take them in later builds"
    )
    version_compatible: bool = Field(
        default=False,
        description="run in later versions of TensorRT too; the engine then holds host code, which loading must allow",
    )
    hardware_compatibility: Literal["none", "same-capability", "ampere-plus"] = Field(
        default="none", description="run on other models of GPU too; both kinds can be slower"
    )
    refit: Literal["none", "identical", "any"] = Field(
        default="none", description="weights that can be filled in later: the same ones, or any"
    )
    strip: bool = Field(
        default=False, description="an engine without weights, which loading fills in from its ONNX graph; needs refit"
    )
    width_multiple: int = Field(default=4, ge=1, description="channel counts in multiples of this suit the target")
    description: str = Field(default="", description="one line for people; not part of the digest")

    @model_validator(mode="after")
    def _options_fit_runtime(self) -> Self:
        for key in sorted(RUNTIMES_OF.keys() - {"precision", "tf32"} - self._defaults()):
            if self.runtime not in RUNTIMES_OF[key]:
                *others, last = sorted(RUNTIMES_OF[key])
                runtimes = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"{key} only with runtime {runtimes}, not {self.runtime}")
        if self.runtime == "tensorrt-rtx" and (other := sorted({*self.compute_capabilities} - {*_RTX_TAKES})):
            raise ValueError(f"one of {', '.join(_RTX_TAKES)}: tensorrt-rtx does not compile for {', '.join(other)}")
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise ValueError("every compute capability once")
        if self.strip and self.refit == "none":
            raise ValueError("strip with refit = 'identical' or 'any': its weights must come from somewhere")
        torch = self.from_module
        if self.tf32 and not self.on_gpu:
            raise ValueError("tf32 only with a TensorRT runtime, or with torch on cuda")
        if torch and self.precision in ("int8", "fp8"):
            raise ValueError(
                f"precision {self.precision!r} not with runtime {self.runtime}, which takes fp32, fp16 and bf16"
            )
        if self.runtime == "onnxruntime" and self.precision == "fp8":
            raise ValueError(
                "precision 'fp8' only with a TensorRT runtime: ONNX Runtime has no kernels for it on the CPU"
            )
        if self.tf32 and self.precision in ("fp16", "bf16"):
            raise ValueError(f"tf32 is a way to compute fp32, not {self.precision}")
        without = {"fp8": _WITHOUT_FP8, "bf16": _WITHOUT_BF16}.get(self.precision, ())
        if older := [name for name in self.compute_capabilities if name in without]:
            raise ValueError(f"precision {self.precision!r} only on later GPUs than {', '.join(older)}")
        if self.exclude and self.precision == "fp32":
            raise ValueError("exclude only with a precision below fp32: everything is in fp32 already")
        if not all(self.exclude) or len(set(self.exclude)) != len(self.exclude):
            raise ValueError("exclude has every pattern once, and none that is empty")
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("cuda_graph only with device cuda")
        return self

    def _defaults(self) -> set[str]:
        """Names of the fields that have their default value."""
        fields = type(self).model_fields.items()
        return {name for name, field in fields if getattr(self, name) == field.get_default(call_default_factory=True)}

    @property
    def digest(self) -> str:
        """SHA-256 of everything that shapes an engine: all fields but the description and those of other runtimes."""
        others = (set() if self.runtime == "torch" else _OF_TORCH) | (_LATER & self._defaults())
        shaping = self.model_dump(mode="json", exclude={"description", *others})
        if "exclude" in shaping:
            shaping["exclude"] = sorted(shaping["exclude"])  # the same layers in any order
        return digest_of(shaping)

    @property
    def from_module(self) -> bool:
        """Whether engines of this target are programs made from a module, and hold no ONNX graph."""
        return self.runtime in ("torch", "torch-tensorrt")

    @property
    def on_gpu(self) -> bool:
        """Whether engines of this target run on an NVIDIA GPU."""
        return self.device == "cuda" if self.runtime == "torch" else self.runtime != "onnxruntime"


def list_targets() -> tuple[str, ...]:
    """Names of the shipped targets, sorted."""
    return tuple(sorted(path.stem for path in targets_folder().glob("*.toml")))


def load_target(name_or_path: str | Path | Target) -> Target:
    """The target with this name, or described by this TOML file; a :class:`Target` is returned as it is.

    A file without a ``name`` key is named after itself. A file with ``inherits`` starts from the values of that
    target: a shipped name, or the path of a TOML file, relative to its own folder; ``name`` and ``description`` are
    not inherited.

    Raises:
        ConfigError: no such name or file, an unknown key, or a value out of range.
    """
    if isinstance(name_or_path, Target):
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(
            f"the target is of type {type(name_or_path).__name__}",
            expected="the name of a target, the path of a TOML file, or a Target",
            fix=f"choose one of {', '.join(list_targets())}",
        )
    return _read(_target_file(name_or_path), ())


class _TargetFile(Target):
    """What a TOML file may hold: a target, and where it starts from."""

    inherits: str | None = None


def in_precision(target: Target, precision: str | None, exclude: str | Sequence[str] = ()) -> Target:
    """The target in another precision, called ``<name>-<precision>``; itself where nothing changes.

    Args:
        precision: None for the target's own.
        exclude: patterns, or one, besides the target's own.

    Raises:
        ConfigError: a precision that there is not, or that does not go with the target.
    """
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    wanted = target.precision if precision is None else precision
    own = () if wanted == "fp32" else target.exclude
    patterns = list(dict.fromkeys([*own, *exclude]))
    if wanted == target.precision and patterns == [*target.exclude]:
        return target
    name = target.name if wanted == target.precision else f"{target.name}-{wanted}"
    change = {"name": name, "precision": wanted, "exclude": patterns}
    given = f"precision {wanted!r}" + (f" and exclude {patterns}" if patterns else "")
    return _changed(target, change, given)


def in_runtime(target: Target, runtime: str | None) -> Target:
    """The target with another runtime, called ``<name>-<runtime>``; itself where nothing changes.

    Raises:
        ConfigError: a runtime that there is not, or that does not take a key of the target.
    """
    if runtime is None or runtime == target.runtime:
        return target
    return _changed(target, {"name": f"{target.name}-{runtime}", "runtime": runtime}, f"runtime {runtime!r}")


def _changed(target: Target, change: dict[str, Any], given: str) -> Target:
    source = f"target {target.name}"
    try:
        return config_from(Target, target.model_dump(mode="json"), change, source=source)
    except ConfigError as problem:
        if problem.given != not_together(source):
            raise
        raise ConfigError(
            f"{given} with target {target.name}", expected=problem.expected, fix="change that, or take another target"
        ) from None


def _target_file(name_or_path: str | Path, beside: Path | None = None) -> Path:
    """The TOML file of a target; a relative path is below ``beside`` where that is given."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) >= 2:
        return path if beside is None else beside / path
    names = list_targets()
    if str(name_or_path) not in names:
        raise ConfigError(
            f"unknown target {str(name_or_path)!r}",
            expected=f"one of {', '.join(names)}, or the path of a TOML file",
            fix=f"{nearest(str(name_or_path), names)}choose one, or write your own after engines/targets/cpu.toml",
        )
    return targets_folder() / f"{name_or_path}.toml"


def _read(path: Path, heirs: tuple[Path, ...]) -> Target:
    """The target in a file, on top of what it inherits; ``heirs`` are the files that inherit from this one."""
    if path.resolve() in heirs:
        raise ConfigError(
            f"{path} inherits from itself", expected="targets without a circle", fix=f"drop inherits in {path}"
        )
    values = read_toml(path)
    base: dict[str, Any] = {}
    if isinstance(parent := values.get("inherits"), str):  # another type is refused below
        try:
            found = _read(_target_file(parent, path.parent), (*heirs, path.resolve()))
        except ConfigError as problem:
            given = f"{path} inherits {parent!r}: {problem.given}"
            raise ConfigError(given, expected=problem.expected, fix=problem.fix) from None
        base = found.model_dump(mode="json", exclude={"name", "description"})
    try:
        mine = config_from(_TargetFile, {"name": path.stem}, base, values, source=str(path))
    except ConfigError as problem:  # whose advice is an option on the command line, and targets have none
        hint, question, _ = problem.fix.rpartition("? ")  # "did you mean 'threads'? "
        fix = f"{hint}{question}mend it in {path}"
        raise ConfigError(problem.given, expected=problem.expected, fix=fix) from None
    return Target(**mine.model_dump(exclude={"inherits"}))


def targets_folder() -> Path:
    """``engines/targets`` of a checkout, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "engines" / "targets").is_dir():
        return checkout / "engines" / "targets"
    return package / "_targets"
