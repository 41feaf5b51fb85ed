"""The tensors in what a network returns, whatever holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

_DEPTH = 8


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in lists, tuples, dictionaries, dataclasses and objects with attributes, in their order."""
    return list(_found(outputs, _DEPTH))


def _found(value: Any, depth: int) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and (parts := _parts(leaf)):
            for part in parts:
                yield from _found(part, depth - 1)


def _parts(leaf: Any) -> list[Any]:
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    if isinstance(leaf, torch.nn.Module | type):
        return []
    return list(getattr(leaf, "__dict__", {}).values())
