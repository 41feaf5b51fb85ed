"""Sizes that the network's code states: what they must equal once channels are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ._axes import Ledger
from ._claims import shown_positions
from ._nodes import Node
from ._provenance import Derived, Expr, Setting
from ._values import Value, lean, varying
from ._words import names
from .trace import arguments, is_pick, operation, place

Removed = np.ndarray


@dataclass(frozen=True)
class Positions:
    """Some positions of an axis, each with the channels (smallest joined atoms) that lie there: ``[positions, any]``.

    A position stays as long as one of them does; ``-1`` stands for what cannot go.
    """

    roots: np.ndarray

    def alive(self, removed: Removed) -> np.ndarray:
        """Bool ``[positions]``."""
        alive: np.ndarray = ((self.roots < 0) | ~removed[np.maximum(self.roots, 0)]).any(axis=1)
        return alive

    def kept(self, removed: Removed) -> int:
        """How many positions stay."""
        return int(self.alive(removed).sum())


@dataclass(frozen=True)
class Equation:
    """The number of ``positions`` that stay must be the number ``expr`` gives; ``where`` names the code."""

    positions: Positions
    expr: Expr
    where: str


class Extents:
    """The sizes of all tensors once channels are gone."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._positions: dict[tuple[Node, int], Positions | int] = {}

    def positions(self, node: Node, dim: int, part: int | None = None) -> Positions | int:
        """The positions along an axis of a node's result, or their number where none can go."""
        key = (node, dim if part is None else dim + 64 * (part + 1))
        if key not in self._positions:
            self._positions[key] = self._found(node, dim, part)
        return self._positions[key]

    def size(self, node: Node, dim: int, removed: Removed) -> int:
        """How many positions of an axis stay."""
        found = self.positions(node, dim)
        return found if isinstance(found, int) else found.kept(removed)

    def shape(self, node: Node, part: int | None, removed: Removed) -> list[int]:
        """How many positions stay along each axis of a node's result."""
        known = self.ledger.values.get(node)
        value = known[part] if isinstance(known, tuple) and part is not None else known
        sizes = list((node.meta["val"] if part is None else node.meta["val"][part]).shape)
        dims: Sequence[int] = range(len(sizes))
        if isinstance(value, Value) and not value.state and not self.ledger.is_state(node):
            dims = varying(value.atoms)
        for dim in dims:
            found = self.positions(node, dim, part)
            sizes[dim] = found if isinstance(found, int) else found.kept(removed)
        return sizes

    def _found(self, node: Node, dim: int, part: int | None) -> Positions | int:
        shape = (node.meta["val"] if part is None else node.meta["val"][part]).shape
        if self.ledger.is_state(node):
            axis = self.ledger.axes.get((self.ledger.name(node), dim))
            if axis is None:
                return int(shape[dim])
            roots = self.ledger.roots_of(axis)
            return Positions(roots[:, None] if roots.ndim == 1 else roots.T)
        known = self.ledger.values.get(node)
        value = known[part] if isinstance(known, tuple) and part is not None else known
        if not isinstance(value, Value) or dim not in varying(value.atoms):
            shown = shown_positions(self.ledger, node, dim) if isinstance(value, Value) and value.state else None
            return int(shape[dim]) if shown is None else Positions(shown)
        return along(self.ledger, value, dim)


def along(ledger: Ledger, value: Value, dim: int) -> Positions:
    """The positions along axis ``dim`` of a tensor whose channels change along it."""
    roots = ledger.atoms.roots(lean(value.atoms)).movedim(dim, 0)
    return Positions(roots.reshape(roots.shape[0], -1).numpy())


def equations(ledger: Ledger) -> list[Equation]:
    """Every size that the code gives to a tensor with channels, and what sizes the code derives from theirs."""
    found: list[Equation] = []
    for node in ledger.traced.nodes:
        if node.op == "call_function":
            found += _of(ledger, node)
    for stated, grid in ledger.settings:
        roots = ledger.atoms.roots(grid).numpy()
        positions = Positions(roots.reshape(roots.shape[0], -1))
        where = f"{stated.name} of layer {stated.module!r}" if isinstance(stated, Setting) else "a number of groups"
        found.append(Equation(positions, stated, where))
    return found


