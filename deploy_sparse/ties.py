"""Tied weights: one tensor of a state dict under several names, as when an output layer shares its embedding.

A file holds each tensor once, so the other names (aliases) are written beside it and tied again on reading.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def ties(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Canonical name by alias: names after the first one of the very same tensor (memory, shape, strides, type).

    Tensors that only overlap are not tied; nor are empty ones. Works on ``meta`` too.
    """
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        canonical = first.setdefault(_identity(tensor), name)
        if canonical != name:
            found[name] = canonical
    return found


def untied(state: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The state dict without its aliases: every tensor once, under its canonical name."""
    return {name: tensor for name, tensor in state.items() if name not in aliases}


def retied(state: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The state dict with every alias naming its canonical tensor again.

    Raises:
        KeyError: an alias of a tensor that is not there.
    """
    return {**state, **{alias: state[canonical] for alias, canonical in aliases.items()}}


def copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of own tensors, detached; names that were tied are tied again."""
    aliases = ties(state)
    own = {name: tensor.detach().clone() for name, tensor in untied(state, aliases).items()}
    return {name: own[aliases.get(name, name)] for name in state}


def tie_(module: torch.nn.Module, aliases: Mapping[str, str]) -> None:
    """Make every alias the very parameter or buffer that its canonical name is, so that training moves both as one.

    ``load_state_dict(…, assign=True)`` gives names of one tensor each a parameter of their own on the same memory.

    Raises:
        AttributeError: a name that the module does not have.
    """
    for alias, canonical in aliases.items():
        (owner, leaf), (source, origin) = (_owner(module, name) for name in (alias, canonical))
        setattr(owner, leaf, getattr(source, origin))


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()
    memory = storage._cdata if tensor.is_meta else tensor.data_ptr()  # on meta every address is 0
    return memory, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
