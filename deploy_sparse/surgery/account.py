"""What stays in each channel group, and why channels stay that the masks empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ._axes import Leak, Ledger
from .graph import Members, pinned_groups, told_apart
from .liveness import Liveness
from .parts import GroupPlan, Kind, Stay

_LISTED = 3


def account(
    ledger: Ledger, members: Members, state: Liveness, removed: np.ndarray, why: Mapping[int, tuple[Kind, str]]
) -> tuple[GroupPlan, ...]:
    """The groups with their reasons.

    Args:
        ledger: what was learnt.
        members: which channels form a group.
        state: which channels are needed.
        removed: which go, bool by smallest joined atom.
        why: reasons of channels that were given back.
    """
    pins, pinned = ledger.atoms.pins(), pinned_groups(ledger, members)
    names, disputed = _names(ledger, members), _disputed(ledger)
    plans = []
    for number, size in enumerate(members.sizes):
        own = np.flatnonzero(members.group == number).tolist()
        stays: list[Stay] = []
        if number in pinned:
            held = tuple(channel for channel, root in enumerate(own) if root in pins)
            stays.append(Stay("pinned", held, pinned[number]))
        leaks = {c: state.leaks[root] for c, root in enumerate(own) if root in state.leaks}
        stays += _leaks({c: leak for c, leak in leaks.items() if not any(c in s.channels for s in stays)})
        back: dict[tuple[Kind, str], list[int]] = {}
        for channel, root in enumerate(own):
            if root in why:
                back.setdefault(why[root], []).append(channel)
        stays += [Stay(kind, tuple(channels), reason) for (kind, reason), channels in back.items()]
        told = {channel for stay in stays for channel in stay.channels}
        shared = {c: disputed[r] for c, r in enumerate(own) if r in disputed and c not in told and not removed[r]}
        if shared and number not in pinned:
            layers = sorted({layer for letting in shared.values() for layer in letting})
            reason = f"masked in {_listed(layers)}, and written by other layers of the same shortcut"
            stays.append(Stay("shared", tuple(shared), reason))
        kept = tuple(channel for channel, root in enumerate(own) if not removed[root])
        plans.append(GroupPlan(names[number][0], size, kept, tuple(stays), names[number][1]))
    return tuple(plans)


def _disputed(ledger: Ledger) -> dict[int, list[str]]:
    """By channel that some layer writes and others let go: those that do."""
    written = np.zeros(ledger.atoms.count, dtype=bool)
    letting: dict[int, list[str]] = {}
    silent: list[tuple[str, np.ndarray]] = []
    for read in ledger.reads:
        rows, zero = ledger.atoms.roots(read.rows).numpy(), read.silent_rows.numpy()
        written[rows[~zero]] = True
        silent.append((read.layer, rows[zero]))
    for layer, rows in silent:
        for root in rows[written[rows]].tolist():
            letting.setdefault(root, []).append(layer)
    return letting


def _names(ledger: Ledger, members: Members) -> list[tuple[str, tuple[str, ...]]]:
    """For each group its first producer and all tensors it spans."""
    first: dict[int, tuple[str, int]] = {}
    spans: list[dict[str, None]] = [{} for _ in members.sizes]
    for axis in ledger.axes.values():
        roots = ledger.roots_of(axis)
        numbers = members.group[roots[roots >= 0]]
        for number in sorted(set(numbers[numbers >= 0].tolist())):
            spans[number].setdefault(axis.name)
            if axis.role == "producer":
                first.setdefault(number, (axis.name, axis.dim))
    names = told_apart([first[number] for number in range(len(spans))])
    return [(name, tuple(span)) for name, span in zip(names, spans, strict=True)]


def _listed(layers: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(layers) - _LISTED
    return ", ".join(map(repr, layers[:_LISTED])) + (f" and {more} more" if more > 0 else "")


def _leaks(leaks: Mapping[int, Leak]) -> list[Stay]:
    """One entry for each cause, with the range of its channels' constants."""
    channels: dict[str, list[int]] = {}
    for channel, leak in leaks.items():
        channels.setdefault(leak.cause, []).append(channel)
    stays = []
    for cause, found in channels.items():
        known = [c for c in (leaks[channel].constant for channel in found) if not math.isnan(c)]
        ends = list(dict.fromkeys(f"{end:.3g}" for end in (min(known), max(known)))) if known else []
        subject = f"constant{'s' if len(ends) > 1 else ''} {' to '.join(ends)}" if ends else "its constant"
        stays.append(Stay("leak", tuple(found), f"{subject} {cause}"))
    return stays
