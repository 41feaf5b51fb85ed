"""Rules for operations that take an axis of channels apart, put one together, or shuffle it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._axes import Grid, Ledger
from ._nodes import Node
from ._shape_rules import Result, placed, same_operation
from ._values import Value, compressed, even, lean, varying
from .trace import arguments, operation, place


def pixel_shuffle(ledger: Ledger, node: Node) -> Result:
    """``[.., C · r², H, W]`` to ``[.., C, H · r, W · r]``: the r² channels behind one output channel go together."""
    value, factor = ledger.value(node.args[0]), int(node.args[1]) ** 2
    dim = len(value.shape) - 3
    if dim in varying(value.atoms):
        parts = torch.unflatten(lean(value.atoms), dim, (-1, factor))  # [.., C, r², 1, 1]
        ledger.atoms.unify(parts.amax(dim=dim + 1, keepdim=True), parts, f"channels meet {value.why} at {place(node)}")
        joined = parts.amax(dim=dim + 1, keepdim=True).expand(parts.shape).flatten(dim, dim + 1)
        value = replace(value, atoms=joined.expand(value.shape))
        ledger.values[node.args[0]] = value
    return same_operation(ledger, node)


def channel_shuffle(ledger: Ledger, node: Node) -> Result:
    """Channel j of group i becomes channel i of group j: all groups keep the same positions."""
    given = arguments(node)
    value = ledger.value(given["self"])
    if 1 in varying(value.atoms):
        grid = torch.unflatten(lean(value.atoms), 1, (int(given["groups"]), -1))
        ledger.grids.append(Grid(grid, frozenset({1})))
        held = ledger.atoms.fresh(grid.shape[1])  # the number of groups is written into the code
        ledger.atoms.pin(held, f"the size is stated by {place(node)}")
        ledger.link([grid, held.reshape([-1 if d == 1 else 1 for d in range(grid.dim())])], [1], whole=True)
    return same_operation(ledger, node)


def shift(ledger: Ledger, node: Node) -> Result:
    """Positions that move round, rotate or overlap along an axis: its channels all stay."""
    given = arguments(node)
    value = ledger.value(given["self"])
    dims = given.get("dims", given.get("dimension"))
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(value.shape)))
    ledger.fix(value, set(dims), f"channels are moved by {place(node)}")
    return same_operation(ledger, node)


def glu(ledger: Ledger, node: Node) -> Value:
    """``a · sigmoid(b)`` with both halves of an axis: channel j of both is one channel."""
    given = arguments(node)
    value, dim = ledger.value(given["self"]), given["dim"] % node.meta["val"].dim()
    atoms, constants = (
        x.chunk(2, dim)
        for x in (value.atoms, even(value.constant, [dim]) if dim not in varying(value.atoms) else value.constant)
    )
    if dim in varying(value.atoms):
        ledger.atoms.unify(atoms[0], atoms[1], f"channels meet {value.why} at {place(node)}")
    else:
        constants = (constants[0], constants[0])
    shape = node.meta["val"].shape
    gated = constants[0] * torch.sigmoid(constants[-1])
    gated = torch.where(constants[0] == 0, torch.zeros_like(gated), gated)
    return Value(compressed(atoms[0].expand(shape)), compressed(gated.expand(shape)), None, value.why)


def chunk(ledger: Ledger, node: Node) -> Result:
    """Equal parts of the channels stay equal."""
    given = arguments(node)
    value, dim = ledger.value(given["input"] if "input" in given else given["self"]), given["dim"]
    dim = dim % len(value.shape)
    if dim in varying(value.atoms):
        parts = value.atoms.chunk(given["chunks"], dim)
        if any(part.shape != parts[0].shape for part in parts) or len(parts) != given["chunks"]:
            ledger.fix(value, {dim}, f"channels are split unevenly by {place(node)}")
        else:
            ledger.balance(parts, dim, place(node))
        return same_operation(ledger, node)
    settled = even(value.constant, [dim])
    return same_operation(ledger, node, compressed(settled.expand(value.shape)))


def join(ledger: Ledger, node: Node) -> Value:
    """Concatenation along the channels, or along another axis, which joins the channels of all parts."""
    name, _ = operation(node)
    stacked = name == "stack"
    parts = [ledger.value(n) for n in node.args[0]]
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
    return placed(ledger, Value(joined, torch.cat(constants, dim), None, why))
