"""A target: where an engine runs and the shapes, precision and options it is compiled with. Read from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ..artifact import digest_of
from ..config import Config, config_from, read_toml
from ..errors import ConfigError, nearest

ComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]
_OF_TORCH = frozenset({"device", "cuda_graph", "block_kernel"})  # fields of no other runtime, left out of its digest


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


class Target(Config):
    """One deployment target. Frozen; ``digest`` names its content and is part of every engine's key."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="a plain name, part of folder names")
    runtime: Runtime = Field(description="what compiles and runs the engine")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="number format of weights and activations; others than fp32 with torch only"
    )
    tf32: bool = Field(
        default=False, description="let the GPU round fp32 products to TF32; off, so that fp32 means fp32"
    )
    batch: Batch = Batch()
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
        description="GPU generations compiled for ahead of time; empty: the library's portable set; tensorrt-rtx only",
    )
    builder_level: int = Field(default=3, ge=0, le=5, description="TensorRT's optimisation level")
    workspace_mib: int | None = Field(
        default=None, ge=1, description="scratch memory the compiler may plan with, in MiB"
    )
    width_multiple: int = Field(default=4, ge=1, description="channel counts in multiples of this suit the target")
    description: str = Field(default="", description="one line for people; not part of the digest")

    @model_validator(mode="after")
    def _options_fit_runtime(self) -> Self:
        if self.compute_capabilities and self.runtime != "tensorrt-rtx":
            raise ValueError(f"compute_capabilities only with runtime tensorrt-rtx, not {self.runtime}")
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise ValueError("every compute capability once")
        torch = self.runtime == "torch"
        if self.tf32 and not self.on_gpu:
            raise ValueError("tf32 only with a TensorRT runtime, or with torch on cuda")
        if self.precision != "fp32" and not torch:
            raise ValueError(f"precision {self.precision!r} only with runtime torch, {self.runtime} builds 'fp32'")
        if self.tf32 and self.precision != "fp32":
            raise ValueError(f"tf32 is a way to compute fp32, not {self.precision}")
        if not torch and (given := sorted(_OF_TORCH - self._defaults())):
            raise ValueError(f"{', '.join(given)} only with runtime torch, not {self.runtime}")
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("cuda_graph only with device cuda")
        return self

    def _defaults(self) -> set[str]:
        """Names of the fields that have their default value."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) == field.default}

    @property
    def digest(self) -> str:
        """SHA-256 of everything that shapes an engine: all fields but the description and those of other runtimes."""
        others = set() if self.runtime == "torch" else _OF_TORCH
        return digest_of(self.model_dump(mode="json", exclude={"description", *others}))

    @property
    def on_gpu(self) -> bool:
        """Whether engines of this target run on an NVIDIA GPU."""
        return self.device == "cuda" if self.runtime == "torch" else self.runtime != "onnxruntime"


def list_targets() -> tuple[str, ...]:
    """Names of the shipped targets, sorted."""
    return tuple(sorted(path.stem for path in targets_folder().glob("*.toml")))


def load_target(name_or_path: str | Path | Target) -> Target:
    """The target with this name, or described by this TOML file; a :class:`Target` is returned as it is.

    A file without a ``name`` key is named after itself.

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
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) < 2:
        names = list_targets()
        if str(name_or_path) not in names:
            raise ConfigError(
                f"unknown target {str(name_or_path)!r}",
                expected=f"one of {', '.join(names)}, or the path of a TOML file",
                fix=f"{nearest(str(name_or_path), names)}choose one, or write your own after engines/targets/cpu.toml",
            )
        path = targets_folder() / f"{name_or_path}.toml"
    values = read_toml(path)
    try:
        return config_from(Target, {"name": path.stem}, values, source=str(path))
    except ConfigError as problem:  # whose advice is an option on the command line, and targets have none
        hint, question, _ = problem.fix.rpartition("? ")  # "did you mean 'threads'? "
        fix = f"{hint}{question}mend it in {path}"
        raise ConfigError(problem.given, expected=problem.expected, fix=fix) from None


def targets_folder() -> Path:
    """``engines/targets`` of a checkout, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "engines" / "targets").is_dir():
        return checkout / "engines" / "targets"
    return package / "_targets"
