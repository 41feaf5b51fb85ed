"""Layers with fixed sizes in PyTorch's own code, exchanged for equal ones without."""

from __future__ import annotations

from torch import nn
from torch.utils import _pytree as pytree

from .layers import NarrowAttention, unsupported

_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})


def with_open_attention(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Exchange every ``nn.MultiheadAttention`` in place, and say where; those with extra parts stay as they are."""
    paths = tuple(
        path
        for path, part in module.named_modules()
        if isinstance(part, nn.MultiheadAttention) and unsupported(part) is None
    )
    for path in paths:
        part = module.get_submodule(path)
        assert isinstance(part, nn.MultiheadAttention)
        if not path:
            return NarrowAttention.of(part), paths
        put(module, path, NarrowAttention.of(part))
    return module, paths


def put(module: nn.Module, path: str, part: nn.Module) -> None:
    """Replace the submodule at ``path``, in place; wherever a module holds it, plain lists included, it is replaced."""
    old = module.get_submodule(path)
    for name, hooks in vars(old).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            setattr(part, name, hooks)  # they follow the place, not the layer
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = part
        for name, value in vars(parent).items():
            listed = value and type(value) in (list, tuple, dict) and name not in _REGISTERED
            if listed and any(x is old for x in pytree.tree_leaves(value)):
                vars(parent)[name] = pytree.tree_map(lambda x: part if x is old else x, value)
