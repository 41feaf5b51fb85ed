"""The optimizer of a training, and what it remembers: tensors of each parameter, by name, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import TicketError
from ..structure import Masks
from .schedule import FitConfig
from .tensors import State, cpu_copy

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: BatchNorm and InstanceNorm
_SLOTS = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
_COUNTER = "step"  # one number a parameter; every other slot is shaped like its parameter


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """A fresh optimizer of the network's parameters, in one group or, with ``decay_norms=False``, in two."""
    groups: Any = model.parameters()
    if not config.decay_norms:
        bare = _norms_and_biases(model)
        groups = [
            {"params": [p for n, p in model.named_parameters() if n not in bare]},
            {"params": [p for n, p in model.named_parameters() if n in bare], "weight_decay": 0.0},
        ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )


def _norms_and_biases(model: nn.Module) -> set[str]:
    """Names of the parameters that normalisation layers own, and of all biases."""
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    for prefix, module in model.named_modules():
        if isinstance(module, _NORMS):
            names |= {name for name, _ in module.named_parameters(prefix, recurse=False)}
    return names


def memory_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Copies, on the CPU, of what the optimizer remembers, by ``"<slot>/<parameter>"``; empty before its first step.

    SGD has the slot ``momentum_buffer``, AdamW ``step``, ``exp_avg`` and ``exp_avg_sq``.
    """
    return {
        f"{slot}/{name}": cpu_copy(value)
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def masked_memory(memory: Mapping[str, torch.Tensor], masks: Masks) -> State:
    """``memory`` with zeros wherever a mask removes the entry it is about; counters stay."""
    found = dict(memory)
    for key, value in memory.items():
        slot, _, name = key.partition("/")
        if name in masks and slot != _COUNTER:
            found[key] = value * masks[name].cpu()
    return found


def set_memory_(model: nn.Module, optimizer: torch.optim.Optimizer, memory: Mapping[str, torch.Tensor]) -> None:
    """Make the optimizer remember ``memory``; parameters that are not in it keep what they have.

    Raises:
        TicketError: what another optimizer, or the optimizer of another network, remembered.
    """
    parameters, slots = dict(model.named_parameters()), _SLOTS[type(optimizer)]
    states: dict[str, State] = {}
    for key, value in memory.items():
        slot, _, name = key.partition("/")
        states.setdefault(name, {})[slot] = value
    for name, state in states.items():
        if name not in parameters or state.keys() != slots:
            raise TicketError(
                f"the optimizer's memory has {', '.join(sorted(state))} of {name!r}",
                expected=f"{', '.join(sorted(slots))} of this network's parameters: {type(optimizer).__name__}'s",
                fix="start with the optimizer and the network that left it, or without memory",
            )
        like = parameters[name]
        for slot, value in state.items():  # counters stay on the CPU, where torch keeps them
            own = value.clone() if slot == _COUNTER else torch.empty_like(like, requires_grad=False).copy_(value)
            optimizer.state[like][slot] = own
