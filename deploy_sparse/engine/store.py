"""The engines in a folder: which are whole, which run here, and what to do about the others."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..artifact import FORMAT_VERSION, digest_of, read_artifact, read_json, unfinished_name
from ..errors import ArtifactError
from .entry import ENTRY_NAME, KIND, ONNX_FILE, OWN_FILES, REMAKE, Engine, open_entry
from .fit import gpus, obstacle, version_obstacle
from .single_flight import is_lock

State = Literal["good", "incompatible", "damaged", "unfinished", "unreadable"]
QUIET_S = 3600.0
"""An unfinished entry to which nothing was written for this long is abandoned; writing takes seconds."""
SIDECAR = f"{KIND}.json"


@dataclass(frozen=True)
class Entry:
    """One engine in a store, or what is left of one.

    Attributes:
        folder: where it lies.
        state: ``good``: whole, and this toolkit and the library installed here take it; ``incompatible``: whole, but
            one of them does not; ``damaged``: a file is missing or altered; ``unfinished``: a build that was
            interrupted, or one that is being written just now; ``unreadable``: this user may not read it.
        engine: what its manifest says; None where that cannot be read.
        runs_here: whether it runs on this machine. A good one may not: it can be for another GPU.
        why: what is wrong with it, or why it does not run here; None for one that runs.
        fix: what to do about that.
        bytes: size of all its files.
        age_s: seconds since it was built, or last found by an equal build.
        strangers: what else is in the folder, by name; it is not of the engine.
        stamp: tells this very folder from another that took its place later.
    """

    folder: Path
    state: State
    engine: Engine | None
    runs_here: bool
    why: str | None
    fix: str | None
    bytes: int
    age_s: float
    strangers: tuple[str, ...]
    stamp: tuple[int, ...]

    @property
    def being_written(self) -> bool:
        """Whether it is unfinished and a build may still be at it."""
        return self.state == "unfinished" and self.age_s < QUIET_S

    def facts(self) -> dict[str, Any]:
        """JSON form; what only the manifest knows is None where that cannot be read."""
        manifest = self.engine.manifest if self.engine else None
        return {
            "folder": str(self.folder),
            "name": manifest["name"] if manifest else None,
            "target": manifest["target"]["name"] if manifest else None,
            "runtime": " ".join(manifest["runtime"].values()) if manifest else None,
            "for": gpus(manifest) if manifest else None,
            "precision": manifest["precision"]["built"] if manifest else None,
            "bytes": self.bytes,
            "age_seconds": round(self.age_s),
            "state": self.state,
            "runs_here": self.runs_here,
            "why": self.why,
            "fix": self.fix,
        }


@dataclass(frozen=True)
class Store:
    """What a folder holds: engines, newest first, and names of everything else in it."""

    folder: Path
    entries: tuple[Entry, ...]
    others: tuple[str, ...]


def read_store(folder: str | Path, *, hashes: bool = True) -> Store:
    """Look at every engine in a folder; nothing is opened or changed.

    Args:
        folder: one that holds engines, or one engine's own.
        hashes: False compares sizes but no hashes, which reads manifests only.

    Raises:
        ArtifactError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        fix = f"name the folder of your engines, or build one: {REMAKE}"
        raise ArtifactError(f"{folder} {what}", expected="a folder with engines", fix=fix)
    try:
        candidates = [folder] if (folder / SIDECAR).is_file() else sorted(folder.iterdir())
    except OSError as problem:
        raise ArtifactError(
            f"{folder} cannot be read ({problem.strerror})", expected="a folder this user may read", fix="check it"
        ) from None
    entries, others = [], []
    for path in candidates:
        if is_lock(path):
            continue
        if not _is_entry(path):
            others.append(path.name)
            continue
        try:
            entries.append(_look(path, hashes))
        except FileNotFoundError:
            continue  # a clean-up took it away, or a build gave it its final name
    entries.sort(key=lambda entry: (entry.age_s, entry.folder.name))
    return Store(folder, tuple(entries), tuple(others))


def _is_entry(path: Path) -> bool:
    """Whether this is a folder that this toolkit made for an engine, however damaged. In doubt it is not."""
    if path.is_symlink() or not path.is_dir():
        return False
    temporary_for = unfinished_name(path.name)
    ours = ENTRY_NAME.fullmatch(temporary_for or path.name) is not None
    with contextlib.suppress(OSError, ArtifactError):
        inside = {file.name for file in path.iterdir()}
        if ours and (inside & OWN_FILES or (temporary_for and not inside)):
            return True  # an empty folder may be anybody's, unless its name is a temporary one of ours
        sidecar = read_json(path / SIDECAR) if SIDECAR in inside else None
        return isinstance(sidecar, dict) and sidecar.get("kind") == KIND and "digest" in sidecar
    return ours and not _readable(path)


