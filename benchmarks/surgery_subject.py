"""The networks of surgery.py, with weights that hide no error: no bias, scale or statistic rests at its first value."""

from __future__ import annotations

import re
import resource
import signal
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import MissingDependencyError

BATCH = 2
SEED = 20221104
CENTRED, NOISE = 0.1, 16
CPU_LIMIT_S, MEMORY_LIMIT_GIB = 120, 12
RUNS = 3  # of what is timed: the first touches memory that a virtual machine may not have got yet
LIST = Path(__file__).with_name("surgery_models.toml")

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """One network of the list: ``torchvision/<name>`` or ``timm/<name>``; see surgery_models.toml for the rest."""

    name: str
    family: str
    image: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    @property
    def collection(self) -> str:
        """``"torchvision"`` or ``"timm"``."""
        return self.name.partition("/")[0]


def subjects() -> dict[str, Subject]:
    """The list, by name, in its order."""
    found = {}
    for collection, entries in tomllib.loads(LIST.read_text()).items():
        for entry in entries:
            names = [f"{collection}/{name}" for name in entry.pop("names")]
            found.update({name: Subject(name, **entry) for name in names})
    return found


def build(subject: Subject, *, exportable: bool = False) -> tuple[nn.Module, Inputs]:
    """The network in evaluation mode and a batch of noise for it; the same numbers every time.

    Args:
        exportable: timm's own switch of that name, for export: attention as separate products, which ONNX has at any
            number of axes. Makes no difference to torchvision's.

    Raises:
        MissingDependencyError: a timm network, and timm is not installed.
    """
    torch.manual_seed(SEED)
    if subject.collection == "timm":
        name = subject.name.removeprefix("timm/")
        model = _timm().create_model(name, pretrained=False, exportable=exportable, **subject.arguments)
    else:
        model = zoo.build(subject.name, **subject.arguments)
    generator = torch.Generator().manual_seed(SEED)
    inputs = (torch.randn(BATCH, 3, subject.image, subject.image, generator=generator),)
    enliven_(model, inputs, generator)
    return model, inputs


def _timm() -> Any:
    try:
        import timm
    except ImportError as problem:
        raise MissingDependencyError(
            f"timm is not installed ({problem})", expected="timm for timm's networks", fix="pip install timm"
        ) from problem
    return timm


@torch.no_grad()
def enliven_(model: nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
    """Make every resting parameter and all statistics of BatchNorm non-trivial; evaluation mode after.

    Parameters that initialisation leaves (nearly) constant would hide errors: BatchNorm's scale of 1 and shift of 0,
    zero biases, position embeddings and residual gates, layer scales of 1e-6. Zeros become normal noise of 0.1 (0.2
    where there is one number only), layer scales uniform in [0.1, 0.3], other constants c uniform in [c / 2, 3 c / 2].

    What a convolution or Linear layer makes of noise gets a root mean square of 1 at most, and BatchNorm takes off
    ``CENTRED`` of its channels' means and divides by the root mean square of the rest, over all channels, times its own
    random number for each. Without the first, initialisation saturates gates; real statistics of noise would, in every
    layer of an untrained network, blow up the channels and differences that happen to be small. Either blows up the
    rounding of float32 too: deep networks would differ from themselves in float64.
    """
    for parameter in model.eval().parameters():
        constant = float(parameter.float().mean())
        if parameter.numel() > 1 and float(parameter.float().std()) > 1e-4:
            continue
        noise = torch.rand(parameter.shape, generator=generator)  # uniform in [0, 1)
        if abs(constant) > 0.01:
            new = constant * (0.5 + noise)
        elif abs(constant) > 1e-7:
            new = 0.1 + 0.2 * noise
        elif parameter.numel() == 1:
            new = torch.full_like(parameter, 0.2)
        else:
            new = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(new)
    hooks, samples = [], BATCH
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            samples = NOISE
            hooks.append(part.register_forward_pre_hook(partial(_set_statistics, generator=generator)))
        elif isinstance(part, nn.modules.conv._ConvNd | nn.Linear):
            hooks.append(part.register_forward_pre_hook(_quieten))
    model(torch.randn(samples, *inputs[0].shape[1:], generator=generator))
    for hook in hooks:
        hook.remove()


def _quieten(layer: nn.Module, inputs: Inputs) -> None:
    """Scale a layer's weight so that its output has a root mean square of at most 1; see :func:`enliven_`."""
    layer.weight.div_(layer.forward(*inputs).square().mean().sqrt().clamp(min=1.0))


def _set_statistics(norm: nn.Module, inputs: Inputs, *, generator: torch.Generator) -> None:
    """Set a BatchNorm's statistics from its input ``[N, C, *]``; see :func:`enliven_`."""
    axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
    mean = CENTRED * inputs[0].mean(axes)  # [C]
    left = inputs[0].transpose(1, -1) - mean
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(left.square().mean() * (1 + 2 * torch.rand(mean.shape, generator=generator)))


@contextmanager
def limited(cpu_s: float = CPU_LIMIT_S, memory_gib: float = MEMORY_LIMIT_GIB) -> Iterator[None]:
    """Stop what runs inside at so many CPU seconds (TimeoutError) or GiB of data (MemoryError, or torch's own)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if soft < 0 else min(soft, wanted), hard))
    before = signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _out_of_time(*_: object) -> None:
    raise TimeoutError("out of CPU time")


def on_one_line(text: str) -> str:
    """A message for a record: on one line, at most 400 characters, files without their folders."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", " ".join(text.split()))[:400]


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def warm_up_network() -> tuple[nn.Module, Inputs]:
    """A small network to run everything on once, so that imports and one-time set-up are in nobody's time."""
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 10)]
    return nn.Sequential(*layers, *head).eval(), (torch.randn(BATCH, 3, 16, 16),)
