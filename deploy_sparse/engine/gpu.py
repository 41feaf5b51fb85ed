"""The NVIDIA GPU of this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine; ``capability`` is for example ``"SM89"``."""

    name: str
    capability: str


def local_gpu() -> Gpu | None:
    """The first NVIDIA GPU of this machine, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), f"SM{major}{minor}")
