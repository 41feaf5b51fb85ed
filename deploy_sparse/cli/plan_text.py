"""A surgery plan as text: layers before and after, channel groups, what stays and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .output import table

if TYPE_CHECKING:
    from ..surgery.parts import GroupPlan
    from ..surgery.plan import SurgeryPlan

_LISTED = 3


def plan_text(plan: SurgeryPlan, members: Mapping[str, Sequence[str]] | None = None) -> str:
    """The tables of layers and groups, then the notes.

    Args:
        plan: what to show.
        members: tensors of every channel group, by the group's name, where they are known.
    """
    columns, rows = plan.layer_table()
    notes = plan.notes()
    return "\n".join([table(columns, rows), "", group_table(plan.groups, notes, members), "", *notes])


def group_table(
    groups: Sequence[GroupPlan], notes: Sequence[str], members: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One row for every channel group. A reason that no note tells is told here."""
    columns = ["channel group", "channels", "kept", "why channels stay"]
    rows = [[group.name, str(group.size), str(len(group.kept)), _stays(group, notes)] for group in groups]
    if members is not None:
        columns.append("members")
        for row in rows:
            row.append(_shortened(members.get(row[0], ())))
    return table(columns, rows) if rows else "no channel groups"


def _stays(group: GroupPlan, notes: Sequence[str]) -> str:
    found = []
    for stay in group.stays:
        told = any(stay.reason in note for note in notes)
        found.append(f"{len(stay.channels)} {stay.kind}{'' if told else f': {stay.reason}'}")
    return "; ".join(found) or "-"


def _shortened(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "") or "-"
