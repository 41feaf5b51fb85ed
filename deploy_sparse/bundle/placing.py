"""Files and folders that appear under their name when every byte of them is on the disk, and replace nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from ..artifact import sha256_bytes, sha256_file, temporary_name, writing
from ..errors import ArtifactError

PIECE = 1 << 20
"""Bytes copied at a time: files may be larger than memory."""


@dataclass(frozen=True)
class Content:
    """What goes into one file: bytes, or a file of which the bytes are known by their hash.

    Attributes:
        source: the bytes, or the path of a file that holds them.
        size: how many there are.
        sha256: their SHA-256, in hexadecimal digits.
    """

    source: bytes | Path
    size: int
    sha256: str

    def copy_to(self, target: IO[bytes]) -> None:
        """Write the bytes.

        Raises:
            ArtifactError: the file holds others by now.
        """
        if isinstance(self.source, bytes):
            target.write(self.source)
            return
        digest = hashlib.sha256()
        with open(self.source, "rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != self.sha256:
            raise ArtifactError(
                f"{self.source} changed while it was being bundled",
                expected="a file nobody else writes",
                fix="bundle the engine again; deploy-sparse engines verify FOLDER says whether it is whole",
            )


def content(data: bytes) -> Content:
    """These bytes."""
    return Content(data, len(data), sha256_bytes(data))


def place_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically. The same bytes twice are a no-op; a file or folder with anything else stays as it is.

    Raises:
        ArtifactError: something else is there, or the folder cannot be written.
    """
    if path.is_dir():
        raise _taken(path, "is a folder")
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as stream:
                write(stream)
                _sync(stream)
            if _appears(temporary, path):
                _sync_folder(path.parent)
            elif not path.is_file() or sha256_file(path) != sha256_file(temporary):
                raise _taken(path, "already exists with other content")
        finally:
            temporary.unlink(missing_ok=True)


def place_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write a folder atomically. The same files twice are a no-op; a folder with anything else stays as it is.

    Args:
        folder: final name; its parent is created when missing.
        files: contents by path within the folder, with ``/`` between its parts.

    Raises:
        ArtifactError: something else is there, or the parent cannot be written.
    """
    if os.path.lexists(folder):
        if not _holds(folder, files):
            raise _taken(folder, "already exists with other content")
        return
    temporary = temporary_name(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir(mode=0o755)
            for name, one in sorted(files.items()):
                path = temporary / name
                path.parent.mkdir(exist_ok=True)
                with open(path, "xb") as stream:
                    one.copy_to(stream)
                    _sync(stream)
            for inner in {temporary, *(temporary / Path(name).parent for name in files)}:
                _sync_folder(inner)
            os.rename(temporary, folder)  # fails when a folder with content has appeared there
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _appears(temporary: Path, path: Path) -> bool:
    """Give a finished file its name, which nothing may have by then; False where something has, if only a dead link."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a filesystem without hard links
        if os.path.lexists(path):
            return False
        os.replace(temporary, path)
    return True


def _holds(folder: Path, files: Mapping[str, Content]) -> bool:
    """Whether exactly these files are in the folder."""
    if not folder.is_dir():
        return False
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return found.keys() == files.keys() and all(
        path.stat().st_size == files[name].size and sha256_file(path) == files[name].sha256
        for name, path in found.items()
    )


def _taken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} {what}", expected="a name that is free, or the very same bundle", fix="choose another --out"
    )


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