def _of(ledger: Ledger, node: Node) -> Iterator[Equation]:
    name, _ = operation(node)
    given, sizes = (arguments(node), node.meta.get("sizes", {})) if name in _SIZED else ({}, {})
    where = place(node)

    def exprs(argument: str) -> tuple[Expr, ...]:
        plain = given[argument]
        return sizes.get(argument) or (tuple(plain) if isinstance(plain, list | tuple) else (plain,))

    if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten"):
        key = next((k for k in ("size", "shape", "sizes") if k in given), None)
        value = ledger.values[node]
        if key is None or not isinstance(value, Value):
            return
        stated = exprs(key)
        first = (
            given["dim"] % given["self"].meta["val"].dim() if name == "unflatten" else len(value.shape) - len(stated)
        )
        for dim, expr in enumerate(stated, start=first):
            if name != "expand" or node.meta["val"].stride(dim) != 0:
                yield from _whole(ledger, value, dim, expr, where)
    elif name in ("split", "split_with_sizes", "unbind"):
        parts = ledger.values[node]
        source = ledger.value(given["self"])
        dim = given["dim"] % len(source.shape)
        if not isinstance(parts, tuple):
            return
        if source.state and dim not in varying(source.atoms) and name == "split_with_sizes":
            yield from _of_parameter(ledger, node, dim, exprs("split_sizes"))
        if dim not in varying(source.atoms):
            return
        if name == "unbind":
            yield Equation(along(ledger, source, dim), source.shape[dim], where)
            return
        stated = exprs("split_size" if "split_size" in given else "split_sizes")
        for number, part in enumerate(parts):
            expr = stated[number] if len(stated) > 1 else stated[0]
            if len(stated) > 1 or number < len(parts) - 1 or part.shape[dim] == given.get("split_size"):
                yield from _whole(ledger, part, dim, expr, where)
    elif name in ("slice", "select", "narrow"):
        yield from _cut_out(ledger, node, exprs, where)


def _of_parameter(ledger: Ledger, node: Node, dim: int, stated: tuple[Expr, ...]) -> Iterator[Equation]:
    """Parts of a parameter, as of the packed rows of queries, keys and values."""
    for user in ledger.users.get(node, ()):
        roots = shown_positions(ledger, user, dim) if is_pick(user) else None
        if roots is not None:
            yield Equation(Positions(roots), stated[user.args[1]], place(node))


_SIZED = names("view reshape _unsafe_view expand unflatten split split_with_sizes unbind slice select narrow")


def _whole(ledger: Ledger, value: Value, dim: int, expr: Expr, where: str) -> Iterator[Equation]:
    if isinstance(expr, int) and expr < 0:
        return
    if dim in varying(value.atoms):
        yield Equation(along(ledger, value, dim), expr, where)
    elif not isinstance(expr, int):
        fixed = np.full((value.shape[dim], 1), -1)
        yield Equation(Positions(fixed), expr, where)


def _cut_out(ledger: Ledger, node: Node, exprs: object, where: str) -> Iterator[Equation]:
    given = arguments(node)
    value = ledger.value(given["self"])
    dim = given["dim"] % len(value.shape)
    if dim not in varying(value.atoms):
        return
    whole, size = along(ledger, value, dim), value.shape[dim]
    ends = {"select": ("index",), "narrow": ("start",), "slice": ("start", "end")}[operation(node)[0]]
    for end in ends:
        number = given[end]
        if not isinstance(number, int) or number >= size or number in (0, -size):
            continue
        (expr,) = exprs(end)  # type: ignore[operator]
        if number < 0:  # counted from the end
            back = Derived("-", 0, expr) if not isinstance(expr, int) else -expr
            yield Equation(Positions(whole.roots[number:]), back, where)
        else:
            yield Equation(Positions(whole.roots[:number]), expr, where)
    if given.get("step", 1) != 1:
        yield Equation(whole, size, where)
    if operation(node)[0] == "select":
        chosen = given["index"] % size
        yield Equation(Positions(whole.roots[chosen : chosen + 1]), 1, where)
    if operation(node)[0] == "narrow":
        part = Positions(whole.roots[given["start"] : given["start"] + given["length"]])
        yield Equation(part, exprs("length")[0], where)  # type: ignore[operator]
