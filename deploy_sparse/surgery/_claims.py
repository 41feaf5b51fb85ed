"""Parameters that a network uses outside its layers: position embeddings, bias tables, tokens, rows of a weight.

Where such a tensor spans several axes, which of them holds channels shows only when it meets an activation. Then its
elements are followed back through the reshapes and look-ups in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ._axes import Ledger
from ._nodes import Node, map_nodes
from ._values import Value, compressed, lean, varying
from ._words import names
from .trace import operation, place

_FOLLOWED = names(
    "view reshape _unsafe_view flatten unflatten expand permute transpose t unsqueeze squeeze select "
    "slice split split_with_sizes chunk unbind narrow contiguous clone alias detach to _to_copy "
    "index index_select repeat flip roll movedim swapaxes getitem lift_fresh type_as expand_as "
    "view_as reshape_as"
)
_SEARCHED = 1 << 24  # elements


@dataclass(frozen=True)
class RowSlice:
    """Rows ``start`` to ``stop`` of the parameter that ``node`` stands for."""

    node: Node
    start: int
    stop: int


def slice_of(ledger: Ledger, node: Node) -> RowSlice | None:
    """The rows of a parameter that ``node`` is, if it is nothing else."""
    found = labels(ledger, node)
    if found is None:
        return None
    source, flat = found
    shape = ledger.traced.tensors[ledger.name(source)].shape
    if flat.dim() != len(shape) or flat.shape[1:] != shape[1:] or not flat.numel():
        return None
    width = flat[0].numel()
    start = int(flat.reshape(-1)[0])
    if start % width or not torch.equal(flat.reshape(-1), torch.arange(start, start + flat.numel())):
        return None
    return RowSlice(source, start // width, start // width + flat.shape[0])


def labels(ledger: Ledger, node: Node) -> tuple[Node, torch.Tensor] | None:
    """The parameter that ``node`` shows, and for each element of ``node`` its position in the flattened parameter.

    None where the tensor is computed from anything else.
    """
    if ledger.is_state(node):
        count = node.meta["val"].numel()
        return (node, torch.arange(count).reshape(node.meta["val"].shape)) if count <= _SEARCHED else None
    if node.op != "call_function":
        return None
    name, target = operation(node)
    if name not in _FOLLOWED:
        return None
    sources = [n for n in node.all_input_nodes if n.name not in ledger.traced.constants]
    if name in ("expand_as", "view_as", "reshape_as", "type_as"):
        sources = sources[:1]
    if len(sources) != 1 or (found := labels(ledger, sources[0])) is None:
        return None
    origin, flat = found
    if name == "getitem":
        return origin, flat[node.args[1]]
    if name in ("contiguous", "clone", "alias", "detach", "to", "_to_copy", "lift_fresh", "type_as"):
        return found

    def held(source: Node) -> torch.Tensor:
        return flat if source is sources[0] else ledger.traced.constants[source.name]

    function = torch.ops.aten.reshape.default if name in ("view", "_unsafe_view") else target
    if name in ("expand_as", "view_as", "reshape_as"):
        shape = list(node.meta["val"].shape)
        return origin, flat.expand(shape) if name == "expand_as" else flat.reshape(shape)
    made = function(*map_nodes(node.args, held), **map_nodes(node.kwargs, held))
    return origin, made


def claim(ledger: Ledger, node: Node, wanted: torch.Tensor, where: Node) -> bool:
    """Give the parameter shown by ``node`` the channels ``wanted``, which it meets element by element.

    Args:
        ledger: takes the parameter's axis up.
        node: a tensor made from one parameter by moving elements only.
        wanted: atoms, broadcastable with the shape of ``node`` from the right; varying along one axis.
        where: the operation at which they meet, for messages.

    Returns:
        whether an axis of the parameter could be told to hold these channels.
    """
    found = labels(ledger, node)
    if found is None:
        return False
    source, flat = found
    shape = ledger.traced.tensors[ledger.name(source)].shape
    rank = max(flat.dim(), wanted.dim())
    flat = flat.reshape((1,) * (rank - flat.dim()) + tuple(flat.shape))
    axes = [d + rank - wanted.dim() for d in varying(wanted)]
    if len(axes) != 1 or flat.shape[axes[0]] != wanted.shape[axes[0] - rank]:
        return False
    vector = lean(wanted).reshape(-1)
    stride = 1
    for dim in reversed(range(len(shape))):
        along = compressed((flat // stride) % shape[dim])
        stride *= shape[dim]
        if varying(along) != (axes[0],):
            continue
        positions = lean(along).reshape(-1)  # [channels met]
        known = ledger.axes.get((ledger.name(source), dim))
        own = known.atoms if known is not None else ledger.atoms.fresh(shape[dim])
        ledger.enter(ledger.name(source), dim, own, "shared" if _trained(ledger, source) else "statistics")
        ledger.atoms.unify(own[positions], vector, f"parameter {ledger.name(source)!r} meets them at {place(where)}")
        return True
    return False


def shown_positions(ledger: Ledger, node: Node, dim: int) -> np.ndarray | None:
    """The channels (smallest joined atoms) along axis ``dim`` of a parameter that ``node`` shows, ``[positions, 1]``.

    None where no channels lie along that axis.
    """
    found = labels(ledger, node)
    if found is None or not isinstance(found[1], torch.Tensor):
        return None
    source, flat = found
    stride, shape = 1, ledger.traced.tensors[ledger.name(source)].shape
    for own in reversed(range(len(shape))):
        along = compressed((flat // stride) % shape[own])
        stride *= shape[own]
        axis = ledger.axes.get((ledger.name(source), own))
        if axis is not None and axis.atoms.dim() == 1 and varying(along) == (dim,):
            positions = lean(along).reshape(-1)
            return ledger.atoms.roots(axis.atoms)[positions].numpy()[:, None]
    return None


def fix_claims(ledger: Ledger, node: Node, value: Value, why: str) -> None:
    """What a parameter shown by ``node`` would need to lose cannot be told; its tracked axes stay."""
    ledger.pin(value, why)
    if (found := labels(ledger, node)) is not None:
        name = ledger.name(found[0])
        ledger.reshaped_state.setdefault(name, why)


def _trained(ledger: Ledger, node: Node) -> bool:
    return ledger.name(node) in ledger.traced.parameters
