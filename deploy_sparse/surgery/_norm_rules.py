"""Rules for norms over channels: LayerNorm, RMSNorm and GroupNorm.

Their statistics count every channel, also one that is constant. A channel whose input is a known constant may go all
the same where the layer can be replaced by one that keeps counting it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ._axes import Grid, Ledger, NormUse, columns, layer_name
from ._nodes import Node
from ._values import Value, along, compressed, even, lean, unknown_constant, untracked, varying
from .trace import arguments, layer_of, operation, place

_MOVES = frozenset({"permute", "transpose", "movedim", "swapaxes"})
_COPIES = frozenset({"contiguous", "to", "_to_copy", "clone", "alias", "type_as"})


def rule_for(node: Node) -> Callable[[Ledger, Node], Value] | None:
    """The rule of a norm over channels, or None when this is none."""
    return {"layer_norm": over_last_axes, "rms_norm": over_last_axes, "group_norm": group_norm}.get(operation(node)[0])


def unsupported(ledger: Ledger, node: Node) -> str | None:
    """Why the rule does not apply: a scale or shift that is computed."""
    given = arguments(node)
    for name in ("weight", "bias"):
        argument = given.get(name)
        if isinstance(argument, Node) and not ledger.is_state(argument):
            return f"computed {name} at {place(node)}"
    return None


def over_last_axes(ledger: Ledger, node: Node) -> Value:
    """LayerNorm and RMSNorm."""
    given = arguments(node)
    value, shape = ledger.value(given["input"]), given["normalized_shape"]
    axes, rank = varying(value.atoms), len(value.shape)
    normalised = set(range(rank - len(shape), rank))
    affine = [given[key] for key in ("weight", "bias") if given.get(key) is not None]
    if not normalised & set(axes):
        for parameter in affine:
            ledger.reshaped_state.setdefault(ledger.name(parameter), f"it scales positions at {place(node)}")
        return Value(value.atoms, unknown_constant(value.shape), value.producer, value.why)
    if len(shape) != 1 or axes != (rank - 1,):
        ledger.pin(value, why := f"{place(node)} normalises over several axes")
        return untracked(value.shape, why)
    kind: Literal["layer", "rms"] = "layer" if operation(node)[0] == "layer_norm" else "rms"
    channels = columns(ledger, value, -1)
    module, dim, fixed = _replaceable(ledger, node, affine)
    return _norm(ledger, node, kind, channels[None], rank - 1, (module, dim - rank, fixed))


def group_norm(ledger: Ledger, node: Node) -> Value:
    """GroupNorm: channels on axis 1, in equal groups."""
    given = arguments(node)
    value, groups = ledger.value(given["input"]), given["num_groups"]
    channels = columns(ledger, value, 1)
    affine = [given[key] for key in ("weight", "bias") if given[key] is not None]
    module, dim, fixed = _replaceable(ledger, node, affine)
    grid = channels.reshape(groups, -1)
    if groups > 1:
        ledger.grids.append(Grid(grid))
        ledger.settings.append((ledger.count(node, "num_groups", _owner(ledger, node, affine), groups), grid))
    if module is not None and dim != 1:
        module, fixed = None, f"{place(node)} normalises a moved axis"
    return _norm(ledger, node, "group", grid, 1, (module, 1, fixed))


def _norm(
    ledger: Ledger,
    node: Node,
    kind: Literal["layer", "rms", "group"],
    grid: torch.Tensor,
    axis: int,
    owner: tuple[str | None, int, str],
) -> Value:
    """``grid`` holds the channels, ``[groups, channels of one group]``, along ``axis`` of the input."""
    given = arguments(node)
    value = ledger.value(given["input"])
    count = grid.numel()
    others = [d for d in range(len(value.shape)) if d != axis]
    constant = even(value.constant, others).reshape(-1).expand(count)  # [channels]
    module, dim, fixed = owner
    ledger.norms.append(
        NormUse(
            kind=kind,
            module=module,
            fixed=fixed,
            dim=dim,
            atoms=grid,
            constant=constant.reshape(grid.shape),
            eps=given["eps"],
            place=place(node),
        )
    )
    scale = torch.ones(count, dtype=torch.float64)
    shift = torch.zeros(count, dtype=torch.float64)
    for key in ("weight", "bias"):
        if given.get(key) is not None:
            ledger.enter(ledger.name(given[key]), 0, grid.reshape(-1), "shared")
    if given.get("weight") is not None:
        scale = ledger.tensor(given["weight"])
    if given.get("bias") is not None:
        shift = ledger.tensor(given["bias"])
    result = torch.where(scale == 0, shift, torch.nan)
    cause = f"would be normalised together with values that depend on the input in {place(node)}"
    ledger.lose(lean(value.atoms), value.constant, along(result, axis, value.shape), cause)
    return Value(value.atoms, compressed(along(result, axis, value.shape)), value.producer, value.why)


def _replaceable(ledger: Ledger, node: Node, affine: list[Any]) -> tuple[str | None, int, str]:
    """The module that does nothing but this norm, the axis of its input that holds channels, or why there is none."""
    rank = len(node.meta["val"].shape)
    path = _owner(ledger, node, affine)
    if path != layer_of(node) or not path:
        return None, rank - 1, f"{place(node)} is written out in the code of layer {layer_name(node)!r}"
    at, order = -1, list(range(rank))
    for step in ledger.by_layer[path]:
        name, _ = operation(step)
        if step.meta["call"] != node.meta["call"]:
            continue
        if step is node:
            at = order[1] if name == "group_norm" else order[-1]
        elif name in _MOVES:
            order = _moved(step, order)
        elif name not in _COPIES:
            return None, rank - 1, f"layer {path!r} does more than {place(node)}"
    if order != list(range(rank)):
        return None, rank - 1, f"layer {path!r} moves its axes around {place(node)}"
    return path, at, ""


def _moved(step: Node, order: list[int]) -> list[int]:
    """Which axis of the module's input stands where after ``step``."""
    marks = torch.empty([n + 2 for n in range(len(order))], device="meta")  # every axis of another size
    _, target = operation(step)
    moved = target(marks, *step.args[1:], **step.kwargs)
    return [order[n - 2] for n in moved.shape]


def _owner(ledger: Ledger, node: Node, affine: list[Any]) -> str:
    return ledger.name(affine[0]).rpartition(".")[0] if affine else layer_of(node)
