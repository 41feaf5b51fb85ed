"""Where and in which arithmetic a training runs: device, threads, mixed precision, memory layout, processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..errors import ConfigError, MissingDependencyError
from .distributed import world

NEUTRAL = frozenset({"workers", "tensorboard"})
"""Keys of the runtime that no result depends on."""

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RuntimeConfig(Config):
    """What a training runs on."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(2, ge=1, description="CPU threads a process; the last digits of sums depend on it")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the forward pass in training; weights, optimizer and evaluation stay fp32"
    )
    channels_last: bool = Field(False, description="images and weights in NHWC order, faster on GPUs")
    compile: bool = Field(False, description="torch.compile the training step's network")
    deterministic: bool = Field(True, description="only kernels that give the same bits every time")
    sync_batchnorm: bool = Field(False, description="BatchNorm over the batch of all processes (GPUs)")
    workers: int = Field(0, ge=0, description="processes that read image files, for each training process")
    tensorboard: bool = Field(False, description="also write the metrics for TensorBoard into the run folder")


@dataclass(frozen=True)
class Runtime:
    """A runtime in force. Make one with :func:`start_runtime`."""

    config: RuntimeConfig
    device: torch.device

    def place_(self, model: nn.Module) -> nn.Module:
        """Move the network to the device, in place, in the configured memory layout."""
        if self.config.sync_batchnorm and world().size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        return model.to(self.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def forward(self, model: nn.Module) -> nn.Module:
        """What a training step calls: the placed network, wrapped to average gradients and compiled where asked."""
        wrapped = model
        if world().size > 1:
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")  # of 1-channel weights
            wrapped = DistributedDataParallel(model, [self.device.index] if self.device.type == "cuda" else None)
        return torch.compile(wrapped) if self.config.compile else wrapped  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass in training."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_LOW[self.config.precision])

    def scaler(self) -> torch.amp.GradScaler | None:
        """Keeps fp16 gradients from vanishing; None for other precisions."""
        return torch.amp.GradScaler(self.device.type) if self.config.precision == "fp16" else None

    def batches(
        self, source: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches on the device: images ``[n, C, H, W]``, labels ``[n]``; copies run beside the computation."""
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        for images, labels in source:
            if self.device.type == "cuda":
                images, labels = images.pin_memory(), labels.pin_memory()
            yield (
                images.to(self.device, non_blocking=True, memory_format=layout),
                labels.to(self.device, non_blocking=True),
            )


CPU = Runtime(RuntimeConfig.model_validate({"device": "cpu"}), torch.device("cpu"))


def check_runtime(config: RuntimeConfig) -> None:
    """Refuse what this machine cannot do, before anything is trained.

    Raises:
        ConfigError: no such device here, or a precision or option that the device does not have.
        MissingDependencyError: TensorBoard is asked for and not installed.
    """
    device = _device_type(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'runtime.device = "cuda" without a usable GPU',
            expected="a GPU that this torch can use",
            fix='see deploy-sparse doctor, or choose --runtime.device "auto" or "cpu"',
        )
    if device == "cuda" and (place := world().local_rank) >= (found := torch.cuda.device_count()):
        raise ConfigError(
            f"process {place + 1} of this machine has no GPU of its own, there are {found}",
            expected="at most one process a GPU",
            fix=f"torchrun --nproc-per-node {found}, or --runtime.device cpu",
        )
    if device == "cpu" and config.precision == "fp16":
        raise ConfigError(
            'runtime.precision = "fp16" on the CPU',
            expected='"fp32" or "bf16" there; fp16 trains on GPUs only',
            fix="choose --runtime.precision bf16",
        )
    if device == "cpu" and config.sync_batchnorm:
        raise ConfigError(
            "runtime.sync_batchnorm on the CPU",
            expected="GPUs: torch has it for them only",
            fix="leave --runtime.sync_batchnorm out",
        )
    if config.tensorboard and find_spec("tensorboard") is None:
        raise MissingDependencyError(
            "runtime.tensorboard without the package tensorboard",
            expected="an installation with it",
            fix="pip install 'deploy-sparse[tensorboard]', or leave --runtime.tensorboard out",
        )


def start_runtime(config: RuntimeConfig) -> Runtime:
    """Put a runtime in force for this process: threads, determinism, the process's GPU.

    Raises:
        ConfigError, MissingDependencyError: see :func:`check_runtime`.
    """
    check_runtime(config)
    torch.set_num_threads(config.threads)
    if config.compile:  # the compiler must know too; importing it takes seconds
        torch.use_deterministic_algorithms(config.deterministic)
    else:
        torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    torch.backends.cudnn.benchmark = not config.deterministic
    if _device_type(config) == "cpu":
        return Runtime(config, torch.device("cpu"))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in a fixed order only with this
    device = torch.device("cuda", world().local_rank)
    torch.cuda.set_device(device)
    return Runtime(config, device)


def explained(problem: RuntimeError) -> ConfigError | None:
    """What a user can do about an error of torch in a training step; None where nothing is known."""
    text = str(problem).splitlines()[0] if str(problem) else ""
    if isinstance(problem, torch.OutOfMemoryError):
        return ConfigError(
            f"the GPU ran out of memory ({text})",
            expected="a training step that fits",
            fix="a smaller --fit.batch_size, --runtime.precision bf16, or more processes",
        )
    if "deterministic implementation" in text:
        return ConfigError(
            f"the network uses an operation that has no reproducible form on this device ({text})",
            expected="operations that give the same bits every time, while runtime.deterministic = true",
            fix="--runtime.deterministic false, which gives up exact resume",
        )
    return None


def _device_type(config: RuntimeConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
