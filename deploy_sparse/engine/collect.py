"""Removing engines that nobody needs any more, while others build and load in the same folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import temporary_name, unfinished_name
from ..errors import ConfigError
from .single_flight import remove_idle_locks
from .store import Entry, read_store, stamp_of

DAY_S = 86400.0


@dataclass(frozen=True)
class Verdict:
    """An entry that gc removed, or would have: ``why`` it goes, and ``left``, why it is still there (None: gone)."""

    entry: Entry
    why: str
    left: str | None

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        return {"folder": str(self.entry.folder), "bytes": self.entry.bytes, "why": self.why, "left": self.left}


@dataclass(frozen=True)
class Collection:
    """What gc did: a verdict for each entry that is not needed, and the entries that are."""

    verdicts: tuple[Verdict, ...]
    kept: tuple[Entry, ...]
    others: tuple[str, ...]

    @property
    def removed(self) -> tuple[Entry, ...]:
        """Entries that are gone; in a dry run, those that would be."""
        return tuple(verdict.entry for verdict in self.verdicts if verdict.left is None)


def collect(
    folder: str | Path, *, keep: int = 1, older_than_days: float | None = None, dry_run: bool = False
) -> Collection:
    """Remove engines that are damaged, unfinished, incompatible or superseded.

    Incompatible is what the library installed here does not take, on any GPU; an engine for a GPU that this machine
    does not have stays, and so does one whose library is not installed. Superseded is what is not among the ``keep``
    latest good engines of one name, target and GPU. Folders that are no engines, files beside an engine's own and
    links are never removed.

    An entry leaves under a temporary name in one step, so that a build or a load that runs at the same time sees it
    whole or not at all; one that changed since it was looked at is put back.

    Args:
        folder: one that holds engines.
        keep: how many engines of one name, target and GPU stay.
        older_than_days: of what would go, only what was built or found again longer ago.
        dry_run: only say what would go.

    Raises:
        ConfigError: a negative number. ArtifactError: there is no such folder.
    """
    if keep < 0 or not (older_than_days is None or older_than_days >= 0):  # which is false for NaN too
        value = f"--keep {keep}" if keep < 0 else f"--older-than {older_than_days}"
        raise ConfigError(value, expected="zero or more", fix="choose another number")
    store = read_store(folder)
    reasons = _reasons(store.entries, keep)
    verdicts, kept = [], []
    for entry in store.entries:
        why = reasons.get(entry.folder)
        if why is None or (older_than_days is not None and entry.age_s < older_than_days * DAY_S):
            kept.append(entry)
        else:
            verdicts.append(Verdict(entry, why, _in_the_way(entry) or (None if dry_run else _remove(entry))))
    if not dry_run:
        remove_idle_locks(store.folder)
    return Collection(tuple(verdicts), tuple(kept), store.others)


def _reasons(entries: tuple[Entry, ...], keep: int) -> dict[Path, str]:
    """Why an entry is not needed, by its folder; entries come newest first."""
    reasons: dict[Path, str] = {}
    families: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.state in ("damaged", "incompatible", "unfinished"):
            reasons[entry.folder] = f"{entry.state}: {entry.why}"
        elif entry.state == "good" and entry.engine is not None:
            family = families[_family(entry)]
            family.append(entry)
            if len(family) > keep:
                reasons[entry.folder] = (
                    f"superseded: by {family[0].folder.name}" if keep else "superseded: none is kept"
                )
    return reasons


def _family(entry: Entry) -> tuple[str, ...]:
    assert entry.engine is not None
    manifest = entry.engine.manifest
    gpu = manifest["gpu"] or {}
    return manifest["name"], manifest["target"]["name"], str(gpu.get("name")), str(gpu.get("capability"))


def _in_the_way(entry: Entry) -> str | None:
    """Why an entry that is not needed stays all the same, or None."""
    if entry.strangers:
        names = ", ".join(entry.strangers[:5])
        return f"it holds what is not the engine's: {names}; move that, or remove {entry.folder} by hand"
    if entry.being_written:
        return "it was written to within the hour: a build may be at it"
    return None


def _remove(entry: Entry) -> str | None:
    """Remove the very folder that was looked at; why it is still there, or None."""
    folder = entry.folder
    final = unfinished_name(folder.name) or folder.name
    away = temporary_name(folder.with_name(final))
    try:
        os.rename(folder, away)
    except FileNotFoundError:
        return None  # somebody else removed it
    except OSError as problem:
        return f"it cannot be removed ({problem.strerror or problem})"
    if stamp_of(away) != entry.stamp:
        with contextlib.suppress(OSError):  # another build may have made the same engine in between
            os.rename(away, folder)
            return "it changed while gc looked at it"
    try:
        shutil.rmtree(away)
    except OSError as problem:
        return f"a part of it cannot be removed ({problem.strerror or problem}): {away}"
    return None
