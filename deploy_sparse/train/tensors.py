"""Named tensors of a training: copies on the CPU, masks applied in place, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from ..structure import Masks

State = dict[str, torch.Tensor]


def cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def cpu_copies(tensors: Mapping[str, torch.Tensor]) -> State:
    """Contiguous copies on the CPU, by the same names."""
    return {name: cpu_copy(tensor) for name, tensor in tensors.items()}


def copy_state(model: nn.Module) -> State:
    """A copy of the state dict on the CPU: weights and BatchNorm statistics."""
    return cpu_copies(model.state_dict())


@torch.no_grad()
def mask_(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def digest(*states: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the states' names and bits, in hexadecimal; the order of the names plays no part."""
    found = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            found.update(name.encode())
            found.update(state[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
