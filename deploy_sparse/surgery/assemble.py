"""From a choice of channels to the shape of the narrowed network and the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ._axes import Ledger, NormUse, Read
from ._weights import contribution, matrices
from .choose import Choice
from .layers import spreadable
from .liveness import folds as can_fold
from .narrow import pick
from .parts import Attribute, Blueprint, Carry, Cut, Fold, KeptNorm, Rescale, Spread
from .trace import weightlike


@dataclass(frozen=True)
class Assembly:
    """The shape of the narrowed network, and what its tensors gain.

    Attributes:
        shape: what changes.
        carries: columns that take up constants.
        rescales: rows that are multiplied.
        tensors: dense tensors by name, masked.
        gains: by bias: what is added to it, float64, dense rows.
        columns: by weight: the read and, by column that carries: the columns it takes up.
        norms: by replaced norm: mean and variance of the constants that went, float64 ``[groups]``.
    """

    shape: Blueprint
    carries: tuple[Carry, ...]
    rescales: tuple[Rescale, ...]
    tensors: Mapping[str, torch.Tensor]
    gains: Mapping[str, torch.Tensor]
    columns: Mapping[str, tuple[Read, dict[int, list[int]]]]
    norms: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rounded(self) -> bool:
        """Whether numbers were reckoned anew, and so may be rounded."""
        counted = any(bool((x != 0).any()) for pair in self.norms.values() for x in pair)
        return bool(self.gains or self.columns or self.rescales or counted)

    @cached_property
    def _cuts(self) -> dict[str, list[Cut]]:
        found: dict[str, list[Cut]] = {}
        for cut in self.shape.cuts:
            found.setdefault(cut.name, []).append(cut)
        return found

    def tensor(self, name: str, own: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The final content of parameter or buffer ``name``; ``own`` stands in where the ticket has none.

        ``dtype`` replaces the precision of floating tensors. The result shares no memory with the dense one.
        """
        owner, _, attribute = name.rpartition(".")
        if owner in self.norms and attribute in ("gone_mean", "gone_var"):
            return self.norms[owner][attribute == "gone_var"].to(own.device, dtype or own.dtype)
        dense = self.tensors.get(name, own)
        kind = dense.dtype if dtype is None or not dense.is_floating_point() else dtype
        changed = dense
        if name in self.gains:
            start = dense.new_zeros(len(self.gains[name])) if dense.numel() == 0 else dense
            changed = start.double() + self.gains[name].to(dense.device)
        if name in self.columns:
            changed = self._carried(dense.to(kind), *self.columns[name])
        for rescale in self.rescales:
            created = any(fold.weight == rescale.weight and fold.bias == name for fold in self.shape.folds)
            if name in (rescale.weight, rescale.bias) or created:
                changed = changed.double().clone()
                changed[list(rescale.rows)] *= rescale.factor
        smaller = pick(changed, self._cuts.get(name, ())).to(kind)
        return smaller.clone() if smaller.data_ptr() == dense.data_ptr() else smaller

    def shell(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """The tensor's shape without memory, or its content where networks decide by it."""
        dense = self.tensors.get(name, own)
        chosen = own if weightlike(dense) else dense
        if name in self.gains and not own.numel():  # a bias that there was none of
            chosen = torch.empty(len(self.gains[name]), dtype=own.dtype, device="meta")
        return pick(chosen, self._cuts.get(name, ()))

    @staticmethod
    def _carried(weight: torch.Tensor, read: Read, taken: dict[int, list[int]]) -> torch.Tensor:
        made = weight.clone()
        blocks = matrices(made, read.groups, read.transposed)  # [groups, rows, columns, taps], a view of ``made``
        width = blocks.shape[2]
        for carrier, columns in taken.items():
            group, at = divmod(carrier, width)
            share = (read.constant[columns] / read.constant[carrier]).to(weight.device)
            picked = blocks[group][:, [c % width for c in columns]].double()  # [rows, columns that go, taps]
            blocks[group][:, at] = blocks[group][:, at].double() + torch.einsum(
                "rct,c->rt", picked, share
            )  # rounds once
        return made


def assemble(
    ledger: Ledger,
    choice: Choice,
    tensors: Mapping[str, torch.Tensor],
    attention: tuple[str, ...],
    *,
    spread: bool = False,
) -> Assembly:
    """Collect everything that follows from the choice.

    Args:
        tensors: dense tensors by name, masked.
        attention: paths of attention without fixed sizes, in place of ``nn.MultiheadAttention``.
        spread: let layers leave out rows of zeros in channels that others keep alive.
    """
    removed = choice.removed
    folds, gains = _folds(ledger, removed, tensors)
    cuts = _cuts(ledger, removed, folds)
    spreads: tuple[Spread, ...] = ()
    if spread:
        cuts, spreads = _spreads(ledger, removed, cuts, {fold.bias for fold in folds})
    norms, statistics = _norms(ledger, removed)
    replaced = {norm.module for norm in norms}
    module = ledger.module
    attributes = []
    for setting, value in choice.settings.items():
        found = getattr(module.get_submodule(setting.module), setting.name)
        dense = int(found if setting.index is None else found[setting.index])
        if dense != value and setting.module not in replaced:
            attributes.append(Attribute(setting.module, setting.name, setting.index, dense, value))
    touched = {cut.name.rpartition(".")[0] for cut in cuts} | {a.module for a in attributes}
    opened = tuple(path for path in attention if any(t == path or t.startswith(f"{path}.") for t in touched))
    shape = Blueprint(cuts, folds, tuple(attributes), norms, opened, spreads)
    carries = tuple(
        Carry(read.weight, column, len(columns)) for read, taken in choice.carriers for column, columns in taken.items()
    )
    columns = {read.weight: (read, taken) for read, taken in choice.carriers}
    return Assembly(shape, carries, (), tensors, gains, columns, statistics)


def _spreads(
    ledger: Ledger, removed: np.ndarray, cuts: tuple[Cut, ...], folded: Set[str]
) -> tuple[tuple[Cut, ...], tuple[Spread, ...]]:
    """Cut rows of zeros out of layers that write into shortcuts; one of each constant stays to be looked up."""
    found, known = [], {(cut.name, cut.dim): cut for cut in cuts}
    for read in ledger.reads:
        path, _, attribute = read.weight.rpartition(".")
        layer = ledger.module.get_submodule(path)
        if attribute != "weight" or read.groups > 1 or not read.alone or not spreadable(layer):
            continue
        bias = getattr(layer, "bias", None)
        shifts = torch.zeros(len(read.rows)) if bias is None else ledger.traced.tensors[f"{path}.bias"].cpu()
        first: dict[float, int] = {}  # a row of zeros by the number that it gives
        kept: list[int] = []
        places = []
        for row in np.flatnonzero(~_gone(ledger, read.rows, removed)).tolist():
            same = first.get(float(shifts[row])) if read.silent_rows[row] else None
            if same is None:
                same = len(kept)
                kept.append(row)
                if read.silent_rows[row]:
                    first[float(shifts[row])] = same
            places.append(same)
        if len(kept) < len(places):
            found.append(Spread(path, tuple(places)))
            for name in (read.weight, f"{path}.bias")[: 1 + (bias is not None or f"{path}.bias" in folded)]:
                known[name, 0] = Cut(name, 0, len(read.rows), tuple(kept))
    return tuple(known.values()), tuple(found)


def _folds(
    ledger: Ledger, removed: np.ndarray, tensors: Mapping[str, torch.Tensor]
) -> tuple[tuple[Fold, ...], dict[str, torch.Tensor]]:
    """What the biases gain when channels go: ``Σ_i W[:, i] · c_i``."""
    found, gains = [], {}
    for read in ledger.reads:
        if not can_fold(read):
            continue
        assert read.bias is not None
        gone = torch.from_numpy(_gone(ledger, read.atoms, removed))
        carried = gone & ~read.ignored & (read.constant.nan_to_num() != 0)
        if not bool(carried.any()):
            continue
        weight = tensors[read.weight].cpu()
        constant = torch.where(carried, read.constant.nan_to_num(), 0.0)
        stay = ~torch.from_numpy(_gone(ledger, read.rows, removed))
        gain = contribution(weight, read.groups, read.transposed, read.part, constant, stay)
        if not bool((gain != 0).any()):
            continue
        found.append(Fold(read.weight, read.bias, read.bias not in ledger.traced.tensors, int(carried.sum())))
        gains[read.bias] = gain
    return tuple(found), gains


def _cuts(ledger: Ledger, removed: np.ndarray, folds: tuple[Fold, ...]) -> tuple[Cut, ...]:
    """The positions that stay along every tensor axis that loses some, biases that folding creates included."""
    cuts: dict[tuple[str, int], Cut] = {}
    for axis in ledger.axes.values():
        gone = np.atleast_2d(_among(ledger.roots_of(axis), removed)).min(axis=0)
        if gone.any():
            cuts[axis.name, axis.dim] = Cut(axis.name, axis.dim, len(gone), tuple(np.flatnonzero(~gone).tolist()))
    for entry in folds:
        rows = cuts.get((entry.weight, 0))
        if entry.created and rows is not None:
            cuts[entry.bias, 0] = Cut(entry.bias, 0, rows.size, rows.kept)
    return tuple(cuts.values())


def _norms(
    ledger: Ledger, removed: np.ndarray
) -> tuple[tuple[KeptNorm, ...], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    found: dict[str, KeptNorm] = {}
    statistics = {}
    for use in ledger.norms:
        gone = _gone(ledger, use.atoms, removed)  # [groups, channels]
        alive = ~gone.min(axis=1)
        kept = int((~gone[alive]).sum(axis=1).max())
        if kept == gone.shape[1] or use.module in found:
            continue
        assert use.module is not None
        found[use.module] = KeptNorm(use.module, use.kind, use.dim, int(alive.sum()), gone.shape[1], kept, use.eps)
        statistics[use.module] = _statistics(use, gone, alive)
    return tuple(found.values()), statistics


def _statistics(use: NormUse, gone: np.ndarray, alive: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    # A constant is unknown only where nobody needs what the norm gives.
    known = use.constant.nan_to_num()
    constants = [known[g][torch.from_numpy(gone[g])] for g in np.flatnonzero(alive)]  # each [channels that went]
    means = torch.stack([c.mean() for c in constants])
    variances = torch.stack([c.var(correction=0) for c in constants])
    return means, variances


def _gone(ledger: Ledger, atoms: torch.Tensor, removed: np.ndarray) -> np.ndarray:
    return _among(ledger.atoms.roots(atoms).numpy(), removed)


def _among(roots: np.ndarray, removed: np.ndarray) -> np.ndarray:
    gone: np.ndarray = (roots >= 0) & removed[np.maximum(roots, 0)]
    return gone
