"""A target: where an engine runs and the shapes, precision and options it is compiled with. Read from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ..artifact import digest_of
from ..config import Config, config_from, read_toml
from ..errors import ConfigError, nearest

ComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


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
    precision: Literal["fp32"] = Field(default="fp32", description="number format of weights and activations")
    tf32: bool = Field(
        default=False, description="let TensorRT round fp32 products to TF32; off, so that fp32 means fp32"
    )
    batch: Batch = Batch()
    threads: int = Field(default=1, ge=1, le=1024, description="threads within one operator; onnxruntime only")
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
        if self.tf32 and self.runtime == "onnxruntime":
            raise ValueError("tf32 only with a TensorRT runtime")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything that shapes an engine (all fields but the description)."""
        return digest_of(self.model_dump(mode="json", exclude={"description"}))

    @property
    def on_gpu(self) -> bool:
        """Whether engines of this target run on an NVIDIA GPU."""
        return self.runtime != "onnxruntime"


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
