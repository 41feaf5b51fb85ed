"""Which channels nobody needs, judged from the weights and not from how the masks were made.

A channel may go when every layer that reads it reads the constant zero, or ignores it, or can take up the constant it
reads in a bias. That last way is exact only where the layer pads nothing: behind zero padding a constant is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch

from ._axes import Ledger, Read
from .parts import Fold


@dataclass(frozen=True)
class Liveness:
    """Channels by smallest joined atom.

    Attributes:
        needed: some layer reads values that depend on the input.
        leaks: nobody needs it, yet it cannot go: the reason.
    """

    needed: Set[int]
    leaks: Mapping[int, str]


def liveness(ledger: Ledger) -> Liveness:
    """Judge every channel by all the layers that read it."""
    needed: set[int] = set()
    leaks: dict[int, str] = {}
    for read in ledger.reads:
        roots = ledger.atoms.roots(read.atoms)  # [columns]
        used = (roots >= 0) & ~read.ignored
        constant = ~read.constant.isnan()
        needed.update(roots[used & ~constant & ~read.uneven].tolist())
        for column in (used & (read.uneven | (constant & (read.constant != 0)))).nonzero().flatten().tolist():
            why = _leak(read, column)
            if why:
                leaks.setdefault(int(roots[column]), why)
    return Liveness(needed, {root: why for root, why in leaks.items() if root not in needed})


def fold(ledger: Ledger, removed: Set[int]) -> dict[Fold, torch.Tensor]:
    """What the biases gain when the channels in ``removed`` go: ``Σ_i W[:, i] · c_i``, float64 ``[rows]``."""
    folds: dict[Fold, torch.Tensor] = {}
    for read in ledger.reads:
        gone = torch.tensor([root in removed for root in ledger.atoms.roots(read.atoms).tolist()], dtype=torch.bool)
        carried = gone & ~read.ignored & (read.constant != 0)
        if read.bias is None or not bool(carried.any()):
            continue
        weight = ledger.traced.tensors[read.weight].cpu()[:, carried].to(torch.float64)
        taps = weight.reshape(*weight.shape[:2], -1).sum(dim=2)  # [rows, carried columns]
        created = read.bias not in ledger.traced.tensors
        entry = Fold(read.weight, read.bias, created, int(carried.sum()))
        folds[entry] = taps @ read.constant[carried]
    return folds


def _leak(read: Read, column: int) -> str:
    constant = float(read.constant[column])
    if bool(read.uneven[column]):
        return f"its constant changes from place to place before layer {read.layer!r}"
    if read.padded:
        return f"constant {constant:.3g} would leak through the zero padding of layer {read.layer!r}"
    if read.bias is None:
        return f"constant {constant:.3g} cannot be folded into layer {read.layer!r}: {read.no_fold}"
    return ""
