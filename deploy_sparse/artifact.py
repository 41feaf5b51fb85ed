"""How anything is put on disk and read back: whole or not at all, and verified before use.

An artifact is a folder ``<name>/`` holding its payload files and one sidecar ``<kind>.json``. The sidecar lists the
size and SHA-256 of every payload file and carries a digest of its own content, so one changed bit anywhere is found.
A folder appears under its final name only when every byte of it has reached the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import ArtifactError

FORMAT_VERSION = 1
KINDS = ("ticket", "plan", "engine", "checkpoint")


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: ``body`` is the sidecar's own content, ``digest`` names the whole artifact."""

    folder: Path
    kind: str
    body: dict[str, Any]
    digest: str
    files: dict[str, dict[str, Any]]


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: sibling temporary file, fsync, rename, fsync of the folder.

    Raises:
        ArtifactError: the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` atomically by ``value`` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is an :class:`ArtifactError`."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist", expected="a JSON file", fix="check the path") from None
    except (ValueError, RecursionError) as problem:
        raise ArtifactError(
            f"{path} is not valid JSON ({problem})", expected="an unaltered file", fix="make it again with its command"
        ) from None
    except OSError as problem:
        raise _unreadable(path, problem) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError met while writing ``path`` into an :class:`ArtifactError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as problem:
        raise ArtifactError(
            f"{path} cannot be written: {problem.filename} is a file",
            expected="a folder there",
            fix="choose another output folder; nothing that was there is lost",
        ) from problem
    except OSError as problem:
        raise ArtifactError(
            f"{path} cannot be written ({problem.strerror or problem})",
            expected="a folder this user may write to, on a disk with room",
            fix="choose another output folder or free the space; nothing that was there is lost",
        ) from problem


