"""Numbers in the code that follow a width, as attention's ``head_size ** -0.5``: rows of a weight make up for them."""

from __future__ import annotations

from dataclasses import dataclass

from ._axes import Ledger
from ._nodes import Node
from ._values import Value, lean
from .trace import arguments, is_pick, operation, place

_TIMES = frozenset({"mul", "multiply"})
_OVER = frozenset({"div", "true_divide", "divide"})


@dataclass(frozen=True)
class ScalableRows:
    """Rows of ``weight`` (and of its bias) that nothing but one tensor is made of."""

    weight: str
    bias: str | None
    rows: tuple[int, ...]


def scalable(ledger: Ledger, node: Node) -> ScalableRows | None:
    """The rows which, multiplied by a number, multiply ``node`` by it and change nothing else."""
    value = ledger.values.get(node)
    if not isinstance(value, Value) or value.scales_with is None:
        return None
    written = ledger.axes.get((value.scales_with, 0))
    own = set(lean(value.atoms).reshape(-1).tolist())
    if written is None or written.atoms.dim() > 1:
        return None
    rows = tuple(i for i, atom in enumerate(written.atoms.tolist()) if atom in own)
    if len(rows) != len(own) or not _alone(ledger, node, own, value.scales_with):
        return None
    return ScalableRows(value.scales_with, ledger.biases.get(value.scales_with), rows)


def factor(node: Node, dense: float, compact: float) -> float | None:
    """By how much the tensor of ``node`` must grow to undo that its number changed from ``dense`` to ``compact``."""
    name, _ = operation(node)
    if len(node.args) != 2 or not isinstance(node.args[0], Node) or not dense or not compact:
        return None
    return dense / compact if name in _TIMES else compact / dense if name in _OVER else None


def fix_unscalable(ledger: Ledger) -> None:
    """Attention without a scale divides by the root of the head size, which stays where nothing can make up for it."""
    for node in ledger.divided:
        if scalable(ledger, node.args[0]) is None:
            query = ledger.value(arguments(node)["query"])
            ledger.fix(query, {len(query.shape) - 1}, f"{place(node)} divides by the root of the head size")


def _alone(ledger: Ledger, node: Node, own: set[int], weight: str) -> bool:
    """Whether the channels ``own`` reach nothing on the way from their layer to ``node`` but ``node``."""
    if ledger.uses(node) > 1:
        return False
    while node.all_input_nodes and not _is_layer(ledger, node, weight):
        source = node.all_input_nodes[0]
        for user in ledger.users[source]:
            if user is not node and own & _channels(ledger, user):
                return False
        node = source
    return True


def _channels(ledger: Ledger, node: Node) -> set[int]:
    known = ledger.values.get(node)
    parts = known if isinstance(known, tuple) else (known,)
    return {atom for part in parts if part is not None for atom in lean(part.atoms).reshape(-1).tolist()}


def _is_layer(ledger: Ledger, node: Node, weight: str) -> bool:
    if is_pick(node):
        return False
    return any(ledger.is_state(n) and ledger.name(n) == weight for n in node.all_input_nodes)
