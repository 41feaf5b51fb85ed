"""Copies of a module with other tensors in the places of its own, without ever copying the weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Replace = Callable[[str, torch.Tensor], torch.Tensor]
_PLAIN = frozenset({int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type})
_CONTAINERS = frozenset({set, list, dict, OrderedDict})
_NO_TENSORS = _PLAIN | _CONTAINERS
_ENTRIES = (type(None), nn.Module, torch.Tensor)
_COPYING = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__new__")


def with_tensors(
    module: nn.Module, replace: Replace, plain: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> nn.Module:
    """A copy of ``module`` whose parameter or buffer ``name`` is ``replace(name, tensor)``.

    Tied tensors stay tied, frozen parameters frozen, hooks and plain attributes are copied. A tensor that is neither
    parameter nor buffer becomes ``plain(tensor)``.
    """
    memo: dict[int, Any] = {}
    named = parts_of(module)
    parts = [part for _, part in named]
    for name, tensor in state_of(named):
        if id(tensor) in memo:
            continue
        made = replace(name, tensor.detach())
        memo[id(tensor)] = (
            nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        )
    for tensor in _plain_tensors(parts):
        memo.setdefault(id(tensor), plain(tensor.detach()))  # a tensor with history cannot be copied otherwise
    if all(map(_copied_plainly, {type(part) for part in parts})):
        _copy_parts(parts, memo)  # much faster than what follows
    copied = copy.deepcopy(module, memo)
    assert isinstance(copied, nn.Module)
    return copied


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What :meth:`torch.nn.Module.named_modules` gives, read from the modules themselves."""
    found: dict[int, tuple[str, nn.Module]] = {}
    _enter("", module, found)  # no closure, which would hold on to the modules
    return list(found.values())


def _enter(path: str, part: nn.Module, found: dict[int, tuple[str, nn.Module]]) -> None:
    found[id(part)] = path, part
    for name, child in part._modules.items():
        if child is not None and id(child) not in found:
            _enter(f"{path}.{name}" if path else name, child, found)


def state_of(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, then all buffers, of ``named`` modules; tied ones under each of their names."""
    for kind in ("_parameters", "_buffers"):
        for path, part in named:
            for name, tensor in getattr(part, kind).items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, detached; what the module's class says of them does not matter."""
    return {name: tensor.detach() for name, tensor in state_of(parts_of(module))}


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's shape, strides and type without memory."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")  # empty_like is slow


def _copied_plainly(kind: type) -> bool:
    """Whether a copy of its attributes is a copy of the module: it does not say otherwise."""
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPYING)


def _copy_parts(parts: list[nn.Module], memo: dict[int, Any]) -> None:
    """Enter a copy of every module into ``memo``."""
    for part in parts:
        memo[id(part)] = type(part).__new__(type(part))
    for part in parts:
        own = vars(part)
        made = memo[id(part)].__dict__
        made.update(own)
        for name, value in own.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS and not value:
                made[name] = kind()
            elif name == "_compiled_call_impl":  # it runs the original
                made[name] = None
            else:
                made[name] = _copied(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) is dict and all(isinstance(entry, _ENTRIES) for entry in value.values()):
        return {key: memo.get(id(entry), entry) for key, entry in value.items()}
    if type(value) in (tuple, list) and all(type(entry) in _PLAIN for entry in value):
        return value if type(value) is tuple else list(value)
    return copy.deepcopy(value, memo)


def _plain_tensors(parts: list[nn.Module]) -> Iterator[torch.Tensor]:
    for part in parts:
        for value in vars(part).values():
            if type(value) not in _NO_TENSORS and isinstance(value, torch.Tensor):
                yield value
