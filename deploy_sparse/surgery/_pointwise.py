"""The rule of elementwise operations: operands that hold channels side by side are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._axes import Ledger
from ._meet import meet
from ._nodes import Node, map_nodes
from ._values import Value, compressed, lean, unknown_constant, untracked, varying
from .trace import arguments, operation, place

_TAGLESS = "hardswish log_sigmoid rsub multiply true_divide subtract where masked_fill divide negative"
POINTWISE_TOO = frozenset(_TAGLESS.split())
"""Elementwise operations without torch's tag for them."""

_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "true_divide", "divide"})
_LINEAR = _PRODUCTS | _QUOTIENTS | {"neg", "negative"}
_SUMS = frozenset({"add", "sub", "rsub", "subtract"})


def pointwise(ledger: Ledger, node: Node) -> Value:
    """Elementwise operations. Operands that hold channels side by side are joined; 0 times anything is 0."""
    shape = node.meta["val"].shape
    sources = _sources(node)
    operands = [ledger.value(n) for n in sources]
    constant = _constant_of(ledger, node, operands, shape)
    tracked = [(i, v) for i, v in enumerate(operands) if v.tracked]
    if not tracked:
        why = next((v.why for v in operands if v.why), "values without channels")
        state = bool(operands) and all(v.state for v in operands)
        return Value(untracked(shape, why).atoms, constant, why=why, state=state and len(operands) == 1)
    first, main = max(tracked, key=lambda iv: (len(varying(iv[1].atoms.expand(shape))), not iv[1].state))
    laid = Value(main.atoms.expand(shape), main.constant.expand(shape), main.producer, main.why)
    zero = lean(laid.constant) == 0 if operation(node)[0] in _PRODUCTS else None
    for i, (source, value) in enumerate(zip(sources, operands, strict=True)):
        if i != first:
            meet(ledger, node, laid, value, source, zero)
    feeders = {v.producer for v in operands if v.tracked and not v.state}
    producer = feeders.pop() if len(feeders) == 1 else None
    why = next((v.why for v in operands if v.why), "")
    scaled = main.scales_with if len(tracked) == 1 and operation(node)[0] in _LINEAR and first == 0 else None
    return Value(laid.atoms, constant, producer, why, scales_with=scaled)


def _constant_of(ledger: Ledger, node: Node, operands: Sequence[Value], shape: torch.Size) -> torch.Tensor:
    """The operation applied to the constants; truth values are 0 and 1."""
    nodes = _sources(node)
    name, _ = operation(node)
    if not _reckoned(node.meta["val"].dtype) or any(n.meta["val"].is_complex() for n in nodes):
        result = unknown_constant(shape)
    elif name in ("where", "masked_fill"):
        result = _chosen(ledger, node)
    else:
        result = _applied(node, {n: lean(v.constant) for n, v in zip(nodes, operands, strict=True)})
    _note_losses(ledger, node, operands, result)
    return compressed(result.expand(shape))


def _applied(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    hidden = torch.zeros((), dtype=torch.bool)
    for constant in known.values():
        hidden = hidden | constant.isnan()
    name, function = operation(node)
    if name in _PRODUCTS:  # 0 times anything is 0
        for constant in known.values():
            hidden = hidden & (constant != 0)
    if name in _QUOTIENTS and isinstance(node.args[0], Node):  # so is 0 divided by anything
        hidden = hidden & (known[node.args[0]] != 0)
    if bool(hidden.all()):
        return torch.full(hidden.shape, torch.nan, dtype=torch.float64)

    def number(source: Node) -> torch.Tensor:
        filled = known[source].nan_to_num(nan=1.0)
        return filled.bool() if source.meta["val"].dtype == torch.bool else filled

    given = {key: value for key, value in node.kwargs.items() if key not in ("memory_format", "out")}
    args, kwargs = map_nodes((node.args, given), number)
    if "out" in node.kwargs:
        function = node.target.overloadpacket
    result = function(*args, **kwargs).to(torch.float64)
    return torch.where(hidden, torch.nan, result)


def _sources(node: Node) -> list[Node]:
    """What the operation reads; the tensor it is to write into holds nothing yet."""
    return [source for source in node.all_input_nodes if source is not node.kwargs.get("out")]


def _chosen(ledger: Ledger, node: Node) -> torch.Tensor:
    """``torch.where``: the branch a known condition takes, or the value both branches share."""
    given = arguments(node)
    branches = ("mask", "value", "self") if "mask" in given else ("condition", "self", "other")
    which, yes, no = (
        lean(ledger.value(x).constant) if isinstance(x, Node) else torch.tensor(float(x), dtype=torch.float64)
        for x in (given[name] for name in branches)
    )
    either = torch.where(yes == no, yes, torch.nan)
    return torch.where(which.isnan(), either, torch.where(which != 0, yes, no))


def _note_losses(ledger: Ledger, node: Node, operands: Sequence[Value], result: torch.Tensor) -> None:
    """Constants that meet values which depend on the input; in a sum those are a reason for the channel in itself."""
    if node.meta["val"].dtype == torch.bool:
        return  # a condition: the constant itself goes on beside it
    sums = operation(node)[0] in _SUMS
    for value in operands:
        if not value.tracked:
            continue
        before = lean(value.constant)
        for other in operands if sums else ():
            if other is not value and other.tracked:
                before = torch.where(lean(other.constant).isnan(), torch.nan, before)
        ledger.lose(value.atoms, before, result, f"would meet values that depend on the input in {place(node)}")


def _reckoned(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype == torch.bool
