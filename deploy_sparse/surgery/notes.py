"""What a reader should know of a plan besides its tables, in few lines; ``plan.json`` holds every detail."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .graph import NETWORK_OUTPUT

if TYPE_CHECKING:
    from .parts import GroupPlan, Stay
    from .plan import SurgeryPlan

    Found = tuple[GroupPlan, Stay]

LISTED = 3  # lines of one kind that are told one by one; more share one
_EXACT_BELOW = 10_000
_ONE_CAUSE = {"shared": "they are masked in some of the layers that share them, but not in all"}
_CONSTANT = re.compile(r"^(?:constants? \S+(?: to \S+)?|its constant) ")
_PLACE = re.compile(r"layer '[^']*'|the network itself")
_NAME = re.compile(r"'[^']*'")
_SHAPE = re.compile(r"\[[\d, ]*\]")


def notes_of(plan: SurgeryPlan) -> list[str]:
    """Why nothing went, where nothing did; cost; what stays and why; constants that biases took up; what is left;
    why there is no parity, where a saved network has none.

    Of a kind with more than ``LISTED`` lines those of one cause share a line.
    """
    said = [plan.unverified] if plan.unverified else []
    return [
        *plan.choice,
        *_nothing(plan),
        *_costs(plan),
        *_stays(plan),
        *_folds(plan),
        *_packs(plan),
        *_filling(plan),
        *said,
    ]


def readable(count: int) -> str:
    """A count of at most three digits and a prefix, ``25.6M``; those below ten thousand are exact."""
    if count < _EXACT_BELOW:
        return f"{count:,}"
    texts = ((f"{count / factor:.3g}", unit) for factor, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")))
    return next((text + unit for text, unit in texts if float(text) < 1000), f"{count / 1e12:.3g}T")


def _nothing(plan: SurgeryPlan) -> list[str]:
    if plan.cuts or plan.shape.packs or plan.choice:
        return []
    emptied = any(stay.kind not in ("pinned", "shared") for group in plan.groups for stay in group.stays)
    if emptied:
        why = "the channels that the masks empty stay, for the reasons below"
    elif plan.partly_filled:
        why = "the masks empty no channel that may go"
    else:
        why = "the masks keep every weight"
    return [f"nothing could be cut: {why}"]


def _costs(plan: SurgeryPlan) -> list[str]:
    before, after = plan.cost_before, plan.cost_after
    return [
        f"{what} {readable(was)} → {readable(now)} ({_share(now / max(1, was))})"
        for what, was, now in (
            ("parameters", before.parameters, after.parameters),
            ("MACs of one sample", before.macs, after.macs),
        )
    ]


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{100 * share:.2g}%"


def _stays(plan: SurgeryPlan) -> list[str]:
    by_kind: dict[str, list[Found]] = {}
    for group in plan.groups:
        told = any(name in plan.partly_filled for name in group.members)
        for stay in group.stays:
            if told or (stay.kind, stay.reason) != ("pinned", NETWORK_OUTPUT):  # which every network has
                by_kind.setdefault(stay.kind, []).append((group, stay))
    lines: list[str] = []
    for kind, found in by_kind.items():
        if len(found) <= LISTED:
            lines += [_line(*each) for each in found]
        else:
            lines += [_carriers(plan, found)] if kind == "carrier" else _pooled(kind, found)
    return lines


def _line(group: GroupPlan, stay: Stay) -> str:
    return f"{group.name}: {len(stay.channels)} of {group.size} channels stay ({stay.kind}): {stay.reason}"


def _pooled(kind: str, found: Sequence[Found]) -> list[str]:
    """One line for each of the causes that hold most channels, and one for all others."""
    causes: dict[str, list[Found]] = {}
    for group, stay in found:
        causes.setdefault(_ONE_CAUSE.get(kind) or _cause(stay.reason), []).append((group, stay))
    order = sorted(causes, key=lambda cause: -_channels(causes[cause]))
    shown = order if len(order) <= LISTED + 1 else order[:LISTED]
    lines = [
        _line(*causes[cause][0])
        if len(causes[cause]) == 1
        else f"{_subject(kind, causes[cause])}: {cause}"
        f"{_where({group.name: len(stay.channels) for group, stay in causes[cause]})}"
        for cause in shown
    ]
    rest = [each for cause in order[len(shown) :] for each in causes[cause]]
    return lines + [f"{_subject(kind, rest)} for {len(order) - len(shown)} other reasons"] * bool(rest)


def _cause(reason: str) -> str:
    """A reason without the names and numbers of its layer."""
    general = _PLACE.sub("a layer", _CONSTANT.sub("their constants ", reason))
    return _SHAPE.sub("[…]", _NAME.sub("…", general))


def _subject(kind: str, found: Sequence[Found]) -> str:
    groups = len({group.name for group, _ in found})
    return f"{groups} group{'s keep' if groups > 1 else ' keeps'} {_channels(found):,} channels ({kind})"


def _channels(found: Sequence[Found]) -> int:
    return sum(len(stay.channels) for _, stay in found)


def _where(counts: Mapping[str, int]) -> str:
    """Where most of it is, or where it is."""
    names = list(counts)
    if len(set(counts.values())) > 1:
        most = max(names, key=lambda name: counts[name])
        return f", most in {most} ({counts[most]:,})"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f", in {', '.join(names[:LISTED])}{more}"


def _carriers(plan: SurgeryPlan, found: Sequence[Found]) -> str:
    taken: dict[str, int] = {}
    for carry in plan.carries:
        taken[carry.weight] = taken.get(carry.weight, 0) + carry.channels
    own = {group.name: sum(taken.get(name, 0) for name in group.members) for group, _ in found}
    columns = sum(taken[name] for name in {name for group, _ in found for name in group.members} & taken.keys())
    return f"{_subject('carrier', found)}: they carry the constants of {columns:,} removed columns{_where(own)}"


def _folds(plan: SurgeryPlan) -> list[str]:
    folds = plan.shape.folds
    if len(folds) <= LISTED:
        return [
            f"{entry.weight}: constants of {entry.channels} removed columns went into {entry.bias}"
            f"{', which is new' if entry.created else ''}"
            for entry in folds
        ]
    columns: dict[str, int] = {}  # by weight: parts of one weight, as of attention, fold the same columns
    for entry in folds:
        columns[entry.weight] = max(entry.channels, columns.get(entry.weight, 0))
    biases, created = ({entry.bias for entry in folds if entry.created or every} for every in (True, False))
    new = "" if not created else ", all of them new" if created == biases else f", {len(created)} of them new"
    return [
        f"{len(biases)} biases took up the constants of {sum(columns.values()):,} removed columns{new}{_where(columns)}"
    ]


def _packs(plan: SurgeryPlan) -> list[str]:
    """How many layers run as blocks, and before or after which of them channels are looked up."""
    packs = plan.shape.packs
    if not packs:
        return []
    forms: dict[str, int] = {}
    for pack in packs:
        forms[pack.packing.form] = forms.get(pack.packing.form, 0) + 1
    kinds = ", ".join(f"{count} {form}" for form, count in forms.items())
    before = [pack.module for pack in packs if pack.packing.gathers]
    after = [pack.module for pack in packs if pack.packing.restores]
    reordered = {order.name.rpartition(".")[0] for order in plan.shape.orders}
    layers = {layer.name.rpartition(".")[0] for layer in plan.layers}  # a spread one may have reordered columns
    norms = {entry.module for entry in plan.shape.spreads} & reordered - layers
    looked = [
        f"{len(places)} look{'s' if len(places) == 1 else ''} channels up {where} ({_first(places)})"
        for where, places in (("before", before), ("after", after), ("after their norm", sorted(norms)))
        if places
    ]
    return [f"{len(packs)} layer{'s' * (len(packs) > 1)} of blocks: {kinds}; {', '.join(looked) or 'no look-up'}"]


def _first(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _filling(plan: SurgeryPlan) -> list[str]:
    """The notes on partly filled weights: one each for a few layers, one for all of them otherwise."""
    shares = {
        name: share for name, share in plan.partly_filled.items() if name.rpartition(".")[0] not in plan.shape.packed
    }
    left = {layer.name: math.prod(layer.compact) for layer in plan.layers if layer.name in shares}
    if len(left) <= LISTED:
        return [f"{name}: {share:.1%} of the weights left are unmasked" for name, share in shares.items()]
    together = sum(shares[name] * count for name, count in left.items()) / sum(left.values())
    order = sorted(left, key=lambda name: shares[name])
    least, most = (f"{name} ({shares[name]:.1%})" for name in (order[0], order[-1]))
    return [
        f"{len(left)} layers are partly filled: {together:.1%} of the weights left in them are unmasked, "
        f"least in {least}, most in {most}"
    ]