def stamp_of(folder: Path) -> tuple[int, ...]:
    """Identity of the folder and times of its content; a rename leaves it as it is.

    Raises:
        FileNotFoundError: there is none.
    """
    found = folder.stat()
    sidecar = folder / SIDECAR
    with contextlib.suppress(OSError):
        return (found.st_dev, found.st_ino, found.st_mtime_ns, sidecar.stat().st_mtime_ns)
    return (found.st_dev, found.st_ino, found.st_mtime_ns)


def _look(folder: Path, hashes: bool) -> Entry:
    stamp = stamp_of(folder)
    if not _readable(folder):
        allow = f"ask its owner, or: chmod -R u+rX {shlex.quote(str(folder))}"
        return Entry(folder, "unreadable", None, False, "this user may not read it", allow, 0, _age(stamp), (), stamp)
    files = {path.name: path.lstat().st_size for path in folder.iterdir()}
    state, engine, why, fix = _judge(folder, hashes)
    known = OWN_FILES | ({*engine.manifest["files"]} if engine else _weights_of(folder))
    strangers = tuple(sorted(name for name in files if name not in known or not _is_plain(folder / name)))
    here = state == "good" and why is None
    return Entry(folder, state, engine, here, why, fix, sum(files.values()), _age(stamp), strangers, stamp)


def _weights_of(folder: Path) -> set[str]:
    """Names of files with weights, by what describes the ONNX file; for entries without a sound manifest."""
    with contextlib.suppress(ArtifactError, ValueError, TypeError, KeyError):
        sidecar = read_json(folder / f"{ONNX_FILE}.json")
        if digest_of({key: value for key, value in sidecar.items() if key != "digest"}) == sidecar["digest"]:
            return {file["name"] for file in sidecar.get("weights", ())}
    return set()


def _judge(folder: Path, hashes: bool) -> tuple[State, Engine | None, str | None, str | None]:
    """State, manifest, what is wrong or in the way, and what to do about it."""
    if unfinished_name(folder.name) is not None:
        why = "a build that was interrupted while it was written, or one that is being written now"
        return "unfinished", None, why, _clean_up(folder)
    try:
        engine = open_entry(folder, hashes=hashes)
    except ArtifactError as problem:
        folder.stat()  # FileNotFoundError where it is gone altogether
        if _whole(folder, hashes):
            fix = f"{_clean_up(folder)}; then build it again: {_remake(folder)}"
            return "incompatible", None, f"{problem.given}; expected {problem.expected}", fix
        fix = f"{_clean_up(folder)}; then build it again: {_remake(folder)}"
        return "damaged", None, problem.given, fix
    found = version_obstacle(engine.manifest)
    state: State = "good" if found is None else "incompatible"
    found = found or obstacle(engine.manifest)
    if found is None:
        return state, engine, None, None
    fix = f"{found.fix}: {engine.build_command(found.target)}" if found.target else found.fix
    return state, engine, f"{found.reason} here; it needs {found.expected}", fix


def _whole(folder: Path, hashes: bool) -> bool:
    """Whether the files are as they were written, by whatever version of this toolkit."""
    with contextlib.suppress(ArtifactError, ValueError, TypeError):
        sidecar = read_json(folder / SIDECAR)
        digest = sidecar.pop("digest", None) if isinstance(sidecar, dict) else None
        if digest is None or digest_of(sidecar) != digest:
            return False
        if sidecar.get("format_version") != FORMAT_VERSION:
            return True  # its layout is not known, so no more can be said
        read_artifact(folder, KIND, remake=REMAKE, hashes=hashes)
        return True
    return False


def _remake(folder: Path) -> str:
    """The command that builds it anew, as far as a damaged manifest tells."""
    name = target = None
    with contextlib.suppress(ArtifactError, TypeError, KeyError):
        manifest = read_json(folder / SIDECAR)
        name, target = manifest["name"], manifest["target"]["name"]
    words = ["deploy-sparse", "build", "SUBJECT", "--target", str(target or "NAME"), "--out", str(folder.parent)]
    return shlex.join([*words, "--name", str(name)] if name else words)


def _clean_up(folder: Path) -> str:
    return shlex.join(["deploy-sparse", "engines", "gc", str(folder.parent)])


def _readable(folder: Path) -> bool:
    if not os.access(folder, os.R_OK | os.X_OK):
        return False
    return all(os.access(path, os.R_OK) for path in folder.iterdir() if path.is_file())


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _age(stamp: tuple[int, ...]) -> float:
    """Seconds since the manifest was written or found again; without one, since the folder changed."""
    return max(0.0, time.time() - stamp[-1] / 1e9)
