"""Example inputs, and networks, that surgery refuses whatever the weights are: by kind, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..errors import SurgeryError
from ._skeleton import parts_of, state_of


def checked_inputs(example_inputs: Any, module: nn.Module) -> tuple[Any, ...]:
    """Positional inputs as a tuple, refused where ``module`` cannot run on them whatever its weights.

    Raises:
        SurgeryError: neither a tensor nor a tuple of inputs, an empty batch, or other arguments than
            ``forward()`` takes; a network with lazy layers that never ran.
    """
    if not isinstance(example_inputs, torch.Tensor | tuple | list):
        named = isinstance(example_inputs, Mapping)
        raise SurgeryError(
            f"example_inputs is {kind_of(example_inputs)}" if not named else "example_inputs is a dict",
            expected="one tensor with a batch axis, or the tuple of positional inputs",
            fix=f"{_BY_POSITION}; a forward that takes a dict gets ({{…}},)"
            if named
            else "pass tensors, for example torch.as_tensor(array)",
        )
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    if tensors and tensors[0].dim() and not len(tensors[0]):
        raise SurgeryError(
            f"the example inputs are a batch of 0 samples, of shape {list(tensors[0].shape)}",
            expected="at least one sample; the batch axis is the first",
            fix="pass two samples or more",
        )
    _refuse_lazy(module)
    _refuse_other_arguments(module, inputs)
    return inputs


_BY_POSITION = "give every argument of forward() by position, in a tuple, and wrap a network with keyword-only ones"


def _refuse_other_arguments(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if module._forward_pre_hooks:
        return  # they may add arguments
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return  # compiled, without a signature to look at
    try:
        signature.bind(*inputs)
    except TypeError as problem:
        tensors = [list(x.shape) for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        shapes = " and ".join(map(str, tensors)) or "no tensor"
        raise SurgeryError(
            f"{kind_of(module)} does not accept these inputs ({shapes}): {problem}",
            expected=f"inputs for forward{signature}",
            fix=_BY_POSITION,
        ) from None


def _refuse_lazy(module: nn.Module) -> None:
    for name, tensor in state_of(parts_of(module)):
        if is_lazy(tensor):
            raise SurgeryError(
                f"{name!r} has no shape yet: it belongs to a lazy layer that never ran",
                expected="a network whose layers know their sizes",
                fix="state the sizes in the factory, or let the factory run the network once before it returns it",
            )


def kind_of(value: object) -> str:
    """The type's name, for messages."""
    return "None" if value is None else type(value).__name__
