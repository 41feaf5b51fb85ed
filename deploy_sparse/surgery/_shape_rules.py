"""Rules for operations that move, pick, copy or make elements: atoms and constants undergo the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ._axes import Grid, Ledger
from ._nodes import Node, map_nodes
from ._values import Value, compressed, even, lean, unknown_constant, untracked, varying
from ._words import names
from .trace import arguments, operation, place

Result = Value | tuple[Value, ...]
RESHAPE = names("view reshape _unsafe_view flatten unflatten expand expand_as view_as reshape_as")


def identity(ledger: Ledger, node: Node) -> Value:
    """Copies and casts: nothing changes, except that a cast to integers, or one that rounds, hides the constant."""
    value = ledger.value(node.args[0])
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    if before.is_floating_point and not after.is_floating_point:
        known = unknown_constant(value.shape)
        ledger.lose(value.atoms, value.constant, known, f"would be cast to integers by {place(node)}")
        return Value(value.atoms, known, value.producer, value.why)
    if not rounds(before, after):
        return value
    known = rounded(value.constant)
    ledger.lose(value.atoms, value.constant, known, f"would be rounded by {place(node)}")
    return replace(value, constant=compressed(known))


def rounds(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether floating numbers lose digits on the way from one type to the other."""
    both = before.is_floating_point and after.is_floating_point
    return both and torch.finfo(after).eps > torch.finfo(before).eps


def rounded(constant: torch.Tensor) -> torch.Tensor:
    """What is known of a constant after rounding, which networks in other precisions do otherwise: only zero stays."""
    return torch.where(constant == 0, constant, torch.nan)


def same_operation(ledger: Ledger, node: Node, constant: torch.Tensor | None = None) -> Result:
    """Shape operations: what the network does to its data is done to atoms and constants.

    ``constant`` takes the place of the one input's own.
    """
    inputs = [ledger.value(n) for n in node.all_input_nodes[:1]]
    atoms, constants = _run(ledger, node, "atoms"), _run(ledger, node, "constant", constant)
    (value,) = inputs

    def made(a: torch.Tensor, c: torch.Tensor) -> Value:
        whole = value.sums_to_one and a.shape[-1:] == value.shape[-1:] and _keeps_last_axis(node)
        return placed(ledger, replace(value, atoms=a, constant=c, sums_to_one=whole), fixed)

    fixed = _written_out(node) if operation(node)[0] in RESHAPE else frozenset()
    if isinstance(atoms, torch.Tensor):
        return made(atoms, constants)
    return tuple(made(a, c) for a, c in zip(atoms, constants, strict=True))


def _keeps_last_axis(node: Node) -> bool:
    """Whether rows along the last axis stay whole, their size being the same."""
    name, given = operation(node)[0], arguments(node)
    last = node.args[0].meta["val"].dim() - 1
    if name in ("slice", "select", "chunk", "split", "split_with_sizes", "unbind", "narrow"):
        return bool(given["dim"] % (last + 1) != last)
    if name == "transpose":
        return last not in (given["dim0"] % (last + 1), given["dim1"] % (last + 1))
    if name == "permute":
        return bool(given["dims"][-1] % (last + 1) == last)
    if name == "unsqueeze":
        return bool(given["dim"] % (last + 2) != last + 1)
    return name in RESHAPE and name not in ("flatten", "unflatten")


def pick(ledger: Ledger, node: Node) -> Result:
    """Part of a tensor. Which part may depend on the size, so a constant must not change along the axis."""
    given = arguments(node)
    value = ledger.value(given["self"])
    dim = given["dim"] % len(value.shape)
    if value.state or dim in varying(value.atoms):
        made = same_operation(ledger, node)
        alike = isinstance(made, tuple) and len({part.shape for part in made}) == 1 and len(made) > 1
        if alike and operation(node)[0] == "split" and dim in varying(value.atoms):
            ledger.balance([part.atoms for part in made], dim, place(node))  # type: ignore[union-attr]
        return made
    settled = even(value.constant, [dim])
    ledger.lose(value.atoms, value.constant, settled, f"would depend on the position picked by {place(node)}")
    return same_operation(ledger, node, compressed(settled.expand(value.shape)))


