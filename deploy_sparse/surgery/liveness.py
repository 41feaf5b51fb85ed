"""Which channels nobody needs, judged from the weights and not from how the masks were made.

A channel may go when everything that reads it reads a constant, or ignores it, or is itself not needed. Constants
other than zero go on in a bias, or, behind zero padding, in one channel that is kept for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..flags import any_along
from ._axes import Leak, Ledger, Mixing, NormUse, Read
from ._layer_rules import leaks_through
from ._weights import used

Bools = np.ndarray


@dataclass(frozen=True)
class Liveness:
    """Channels by smallest joined atom.

    Attributes:
        needed: some layer reads values that depend on the input, bool ``[atoms]``.
        leaks: a layer writes nothing but a constant into it, yet it cannot go: the reason.
    """

    needed: Bools
    leaks: Mapping[int, Leak]


def liveness(ledger: Ledger) -> Liveness:
    """Judge every channel by all that read it, from the network's end to its beginning."""
    needed = np.zeros(ledger.atoms.count, dtype=bool)
    needed[list(ledger.atoms.pins())] = True
    uses: list[Read | Mixing | NormUse] = [*ledger.mixings, *ledger.norms, *ledger.reads]
    steps = [_step(ledger, use) for use in uses]
    changed = True
    while changed:
        before = int(needed.sum())
        for step in reversed(steps):
            step.spread_(needed)
        changed = int(needed.sum()) > before
    leaks: dict[int, Leak] = {}
    readers: dict[int, str] = {}
    for step in sorted(steps, key=lambda step: isinstance(step, _MixingStep)):  # layers say more
        if isinstance(step, _ReadStep):
            step.note_leaks_(needed, leaks)
        step.note_readers_(needed, readers)
    leaks = {root: leak for root, leak in leaks.items() if not needed[root]}
    return Liveness(needed, leaks | _lost(ledger, needed, readers))


def carries(read: Read) -> bool:
    """Whether one kept column of the layer can take up the constants of others."""
    return read.alone and read.part is None


def folds(read: Read) -> bool:
    """Whether the layer's bias can take up constants of columns that go."""
    return not read.bends and read.bias is not None


class _ReadStep:
    def __init__(self, ledger: Ledger, read: Read) -> None:
        self.read, self.weight = read, ledger.traced.tensors[read.weight]
        self.rows = ledger.atoms.roots(read.rows).numpy()  # [groups · ro]
        self.columns = ledger.atoms.roots(read.atoms).numpy()  # [groups · ci]
        self.constant = ~read.constant.isnan().numpy()
        self.silent = read.silent_rows.numpy()
        self.ignored = read.ignored.numpy()
        self.uneven = read.uneven.numpy()
        self.seen: tuple[bytes, Bools] | None = None

    def wanted(self, needed: Bools) -> Bools:
        """Columns that rows read which are themselves needed."""
        rows = needed[self.rows] & ~self.silent
        if bool((rows | self.silent).all()):
            return ~self.ignored
        if not rows.any():
            return np.zeros_like(self.ignored)
        key = np.packbits(rows).tobytes()
        if self.seen is None or self.seen[0] != key:
            read = self.read
            entries = used(self.weight.cpu(), read.groups, read.transposed, read.part)  # [groups, ro, ci]
            chosen = entries & torch.from_numpy(rows).reshape(read.groups, -1, 1)
            self.seen = (key, any_along(chosen, 1).reshape(-1).numpy())
        return self.seen[1]

    def spread_(self, needed: Bools) -> None:
        reads = self.wanted(needed) & ~self.constant & ~self.uneven & (self.columns >= 0)
        needed[self.columns[reads]] = True

    def note_readers_(self, needed: Bools, readers: dict[int, str]) -> None:
        reads = self.wanted(needed) & ~self.constant & ~self.uneven & (self.columns >= 0)
        for root in self.columns[reads].tolist():
            readers.setdefault(root, f"is no longer known before layer {self.read.layer!r}")

    def note_leaks_(self, needed: Bools, leaks: dict[int, Leak]) -> None:
        read = self.read
        value = np.nan_to_num(read.constant.numpy())
        stuck = np.zeros_like(self.ignored) if folds(read) or carries(read) else self.constant & (value != 0)
        for column in np.flatnonzero(self.wanted(needed) & (self.columns >= 0) & (self.uneven | stuck)).tolist():
            leaks.setdefault(int(self.columns[column]), _leak(read, column))