def describe(kind: str, payload: Mapping[str, bytes | memoryview], body: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar of an artifact with this content; its ``"digest"`` entry names the artifact."""
    sidecar: dict[str, Any] = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        **body,
        "files": {name: {"bytes": len(data), "sha256": sha256_bytes(data)} for name, data in sorted(payload.items())},
    }
    try:
        return {**sidecar, "digest": digest_of(sidecar)}
    except (TypeError, ValueError) as problem:
        raise ArtifactError(
            f"the description of a {kind} holds a value that JSON does not know ({problem})",
            expected="texts, finite numbers, booleans, lists and tables",
            fix="convert it, for example with float(x), or leave it out",
        ) from None


def write_artifact(
    folder: Path, kind: str, payload: Mapping[str, bytes | memoryview], body: Mapping[str, Any]
) -> Artifact:
    """Write an artifact folder atomically and return it.

    Writing the same content twice is a no-op. A folder that holds anything else is never replaced.

    Args:
        folder: final name; its parent is created when missing.
        kind: ``"ticket"``, ``"plan"``, ``"engine"``…; the sidecar is ``<kind>.json``.
        payload: file name to content.
        body: JSON content of the sidecar besides the file list.

    Raises:
        ArtifactError: the folder exists with other content, or cannot be written.
    """
    folder = Path(folder)
    sidecar = describe(kind, payload, body)
    if _has_content(folder):
        return _same_content(folder, kind, sidecar["digest"])
    temporary = temporary_name(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir(mode=0o755)
            for name, data in payload.items():
                _write_synced(temporary / name, data)
            _write_synced(temporary / f"{kind}.json", (json.dumps(sidecar, indent=2) + "\n").encode())
            _sync_folder(temporary)
            os.rename(temporary, folder)  # fails when the target is a folder with content
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Artifact(folder, kind, dict(body), sidecar["digest"], sidecar["files"])


def read_artifact(path: Path, kind: str, *, remake: str, hashes: bool = True) -> Artifact:
    """Verify an artifact and return it. Nothing of a payload is parsed before its hash was checked.

    Args:
        path: the artifact's folder, or any file in it.
        kind: the expected kind.
        remake: the command that makes such an artifact, for the error message.
        hashes: False checks the sidecar's digest and the size of every file but reads no payload: for listing only.

    Raises:
        ArtifactError: missing, another kind, truncated or altered.
    """
    folder = artifact_folder(path)
    sidecar_path = folder / f"{kind}.json"
    if not sidecar_path.is_file():
        found = kind_of(folder)
        given = f"{path} holds the artifact {found!r}, not {kind!r}" if found else f"{path} holds no {kind}"
        if not Path(path).exists():
            given = f"{path} does not exist"
        raise ArtifactError(given, expected=f"a folder with {kind}.json in it", fix=f"make one with: {remake}")
    try:
        sidecar = read_json(sidecar_path)
    except ArtifactError as problem:
        raise ArtifactError(problem.given, expected=problem.expected, fix=f"make it again: {remake}") from None
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("files"), dict):
        raise _altered(sidecar_path, "it is not a sidecar of this toolkit", remake)
    version = sidecar.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{sidecar_path} has format version {version}",
            expected=f"format version {FORMAT_VERSION}",
            fix=f"make it again with this version: {remake}",
        )
    digest = sidecar.pop("digest", None)
    try:
        matches = digest_of(sidecar) == digest and sidecar.get("kind") == kind
    except ValueError:  # NaN, which this toolkit never writes
        matches = False
    if not matches:
        raise _altered(sidecar_path, "its digest does not match its content", remake)
    for name, entry in sidecar["files"].items():
        if Path(name).name != name:
            raise _altered(sidecar_path, f"it names the file {name!r}, which is not in its folder", remake)
        _verify_file(folder / name, entry, remake, hashes)
    body = {key: value for key, value in sidecar.items() if key not in ("kind", "format_version", "files")}
    return Artifact(folder, kind, body, digest, sidecar["files"])


def artifact_folder(path: Path) -> Path:
    """The folder of the artifact that ``path`` names: the folder itself, or the one a file lies in."""
    path = Path(path)
    return path.parent if path.is_file() else path


def kind_of(path: Path) -> str | None:
    """The kind of artifact ``path`` names, or None. Only looks; a damaged sidecar still tells by its name."""
    folder = artifact_folder(path)
    for kind in KINDS:
        if (folder / f"{kind}.json").is_file():
            return kind
    for sidecar in sorted(folder.glob("*.json")):
        with contextlib.suppress(ArtifactError):
            content = read_json(sidecar)
            if isinstance(content, dict) and content.get("kind") == sidecar.stem and "digest" in content:
                return sidecar.stem
    return None


def environment() -> dict[str, str]:
    """Versions and hardware that a result depends on. Imports none of the libraries it names."""
    versions = {"deploy-sparse": _version("deploy-sparse"), "python": platform.python_version()}
    for library in ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx", "tensorrt"):
        if (version := _version(library)) != "not installed":
            versions[library] = version
    return {**versions, "system": f"{platform.system()} {platform.machine()}", "processor": _processor()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or 'unknown'}, {os.cpu_count()} cores"


def _has_content(path: Path) -> bool:
    """Whether something is there that must not be replaced; not so where it goes while this looks."""
    try:
        return path.is_file() or any(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False  # nothing, or no place for it, which writing will tell
    except OSError as problem:
        raise _unreadable(path, problem) from None


def _same_content(folder: Path, kind: str, digest: str) -> Artifact:
    if kind_of(folder) != kind:
        raise ArtifactError(
            f"{folder} already exists and is no {kind}",
            expected="a folder name that is free",
            fix="choose another output folder, or remove this one",
        )
    existing = read_artifact(folder, kind, remake=f"remove {folder} and run the command again")
    if existing.digest != digest:
        raise ArtifactError(
            f"{folder} already holds another {kind} ({existing.digest[:12]})",
            expected=f"a free folder, or the same {kind} ({digest[:12]})",
            fix="choose another output folder, or remove this one",
        )
    return existing


def _verify_file(path: Path, entry: Mapping[str, Any], remake: str, hashes: bool) -> None:
    expected_size, expected_hash = entry.get("bytes"), str(entry.get("sha256"))
    try:
        if not path.is_file():
            raise FileNotFoundError
        size = path.stat().st_size
        actual = sha256_file(path) if hashes and size == expected_size else expected_hash
    except FileNotFoundError:  # also where a clean-up takes it while this looks
        raise _altered(path, "the file is missing", remake) from None
    except OSError as problem:
        raise _unreadable(path, problem) from None
    if size != expected_size:
        raise _altered(path, f"it has {size} bytes, not {expected_size}", remake)
    if actual != expected_hash:
        raise _altered(path, f"its SHA-256 is {actual[:12]}…, not {expected_hash[:12]}…", remake)


def _altered(path: Path, what: str, remake: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged: {what}", expected="the file as it was written", fix=f"make it again: {remake}"
    )


def _unreadable(path: Path, problem: OSError) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read ({problem.strerror})", expected="a readable file", fix="check the path"
    )


def temporary_name(path: Path) -> Path:
    """A free name beside ``path`` for what is not finished, or no longer wanted; :func:`unfinished_name` reads it."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def unfinished_name(name: str) -> str | None:
    """The final name that something named by :func:`temporary_name` was to get; None for any other name."""
    found = re.fullmatch(r"\.tmp-(.+)-\d+-[0-9a-f]{8}", name)
    return found[1] if found else None


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
