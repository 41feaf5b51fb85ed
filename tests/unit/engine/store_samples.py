"""Entries for stores: copies of an engine with another manifest, age or damage, and what is in a store."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deploy_sparse.artifact import digest_of, temporary_name, write_artifact
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.store import Entry, read_store

DAY = 86400


def plant(store: Path, engine: Engine, age_days: float = 0, **changes) -> Path:
    """An entry like ``engine``'s with another manifest and so another key; built ``age_days`` ago."""
    own = ("key", "digest", "files")
    body = {**{k: v for k, v in engine.manifest.items() if k not in own}, **changes}
    key = digest_of({**body, "age": age_days})
    folder = store / f"{body['name']}-{body['target']['name']}-{key[:12]}"
    payload = {name: (engine.folder / name).read_bytes() for name in engine.manifest["files"]}
    write_artifact(folder, "engine", payload, {**body, "key": key})
    make_old(folder, age_days)
    return folder


def make_old(folder: Path, days: float) -> None:
    then = time.time() - days * DAY
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_target(engine: Engine, **changes) -> dict[str, object]:
    return {**engine.manifest["target"], **changes}


def unfinished(store: Path, name: str = "tiny-cpu-0123456789ab") -> Path:
    folder = temporary_name(store / name)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"half")
    return folder


def only(store: Path, **options) -> Entry:
    (entry,) = read_store(store, **options).entries
    return entry


def names(entries) -> set[str]:
    return {entry.folder.name for entry in entries}
