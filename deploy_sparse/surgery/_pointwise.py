"""The rule of elementwise operations: operands that hold channels side by side are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node, map_arg

from ._axes import Ledger
from ._values import Value, compressed, lean, unknown_constant, untracked, varying
from .trace import arguments, operation, place

_TAGLESS = "hardswish log_sigmoid rsub multiply true_divide subtract where"
POINTWISE_TOO = frozenset(_TAGLESS.split())
"""Elementwise operations without torch's tag for them."""

_PRODUCTS = frozenset({"mul", "multiply"})
_SUMS = frozenset({"add", "sub", "rsub", "subtract"})


def pointwise(ledger: Ledger, node: Node) -> Value:
    """Elementwise operations. Operands that hold channels side by side are joined; 0 times anything is 0."""
    shape = node.meta["val"].shape
    operands = [ledger.value(n) for n in node.all_input_nodes]
    whole = [v.atoms.expand(shape) for v in operands]
    axes = {d for atoms in whole for d in varying(atoms)}
    joined: list[tuple[Value, torch.Tensor]] = []
    for value, atoms in zip(operands, whole, strict=True):
        if len(value.shape) == 0 or (value.atoms.numel() == 1 and not value.tracked):
            continue
        if any(_is_broadcast(value, d, shape) for d in axes):
            ledger.pin(value, f"one value serves many channels at {place(node)}")
        else:
            joined.append((value, atoms))
    constant = _constant_of(ledger, node, operands, shape)
    tracked = [(v, a) for v, a in joined if v.tracked]
    if not tracked:
        why = next((v.why for v in operands if v.why), "values without channels")
        return untracked(shape, why, constant)
    atoms = tracked[0][1]
    for value, other in joined:
        ledger.atoms.unify(atoms, other, f"channels meet {value.why or _whys(joined)} at {place(node)}")
        small = torch.where(lean(atoms) < 0, lean(other), lean(atoms))
        atoms = compressed(small.expand(shape))
    feeders = {v.producer for v, _ in joined if not v.state}
    producer = feeders.pop() if len(feeders) == 1 else None
    return Value(atoms, constant, producer, next((v.why for v, _ in joined if v.why), ""))


def _constant_of(ledger: Ledger, node: Node, operands: Sequence[Value], shape: torch.Size) -> torch.Tensor:
    """The operation applied to the constants; truth values are 0 and 1."""
    nodes = node.all_input_nodes
    if not all(_reckoned(n.meta["val"].dtype) for n in (node, *nodes)):
        result = unknown_constant(shape)
    elif operation(node)[0] == "where":
        result = _chosen(ledger, node)
    else:
        result = _applied(node, {n: lean(v.constant) for n, v in zip(nodes, operands, strict=True)})
    _note_losses(ledger, node, operands, result)
    return compressed(result.expand(shape))


def _applied(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    def number(source: Node) -> torch.Tensor:
        filled = known[source].nan_to_num()
        return filled.bool() if source.meta["val"].dtype == torch.bool else filled

    args, kwargs = map_arg((node.args, node.kwargs), number)
    name, function = operation(node)
    result = function(*args, **{k: v for k, v in kwargs.items() if k != "memory_format"}).to(torch.float64)
    hidden = torch.zeros((), dtype=torch.bool)
    for constant in known.values():
        hidden = hidden | constant.isnan()
    if name in _PRODUCTS:  # 0 times anything is 0
        for constant in known.values():
            hidden = hidden & (constant != 0)
    return torch.where(hidden, torch.nan, result)


def _chosen(ledger: Ledger, node: Node) -> torch.Tensor:
    """``torch.where``: the branch a known condition takes, or the value both branches share."""
    given = arguments(node)
    which, yes, no = (
        lean(ledger.value(x).constant) if isinstance(x, Node) else torch.tensor(float(x), dtype=torch.float64)
        for x in (given["condition"], given["self"], given["other"])
    )
    either = torch.where(yes == no, yes, torch.nan)
    return torch.where(which.isnan(), either, torch.where(which != 0, yes, no))


def _note_losses(ledger: Ledger, node: Node, operands: Sequence[Value], result: torch.Tensor) -> None:
    """Constants that meet values which depend on the input; in a sum those are a reason for the channel in itself."""
    if node.meta["val"].dtype == torch.bool:
        return  # a condition: the constant itself goes on beside it
    sums = operation(node)[0] in _SUMS
    for value in operands:
        before = lean(value.constant)
        for other in operands if sums else ():
            if other is not value and other.tracked:
                before = torch.where(lean(other.constant).isnan(), torch.nan, before)
        if value.tracked:
            ledger.lose(value.atoms, before, result, f"would meet values that depend on the input in {place(node)}")


def _reckoned(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype == torch.bool


def _is_broadcast(value: Value, dim: int, shape: torch.Size) -> bool:
    own = dim - (len(shape) - len(value.shape))
    return own < 0 or (value.shape[own] == 1 and shape[dim] > 1)


def _whys(joined: Sequence[tuple[Value, torch.Tensor]]) -> str:
    return next((v.why for v, _ in joined if v.why), "values without channels")
