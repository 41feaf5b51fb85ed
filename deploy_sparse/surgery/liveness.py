"""Which channels nobody needs, judged from the weights and not from how the masks were made.

A channel may go when every layer that reads it reads the constant zero, or ignores it, or can take up the constant it
reads in a bias. That last way is exact only where the layer pads nothing: behind zero padding a constant is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch

from ._axes import Leak, Ledger, Read
from ._layer_rules import leaks_through
from .parts import Fold


@dataclass(frozen=True)
class Liveness:
    """Channels by smallest joined atom.

    Attributes:
        needed: some layer reads values that depend on the input.
        leaks: a layer writes nothing but a constant into it, yet it cannot go: the reason.
    """

    needed: Set[int]
    leaks: Mapping[int, Leak]


def liveness(ledger: Ledger) -> Liveness:
    """Judge every channel by all the layers that read it."""
    needed: dict[int, str] = {}  # the layer that reads it first
    leaks: dict[int, Leak] = {}
    for read in ledger.reads:
        roots = ledger.atoms.roots(read.atoms)  # [columns]
        used = (roots >= 0) & ~read.ignored
        constant = ~read.constant.isnan()
        for root in roots[used & ~constant & ~read.uneven].tolist():
            needed.setdefault(root, read.layer)
        for column in (used & (read.uneven | (constant & (read.constant != 0)))).nonzero().flatten().tolist():
            leak = _leak(read, column)
            if leak is not None:
                leaks.setdefault(int(roots[column]), leak)
    leaks = {root: leak for root, leak in leaks.items() if root not in needed}
    return Liveness(needed.keys(), leaks | _lost(ledger, needed))


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


def _lost(ledger: Ledger, needed: Mapping[int, str]) -> dict[int, Leak]:
    """Needed channels into which some layer writes a constant that turns into something unknown on its way."""
    constant: dict[int, list[bool]] = {}  # one entry for each row that writes the channel
    for rows, known in ledger.written:
        for root, is_known in zip(ledger.atoms.roots(rows).tolist(), known.tolist(), strict=True):
            constant.setdefault(root, []).append(is_known)
    reasons: dict[int, Leak] = {}
    for atom, leak in ledger.lost.items():
        reasons.setdefault(ledger.atoms.find(atom), leak)
    lost: dict[int, Leak] = {}
    for root, layer in needed.items():
        if root in reasons and any(constant.get(root, ())):
            lost[root] = reasons[root]
        elif all(constant.get(root, (False,))):
            lost[root] = Leak(f"is no longer known before layer {layer!r}", torch.nan)
    return lost


def _leak(read: Read, column: int) -> Leak | None:
    constant = float(read.constant[column])
    if bool(read.uneven[column]):
        return Leak(f"changes from place to place before layer {read.layer!r}", torch.nan)
    if read.padded:
        return Leak(leaks_through(read.layer), constant)
    if read.bias is None:
        return Leak(f"cannot be folded into layer {read.layer!r}: {read.no_fold}", constant)
    return None
