"""Integers that remember where they come from.

While a network is traced, ``x.shape`` and the integer attributes of its modules give a :class:`Size`. Arithmetic on it
is recorded, so that ``x.reshape(B, N, self.num_heads, C // self.num_heads)`` tells which of its numbers follow the
width of a tensor, which are read from an attribute, and which are written into the code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ._nodes import Node
from ._skeleton import parts_of
from ._words import names


@dataclass(frozen=True)
class Extent:
    """The size of axis ``dim`` of the tensor that ``node`` gives."""

    node: Node
    dim: int


@dataclass(frozen=True)
class Setting:
    """An integer attribute of the module at path ``module``, or entry ``index`` of a tuple or list of integers."""

    module: str
    name: str
    index: int | None = None


@dataclass(frozen=True)
class Derived:
    """``left operation right``; the operation is one of ``+ - * //``."""

    operation: str
    left: Expr
    right: Expr


Expr = int | Extent | Setting | Derived
"""Where a number comes from; a plain int is written into the code."""

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


def evaluate(expr: Expr, value_of: Callable[[Extent | Setting], int]) -> int:
    """The number ``expr`` stands for, given the sizes and attributes it is made of."""
    if isinstance(expr, int):
        return int(expr)
    if isinstance(expr, Derived):
        left, right = evaluate(expr.left, value_of), evaluate(expr.right, value_of)
        return _OPERATIONS[expr.operation](left, right) if right or expr.operation != "//" else 0
    return value_of(expr)


def leaves(expr: Expr) -> Iterator[Extent | Setting]:
    """The sizes and attributes ``expr`` is made of."""
    if isinstance(expr, Derived):
        yield from leaves(expr.left)
        yield from leaves(expr.right)
    elif not isinstance(expr, int):
        yield expr


class Size(int):
    """An integer with its origin; everything but ``+ - * //`` gives a plain number."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> Size:
        made = super().__new__(cls, value)
        made.expr = expr
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __add__(self, other: int) -> int:
        return _derive("+", self, other)

    def __radd__(self, other: int) -> int:
        return _derive("+", other, self)

    def __sub__(self, other: int) -> int:
        return _derive("-", self, other)

    def __rsub__(self, other: int) -> int:
        return _derive("-", other, self)

    def __mul__(self, other: SupportsIndex) -> Any:
        return _derive("*", self, other) if isinstance(other, int) else int(self) * other  # type: ignore[operator]

    def __rmul__(self, other: SupportsIndex) -> Any:
        return _derive("*", other, self) if isinstance(other, int) else other * int(self)  # type: ignore[operator]

    def __floordiv__(self, other: int) -> int:
        return _derive("//", self, other)

    def __rfloordiv__(self, other: int) -> int:
        return _derive("//", other, self)


def _derive(operation: str, left: Any, right: Any) -> int:
    if not isinstance(left, int) or not isinstance(right, int):
        return NotImplemented  # type: ignore[no-any-return]
    value = _OPERATIONS[operation](int(left), int(right))
    return Size(value, Derived(operation, origin(left), origin(right)))


def origin(number: int) -> Expr:
    """Where a number comes from, as far as it says so."""
    return number.expr if isinstance(number, Size) else int(number)


@contextmanager
def settings_marked(module: nn.Module) -> Iterator[None]:
    """Within the context, integer attributes of the user's own modules say where they come from.

    Of PyTorch's own layers only the widths that narrowing keeps up to date; the rules know the others.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for path, part in parts_of(module):
        ready_made = type(part).__module__.startswith("torch.nn.modules") and not isinstance(part, nn.Unflatten)
        for name, value in list(vars(part).items()):
            if name.startswith("_") or (ready_made and name not in _KEPT_UP_TO_DATE):
                continue
            marked = _marked(value, path, name)
            if marked is not None:
                changed.append((vars(part), name, value))
                vars(part)[name] = marked
    try:
        yield
    finally:
        for holder, name, value in changed:
            holder[name] = value


_KEPT_UP_TO_DATE = names("in_channels out_channels in_features out_features num_features num_channels embedding_dim")


def _marked(value: Any, path: str, name: str) -> Any:
    if type(value) is int and value > 0:
        return Size(value, Setting(path, name))
    if type(value) in (list, tuple, torch.Size) and value and all(type(v) is int for v in value):
        return type(value)([Size(v, Setting(path, name, i)) for i, v in enumerate(value)])
    return None


class SizesRemembered(TorchFunctionMode):
    """Hands out :class:`Size` for shapes, and keeps the origins of the numbers given to the function that runs.

    Attributes:
        given: every integer among the arguments of the function that runs, in order.
    """

    def __init__(self, node_of: Callable[[torch.Tensor], Node | None]) -> None:
        super().__init__()
        self.node_of = node_of
        self.given: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("size", "numel", "nelement", "__len__") or func == _SHAPE:
            return self._measured(name, func, args, kwargs)
        before, self.given = self.given, list(_integers((args, kwargs)))
        try:
            return func(*args, **kwargs)
        finally:
            self.given = before

    def _measured(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        found, node = func(*args, **kwargs), self.node_of(args[0])
        if node is None:
            return found
        if isinstance(found, torch.Size):
            return torch.Size([Size(n, Extent(node, dim)) for dim, n in enumerate(found)])
        if name == "__len__":
            return Size(found, Extent(node, 0))
        if name == "size":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return Size(found, Extent(node, int(dim) % args[0].dim()))
        sizes = [Size(n, Extent(node, dim)) for dim, n in enumerate(args[0].shape)]
        return math.prod(sizes[1:], start=sizes[0]) if sizes else found


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _integers(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _integers(entry)
    elif isinstance(value, slice):
        yield from _integers((value.start, value.stop, value.step))
