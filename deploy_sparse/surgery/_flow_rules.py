"""Rules for operations without weights: shape, pooling, reduction; elementwise ones are in ``_pointwise``.

A rule first pins the channels the operation would not survive losing, then applies the operation to atoms and
constants alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node, map_arg

from ._axes import Ledger
from ._pointwise import POINTWISE_TOO, pointwise
from ._values import Value, compressed, even, lean, unknown_constant, untracked, varying
from .trace import arguments, operation, place

Result = Value | tuple[Value, ...]

IDENTITY = frozenset({"clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as"})
DROPOUT = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
RESHAPE = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "expand_as", "view_as"})
PICK = frozenset({"slice", "select", "split", "split_with_sizes", "unbind", "narrow", "tensor_split"})
MOVE = frozenset({"permute", "transpose", "t", "unsqueeze", "movedim", "swapaxes"})
JOIN = frozenset({"cat", "concat", "stack"})
REDUCE = frozenset({"mean", "sum", "amax", "amin"})
POOL_KEEPS = frozenset(f"{kind}pool{n}d" for kind in ("max_", "adaptive_avg_", "adaptive_max_") for n in (1, 2, 3))
POOL_AVERAGE = frozenset(f"avg_pool{n}d" for n in (1, 2, 3))


def rule_for(node: Node) -> Callable[[Ledger, Node], Result] | None:
    """The rule of a weightless operation, or None for an unknown one."""
    name, target = operation(node)
    if name in IDENTITY:
        return identity
    if name in DROPOUT:
        return None if arguments(node)["train"] else identity
    if name == "pad":
        return pad
    if name == "chunk":
        return chunk
    if name in RESHAPE and "dtype" not in str(target):
        return reshape
    if name in PICK:
        return pick
    if name == "squeeze":
        return squeeze
    if name in MOVE:
        return same_operation
    if name in JOIN:
        return join
    if name in REDUCE:
        return reduce
    if name in POOL_KEEPS or name in POOL_AVERAGE:
        return pool
    tags = getattr(target, "tags", ())
    pointwise_tag = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise if pointwise_tag or name in POINTWISE_TOO else None


def identity(ledger: Ledger, node: Node) -> Value:
    """Copies and casts: nothing changes, except that a cast to integers hides the constant."""
    value = ledger.value(node.args[0])  # type: ignore[arg-type]
    if node.meta["val"].is_floating_point():
        return value
    unknown = unknown_constant(value.shape)
    ledger.lose(value.atoms, value.constant, unknown, f"would be cast to integers by {place(node)}")
    return Value(value.atoms, unknown, value.producer, value.why)


def same_operation(ledger: Ledger, node: Node, constant: torch.Tensor | None = None) -> Result:
    """Shape operations: what the network does to its data is done to atoms and constants.

    ``constant`` takes the place of the one input's own.
    """
    inputs = [ledger.value(n) for n in node.all_input_nodes]
    atoms, constants = _run(ledger, node, "atoms"), _run(ledger, node, "constant", constant)
    why = next((v.why for v in inputs if v.why), "")
    producers = {v.producer for v in inputs}
    producer = producers.pop() if len(producers) == 1 else None
    state = all(v.state for v in inputs)
    if isinstance(atoms, torch.Tensor):
        return _placed(ledger, node, Value(atoms, constants, producer, why, state))
    pairs = zip(atoms, constants, strict=True)
    return tuple(_placed(ledger, node, Value(a, c, producer, why, state)) for a, c in pairs)


def reshape(ledger: Ledger, node: Node) -> Result:
    """View, reshape, flatten, expand. With ``ledger.fixed_sizes`` a written-out channel count pins its channels."""
    result = same_operation(ledger, node)
    sizes = next((a for a in node.args[1:] if isinstance(a, list | tuple)), ())
    if ledger.fixed_sizes and isinstance(result, Value) and len(sizes) == len(result.shape):
        for dim in varying(result.atoms):
            if sizes[dim] == result.shape[dim]:
                ledger.pin(result, f"a size is written into {place(node)}")
    return result


def squeeze(ledger: Ledger, node: Node) -> Result:
    """With ``ledger.fixed_sizes`` no channel goes: an axis narrowed to one channel would vanish as well."""
    value, dims = ledger.value(node.args[0]), arguments(node).get("dim")  # type: ignore[arg-type]
    rank = len(value.shape)
    touched = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if dims is not None else set(range(rank))
    if ledger.fixed_sizes and touched & set(varying(value.atoms)):
        ledger.pin(value, f"an axis of one channel would vanish in {place(node)}")
    return same_operation(ledger, node)


def pick(ledger: Ledger, node: Node) -> Result:
    """Slices at positions that are written into the code: they would pick others if channels were missing."""
    given = arguments(node)
    value = ledger.value(given["self"])
    result = _picked(ledger, node, value, given["dim"])
    whole = isinstance(result, Value) and result.shape == value.shape
    if given["dim"] % len(value.shape) in varying(value.atoms) and not whole:
        ledger.pin(value, f"channels are picked at fixed positions by {place(node)}")
    return result


def chunk(ledger: Ledger, node: Node) -> Result:
    """Equal parts of the channels stay equal: channel j of every part is one channel."""
    given = arguments(node)
    value, dim = ledger.value(given["input"] if "input" in given else given["self"]), given["dim"]
    if dim % len(value.shape) in varying(value.atoms):
        parts = value.atoms.chunk(given["chunks"], dim)
        if any(part.shape != parts[0].shape for part in parts) or len(parts) != given["chunks"]:
            ledger.pin(value, f"channels are split unevenly by {place(node)}")
        else:
            for part in parts[1:]:
                ledger.atoms.unify(parts[0], part, f"channels meet {value.why} at {place(node)}")
    return _picked(ledger, node, value, dim)


def join(ledger: Ledger, node: Node) -> Value:
    """Concatenation along the channels, or along another axis, which joins the channels of all parts."""
    name, _ = operation(node)
    stacked = name == "stack"
    parts = [ledger.value(n) for n in node.args[0]]  # type: ignore[union-attr, arg-type]
    dim = arguments(node)["dim"] % (len(parts[0].shape) + stacked)
    atoms = [p.atoms.unsqueeze(dim) if stacked else p.atoms for p in parts]
    constants = [p.constant.unsqueeze(dim) if stacked else p.constant for p in parts]
    if any(d != dim for laid in atoms for d in varying(laid)):
        for part, laid in zip(parts[1:], atoms[1:], strict=True):
            why = f"channels meet {part.why or parts[0].why} at {place(node)}"
            ledger.atoms.unify(atoms[0].narrow(dim, 0, 1), laid.narrow(dim, 0, 1), why)
    joined = torch.cat([ledger.atoms.roots(laid) for laid in atoms], dim)
    why = next((p.why for p in parts if p.why), "")
    # Behind a concatenation a layer's channels are no longer its own (producer None): a norm there belongs to all.
    return _placed(ledger, node, Value(joined, torch.cat(constants, dim), None, why))


def pad(ledger: Ledger, node: Node) -> Result:
    """Padding of positions keeps channels; padding of the channel axis fixes their number."""
    given = arguments(node)
    value, amounts = ledger.value(given["self"]), given["pad"]
    touched = {len(value.shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    shape = node.meta["val"].shape
    if touched & set(varying(value.atoms)):
        why = f"the channel axis is padded by {place(node)}"
        ledger.pin(value, why)
        return untracked(shape, why)
    constant = value.constant
    if given["mode"] == "constant":
        constant = compressed(torch.nn.functional.pad(constant, amounts, value=given["value"] or 0.0))
    # Reflected or repeated values are the same constant; how far a border of other values reaches depends on the size.
    constant = even(constant, touched)
    ledger.lose(value.atoms, even(value.constant, touched), constant, f"would meet the padding of {place(node)}")
    constant = constant.expand(shape)
    return Value(lean(value.atoms).expand(shape), constant, value.producer, value.why)


def reduce(ledger: Ledger, node: Node) -> Result:
    """Mean, sum and extremes over axes other than the channels'.

    A constant stays where it is the same over all reduced positions; their number changes with the input's size, so a
    sum keeps zero only.
    """
    given = arguments(node)
    value = ledger.value(given["self"])
    dims = given.get("dim")
    rank = len(value.shape)
    dims = [dims] if isinstance(dims, int) else dims
    over = {d % rank for d in dims} if dims else set(range(rank))
    shape = node.meta["val"].shape
    if over & set(varying(value.atoms)):
        ledger.pin(value, why := f"channels are mixed by {place(node)}")
        return untracked(shape, why)
    ordered = sorted(over)
    atoms, constant = value.atoms.amin(dim=ordered, keepdim=True), even(value.constant, ordered)
    if operation(node)[0] == "sum":
        constant = torch.where(constant == 0, constant, torch.nan)
    ledger.lose(value.atoms, value.constant, constant, f"would depend on the number of positions in {place(node)}")
    return Value(
        compressed(atoms.reshape(shape)), compressed(constant.reshape(shape)), value.producer, value.why
    )  # the reduced axes, of size 1 by now, go or stay as ``shape`` says


def pool(ledger: Ledger, node: Node) -> Result:
    """Pooling over positions. A constant stays, unless zeros of the padding are averaged in."""
    name, _ = operation(node)
    given = arguments(node)
    value = ledger.value(node.args[0])  # type: ignore[arg-type]
    spatial = set(range(len(value.shape) - int(name[-2]), len(value.shape)))
    if spatial & set(varying(value.atoms)):
        ledger.pin(value, f"channels lie along the axes pooled by {place(node)}")
    constant = even(value.constant, spatial)
    if name in POOL_AVERAGE:
        padding = given["padding"]
        padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
        if (padded and given["count_include_pad"]) or given.get("divisor_override"):
            constant = torch.where(constant == 0, constant, torch.nan)
    ledger.lose(value.atoms, value.constant, constant, f"would meet the zero padding of {place(node)}")
    outputs = node.meta["val"]
    single = not isinstance(outputs, list | tuple)
    shape = outputs.shape if single else outputs[0].shape
    atoms = value.atoms
    for d in spatial:
        atoms = atoms.narrow(d, 0, 1)
    result = Value(atoms.expand(shape), constant.expand(shape), value.producer, value.why)
    return result if single else (result, untracked(shape, f"positions from {place(node)}"))


def _picked(ledger: Ledger, node: Node, value: Value, dim: int) -> Result:
    """Part of ``value`` along ``dim``. Which part may depend on the size, so a constant must not change along it."""
    dim = dim % len(value.shape)
    if value.state or dim in varying(value.atoms):
        return same_operation(ledger, node)
    settled = even(value.constant, [dim])
    ledger.lose(value.atoms, value.constant, settled, f"would depend on the position picked by {place(node)}")
    return same_operation(ledger, node, compressed(settled.expand(value.shape)))


def _run(ledger: Ledger, node: Node, what: str, instead: torch.Tensor | None = None) -> Any:
    def held(source: Node) -> Any:
        return getattr(ledger.value(source), what) if instead is None else instead

    name, target = operation(node)
    function = torch.ops.aten.reshape.default if name in ("view", "_unsafe_view") else target
    return function(*map_arg(node.args, held), **map_arg(node.kwargs, held))


def _placed(ledger: Ledger, node: Node, value: Value) -> Value:
    value = replace(value, atoms=compressed(value.atoms), constant=compressed(value.constant))
    if len(varying(value.atoms)) > 1:
        ledger.pin(value, f"channels are spread over several axes by {place(node)}")
    return value