class _MixingStep:
    def __init__(self, ledger: Ledger, mixing: Mixing) -> None:
        source = ledger.atoms.roots(mixing.source)
        target, harmless = ledger.atoms.roots(mixing.target), mixing.harmless
        source, target, harmless = torch.broadcast_tensors(source, target, harmless)  # type: ignore[no-untyped-call]
        self.source, self.target = source.reshape(-1).numpy(), target.reshape(-1).numpy()
        self.counts = ~harmless.reshape(-1).numpy() & (self.source >= 0)
        self.place = mixing.place

    def wanted(self, needed: Bools) -> Bools:
        """Channels that count in what is needed."""
        wanted: Bools = self.source[self.counts & ((self.target < 0) | needed[np.maximum(self.target, 0)])]
        return wanted

    def spread_(self, needed: Bools) -> None:
        needed[self.wanted(needed)] = True

    def note_readers_(self, needed: Bools, readers: dict[int, str]) -> None:
        for root in np.unique(self.wanted(needed)).tolist():
            readers.setdefault(root, f"counts in {self.place}")


class _NormStep:
    def __init__(self, ledger: Ledger, use: NormUse) -> None:
        self.layer = use.module or use.place
        self.atoms = ledger.atoms.roots(use.atoms).numpy()  # [groups, channels]
        self.varies = use.constant.isnan().numpy() & (self.atoms >= 0)

    def spread_(self, needed: Bools) -> None:
        wanted = (needed[np.maximum(self.atoms, 0)] & (self.atoms >= 0)).any(axis=1, keepdims=True)
        needed[self.atoms[self.varies & wanted]] = True

    def note_readers_(self, needed: Bools, readers: dict[int, str]) -> None:
        for root in self.atoms[self.varies].tolist():
            if needed[root]:
                readers.setdefault(root, f"is no longer known before layer {self.layer!r}")


def _step(ledger: Ledger, use: Read | Mixing | NormUse) -> _ReadStep | _MixingStep | _NormStep:
    if isinstance(use, Read):
        return _ReadStep(ledger, use)
    return _MixingStep(ledger, use) if isinstance(use, Mixing) else _NormStep(ledger, use)


def _lost(ledger: Ledger, needed: Bools, readers: Mapping[int, str]) -> dict[int, Leak]:
    """Needed channels into which some layer writes a constant that turns into something unknown on its way.

    ``readers`` says by channel where that matters first.
    """
    some, others = np.zeros_like(needed), np.zeros_like(needed)  # constant rows write the channel, and others
    for rows, known in ledger.written:
        roots, is_known = ledger.atoms.roots(rows).numpy(), known.numpy()
        some[roots[is_known]] = others[roots[~is_known]] = True
    reasons: dict[int, Leak] = {}
    places = ledger.atoms.roots(torch.tensor(list(ledger.lost), dtype=torch.int64)).tolist()
    for root, leak in zip(places, ledger.lost.values(), strict=True):
        reasons.setdefault(root, leak)
    lost: dict[int, Leak] = {}
    for root, cause in readers.items():
        if root in reasons and some[root]:
            lost[root] = reasons[root]
        elif some[root] and not others[root]:
            lost[root] = Leak(cause, float("nan"))
    return lost


def _leak(read: Read, column: int) -> Leak:
    constant = float(read.constant[column])
    if bool(read.uneven[column]):
        return Leak(f"changes from place to place before layer {read.layer!r}", float("nan"))
    return Leak(stuck(read), constant)


def stuck(read: Read) -> str:
    """Why the layer's bias cannot take a constant up; completes "constant 0.3 …"."""
    if read.bends:
        return leaks_through(read.layer)
    return f"cannot be folded into layer {read.layer!r}: {read.no_fold}"
