"""Two tensors that meet element by element: whose channels are joined, and whose stay."""

from __future__ import annotations

import torch

from ._axes import Ledger, Mixing
from ._claims import claim, fix_claims
from ._nodes import Node
from ._values import Value, lean, varying
from .trace import place


def meet(
    ledger: Ledger,
    node: Node,
    main: Value,
    other: Value,
    other_node: Node,
    harmless: torch.Tensor | None = None,
) -> None:
    """Tie the channels of ``other`` to those of ``main``, which has channels along all axes that ``other`` has.

    Args:
        ledger: is told.
        node: the operation at which they meet.
        main: decides which channels the result has; its shape is the result's.
        other: broadcastable to it.
        other_node: where ``other`` comes from.
        harmless: where the result is zero whatever ``other`` is, broadcastable to ``main``.
    """
    shape = main.shape
    axes = varying(main.atoms)
    if other.atoms.numel() == 1 and not other.tracked:
        return
    atoms = other.atoms.expand(shape)
    extent = {d for d in axes if _extends(other_node.meta["val"], d, shape)}
    own = set(varying(atoms)) if other.tracked else set()
    if not own:
        if other.tracked:
            ledger.pin(other, f"one value serves many channels at {place(node)}")
        if extent:
            _meet_untracked(ledger, node, main, other, other_node, extent)
        return
    if not own <= set(axes):
        for value in (main, other):
            ledger.pin(value, f"channels of two tensors lie along different axes at {place(node)}")
    elif own == set(axes):
        ledger.atoms.unify(main.atoms, atoms, f"channels meet {other.why or main.why} at {place(node)}")
    else:
        if extent - own:
            ledger.fix(main, extent - own, f"channels meet {other.why or 'values without channels'} at {place(node)}")
        shared = sorted(own)
        source, target = lean(atoms), lean(main.atoms)
        ledger.link([target, source], shared)
        zero = torch.zeros((), dtype=torch.bool) if harmless is None else harmless
        ledger.mixings.append(Mixing(source, target, zero, place(node)))


def _meet_untracked(ledger: Ledger, node: Node, main: Value, other: Value, other_node: Node, extent: set[int]) -> None:
    axes, rank = varying(main.atoms), len(main.shape)
    why = f"channels meet {other.why or main.why} at {place(node)}"
    if other.state and len(extent) == 1:
        (dim,) = extent
        labels = lean(main.atoms)
        if len(axes) > 1:  # positions along this axis, whatever the others do
            spread = labels
            labels = ledger.atoms.fresh(main.shape[dim]).reshape([-1 if d == dim else 1 for d in range(rank)])
            ledger.link([spread, labels], [dim])
            ledger.mixings.append(Mixing(labels, spread, torch.zeros((), dtype=torch.bool), place(node)))
        wanted = labels[tuple(0 if d < rank - len(other.shape) else slice(None) for d in range(rank))]
        if claim(ledger, other_node, wanted, node):
            return
    if other.state:
        fix_claims(ledger, other_node, other, why)
    ledger.fix(main, extent, why)


def _extends(tensor: torch.Tensor, dim: int, shape: torch.Size) -> bool:
    """Whether ``tensor`` holds a number for each position along ``dim``, instead of one for all."""
    own = dim - (len(shape) - tensor.dim())
    return own >= 0 and shape[dim] > 1 and tensor.shape[own] > 1 and tensor.stride(own) != 0