def look_up(ledger: Ledger, node: Node) -> Value:
    """Positions given by a table. Along the channels it must keep all of them; elsewhere it may be unknown."""
    given = arguments(node)
    value = ledger.value(given["self"])
    shape = node.meta["val"].shape
    indices = given.get("indices", None)
    if indices is None:
        indices = [None] * (given["dim"] % len(value.shape)) + [given["index"]]
    dims = {d for d, index in enumerate(indices) if index is not None}
    for index in indices:
        if index is not None:
            ledger.pin(ledger.value(index), f"channels are positions in {place(node)}")
    if dims & set(varying(value.atoms)):
        ledger.fix(value, dims, f"channels are picked at fixed positions by {place(node)}")
    settled = even(value.constant, dims).expand(value.shape)
    ledger.lose(value.atoms, value.constant, settled, f"would depend on the position picked by {place(node)}")

    def position(index: Any, size: int) -> Any:
        if index is None:
            return slice(None)
        known = ledger.value(index).constant
        return known.nan_to_num().to(torch.int64).clamp(-size, size - 1)

    where = tuple(position(index, value.shape[d]) for d, index in enumerate(indices))
    atoms, constant = value.atoms[where], settled[where]
    if atoms.shape != shape:
        ledger.pin(value, why := f"a mask picks elements in {place(node)}")
        return untracked(shape, why)
    return placed(ledger, replace(value, atoms=atoms, constant=constant, sums_to_one=False))


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
    if not touched:
        return value
    constant = value.constant
    if given["mode"] == "constant":
        filler = given["value"] or 0.0
        # What is padded with its own value stays even; how far a border of other values reaches depends on the size.
        settled = even(constant, touched)
        constant = torch.where(settled == filler, settled, torch.nan)
    else:
        constant = even(constant, touched)
    ledger.lose(value.atoms, even(value.constant, touched), constant, f"would meet the padding of {place(node)}")
    return replace(
        value, atoms=lean(value.atoms).expand(shape), constant=compressed(constant.expand(shape)), scales_with=None
    )


def filled(ledger: Ledger, node: Node) -> Value:
    """New tensors of one number, and tensors overwritten by one: no channels meet there."""
    name, _ = operation(node)
    shape = node.meta["val"].shape
    given = arguments(node)
    number = 0.0 if "zero" in name else 1.0 if "one" in name else given.get("fill_value", given.get("value"))
    written = float(number) if isinstance(number, int | float) else torch.nan
    constant = torch.full((), written, dtype=torch.float64).expand(shape)
    if isinstance(number, Node) and number.meta["val"].dim() == 0:
        ledger.pin(ledger.value(number), f"a channel fills tensors in {place(node)}")
        constant = ledger.value(number).constant.expand(shape)
    if name in ("zero", "zero_", "fill", "fill_", "zeros_like", "ones_like", "full_like"):
        return replace(ledger.value(given["self"]), constant=constant, scales_with=None, sums_to_one=False)
    return untracked(shape, f"numbers from {place(node)}", constant)


def copied(ledger: Ledger, node: Node) -> Value:
    """``target.copy_(source)``: the target holds the source's content from now on."""
    given = arguments(node)
    target, source = ledger.value(given["self"]), ledger.value(given["src"])
    shape = node.meta["val"].shape
    if target.tracked and not source.tracked and not set(varying(target.atoms)) & _extent(given["src"], shape):
        constant = compressed(source.constant.expand(shape))  # the same for all channels
        return replace(target, constant=constant, scales_with=None, sums_to_one=False)
    if target.tracked and source.tracked:
        ledger.atoms.unify(target.atoms, source.atoms.expand(shape), f"channels meet {source.why} at {place(node)}")
    elif target.tracked:
        ledger.pin(target, f"channels are overwritten by {place(node)}")
    constant = compressed(source.constant.expand(shape).clone()) if source.constant.numel() else source.constant
    return Value(source.atoms.expand(shape), constant, None, source.why)


def _extent(node: Node, shape: torch.Size) -> set[int]:
    """Axes of ``shape`` along which the tensor of ``node`` holds more than one number."""
    own = node.meta["val"]
    before = len(shape) - own.dim()
    return {before + d for d in range(own.dim()) if own.shape[d] > 1 and own.stride(d) != 0}


def invented(ledger: Ledger, node: Node) -> Value:
    """New tensors whose numbers do not matter here; they are as wide as what they are made like."""
    if operation(node)[0].endswith("_like"):
        value = ledger.value(node.args[0])
        return Value(value.atoms, unknown_constant(value.shape), why=value.why)
    return untracked(node.meta["val"].shape, f"numbers from {place(node)}")


def _run(ledger: Ledger, node: Node, what: str, instead: torch.Tensor | None = None) -> Any:
    def held(source: Node) -> Any:
        return getattr(ledger.value(source), what) if instead is None else instead

    name, target = operation(node)
    if name in ("expand_as", "view_as", "reshape_as"):
        shape = node.meta["val"].shape
        only = held(node.args[0])
        return only.expand(shape) if name == "expand_as" else only.reshape(shape)
    function = torch.ops.aten.reshape.default if name in ("view", "_unsafe_view") else target
    return function(*map_nodes(node.args, held), **map_nodes(node.kwargs, held))


def placed(ledger: Ledger, value: Value, fixed: frozenset[int] = frozenset()) -> Value:
    value = replace(value, atoms=compressed(value.atoms), constant=compressed(value.constant))
    if len(varying(value.atoms)) > 1:
        ledger.grids.append(Grid(lean(value.atoms), fixed))  # a tensor keeps a product of positions
    return value


def _written_out(node: Node) -> frozenset[int]:
    """Axes of a reshape's result whose size is a plain number in the code."""
    given = arguments(node)
    key = next((k for k in ("size", "shape", "sizes") if k in given), None)
    if key is None:
        return frozenset()
    stated = node.meta["sizes"].get(key) or tuple(given[key])
    rank = node.meta["val"].dim()
    first = given["dim"] % given["self"].meta["val"].dim() if "sizes" in given else rank - len(stated)
    return frozenset(first + i for i, expr in enumerate(stated) if isinstance(expr, int) and expr >= 0)
