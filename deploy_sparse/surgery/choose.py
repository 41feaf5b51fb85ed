"""Which dead channels really go, and the cuts that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set

from ._axes import Leak, Ledger
from .graph import groups_of, memberships
from .liveness import liveness
from .parts import Cut, Fold, GroupPlan, Stay


def choose(ledger: Ledger, multiple: int) -> tuple[tuple[GroupPlan, ...], Set[int]]:
    """What stays in each group, and the removed channels by smallest joined atom."""
    groups, members, state = groups_of(ledger), memberships(ledger), liveness(ledger)
    root_of = {place: root for root, place in members.items()}
    removed = {
        root
        for root, (number, _) in members.items()
        if groups[number].pinned is None and root not in state.needed and root not in state.leaks
    }
    last: set[int] = set()
    for axis in ledger.axes.values():
        roots = ledger.atoms.roots(axis.atoms).tolist()
        if roots and all(root in removed for root in roots):
            removed.discard(roots[0])
            last.add(roots[0])
    plans = []
    for number, group in enumerate(groups):
        roots = [root_of[number, channel] for channel in range(group.size)]
        gone = [root for root in roots if root in removed]
        short = -(group.size - len(gone)) % multiple
        aligned = set(gone[:short])
        removed -= aligned
        stays: list[Stay] = []
        if group.pinned is not None:
            stays.append(Stay("pinned", tuple(range(group.size)), group.pinned))
        else:
            stays += _leaks({channel: state.leaks[root] for channel, root in enumerate(roots) if root in state.leaks})
        filled = tuple(channel for channel, root in enumerate(roots) if root in aligned)
        only = tuple(channel for channel, root in enumerate(roots) if root in last)
        stays += [Stay("aligned", filled, f"the kept width is a multiple of {multiple}")] if filled else []
        stays += [Stay("last", only, "every channel is dead, and a layer needs at least one")] if only else []
        kept = tuple(channel for channel, root in enumerate(roots) if root not in removed)
        plans.append(GroupPlan(group.name, group.size, kept, tuple(stays)))
    return tuple(plans), removed


def cuts_of(ledger: Ledger, removed: Set[int], folds: Iterable[Fold]) -> tuple[Cut, ...]:
    """The positions that stay along every tensor axis that loses some, biases that folding creates included."""
    cuts: dict[tuple[str, int], Cut] = {}
    for axis in ledger.axes.values():
        roots = ledger.atoms.roots(axis.atoms).tolist()
        kept = tuple(position for position, root in enumerate(roots) if root not in removed)
        if len(kept) < len(roots):
            cuts[axis.name, axis.dim] = Cut(axis.name, axis.dim, len(roots), kept)
    for entry in folds:
        rows = cuts.get((entry.weight, 0))
        if entry.created and rows is not None:
            cuts[entry.bias, 0] = Cut(entry.bias, 0, rows.size, rows.kept)
    return tuple(cuts.values())


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
