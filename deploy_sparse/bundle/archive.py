"""One zip file with the same bytes every time, and a reader that trusts nothing in it.

Members are plain files, stored without compression: weights hardly compress, compressors differ between versions, and
a stored member cannot unfold into more than the file itself holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..engine.onnx.external import is_plain_name
from ..errors import ArtifactError
from .placing import PIECE, Content

MOST_MEMBERS = 1000
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that the format knows
_END_MARK, _END_SIZE = b"PK\5\6", 22  # what closes a zip file that has no comment
_FAILURES = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, struct.error,
             OverflowError, zlib.error)  # fmt: skip


def write_archive(stream: BinaryIO, members: Mapping[str, Content]) -> None:
    """Write a zip file; equal members give equal bytes.

    Args:
        members: contents by name, each of which :func:`is_member_name` takes.
    """
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, one in sorted(members.items()):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # Unix, wherever it is written
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = one.size  # decides whether the long form of sizes is taken
            with archive.open(entry, "w") as target:
                one.copy_to(target)


@dataclass(frozen=True)
class Archive:
    """An open zip file whose table of members is sound; contents are checked where they are read.

    Attributes:
        where: the file, for messages.
        sizes: bytes of every member, by name.
    """

    where: Path
    sizes: Mapping[str, int]
    _zip: zipfile.ZipFile

    def read(self, name: str, most: int) -> bytes:
        """A member's bytes; of one with more than ``most`` nothing is read.

        Raises:
            ArtifactError: it is not there, too large, truncated or damaged.
        """
        if name not in self.sizes:
            raise refusal(self.where, f"it has no {name}")
        if self.sizes[name] > most:
            raise refusal(self.where, f"its {name} has {self.sizes[name]} bytes, more than such a file ever has")
        return b"".join(self._pieces(name))

    def copy(self, name: str, expected: Mapping[str, object], target: BinaryIO | None = None) -> None:
        """Read a member to its end, check its size and hash, and write it to ``target`` where there is one.

        Args:
            expected: what ``bytes`` and ``sha256`` have to be.

        Raises:
            ArtifactError: it is truncated or altered. What was written to ``target`` by then is not to be used.
        """
        if self.sizes[name] != expected["bytes"]:
            raise refusal(self.where, f"its {name} has {self.sizes[name]} bytes, not {expected['bytes']}")
        digest = hashlib.sha256()
        for piece in self._pieces(name):
            digest.update(piece)
            if target is not None:
                target.write(piece)
        if digest.hexdigest() != expected["sha256"]:
            raise refusal(self.where, f"its {name} was altered: its SHA-256 is {digest.hexdigest()[:12]}…")

    def _pieces(self, name: str) -> Iterator[bytes]:
        left = self.sizes[name]
        try:
            with self._zip.open(name) as stream:
                while piece := stream.read(PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise zipfile.BadZipFile("it has more bytes than it says")
                    yield piece
        except _FAILURES as problem:
            raise refusal(self.where, f"its {name} cannot be read ({_reason(problem)})") from None
        if left:
            raise refusal(self.where, f"its {name} has fewer bytes than it says")


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a zip file and check its table of members, before any of them is read.

    Raises:
        ArtifactError: missing, no zip file, truncated; or members that are compressed, encrypted, links or folders,
            named twice, or named other than plain files are.
    """
    with contextlib.ExitStack() as stack:
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
                raise refusal(path, "it is no plain file")
            stream = stack.enter_context(open(path, "rb"))
        except OSError as problem:
            what = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else problem.strerror
            fix = "make one: deploy-sparse bundle ENGINE --format zip --out FILE.zip"
            raise ArtifactError(f"{path} {what}", expected="a bundle: one .zip file", fix=fix) from None
        yield stack.enter_context(checked_archive(path, stream))


@contextlib.contextmanager
def checked_archive(path: Path, stream: BinaryIO) -> Iterator[Archive]:
    """As :func:`open_archive`, of a zip file that is open already; ``path`` is for messages."""
    try:
        size = stream.seek(0, 2)
        archive = zipfile.ZipFile(stream)
    except _FAILURES as problem:
        raise refusal(path, f"it is no whole zip file ({_reason(problem)})") from None
    with archive:
        _check_members(path, archive.infolist(), size)
        _check_ends(path, archive, stream, size)
        yield Archive(path, {entry.filename: entry.file_size for entry in archive.infolist()}, archive)


def is_member_name(name: str) -> bool:
    """Whether a member may be called this: a plain file name, on any system."""
    return is_plain_name(name) and name.isprintable() and len(name.encode()) <= 200


def refusal(path: Path, what: str) -> ArtifactError:
    """The error of a file that is no bundle as this toolkit writes them."""
    return ArtifactError(
        f"{path} is no sound bundle: {what}",
        expected="the file as deploy-sparse bundle wrote it",
        fix="get it again from where it was made; nothing of it was used",
    )


def _check_members(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    if len(entries) > MOST_MEMBERS:
        raise refusal(path, f"it has {len(entries)} members, more than {MOST_MEMBERS}")
    for entry in entries:
        name, mode = entry.orig_filename, entry.external_attr >> 16
        if not is_member_name(name):
            raise refusal(path, f"its member {name!r} is not named like a plain file")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise refusal(path, f"its member {name!r} is a link or another special file")
        if entry.flag_bits & 0x1:
            raise refusal(path, f"its member {name!r} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise refusal(path, f"its member {name!r} is compressed, which bundles never are")
    twice = [name for name, count in Counter(entry.filename.lower() for entry in entries).items() if count > 1]
    if twice:
        raise refusal(path, f"it has the member {twice[0]!r} twice")
    if (claimed := sum(entry.file_size for entry in entries)) > size:
        raise refusal(path, f"its members claim {claimed} bytes, but the file has {size}")


def _check_ends(path: Path, archive: zipfile.ZipFile, stream: BinaryIO, size: int) -> None:
    """A zip file may hold anything before its first member and behind its table; a bundle holds nothing there."""
    stream.seek(max(size - _END_SIZE, 0))
    ends = stream.read(4) == _END_MARK and not archive.comment
    if not ends or min((entry.header_offset for entry in archive.infolist()), default=0):
        raise refusal(path, f"it has other bytes {'before its members' if ends else 'behind its table of members'}")


def _reason(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0] or type(problem).__name__
