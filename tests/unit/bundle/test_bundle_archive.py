"""Bundles that somebody made or damaged: one message each, and nothing is written anywhere."""

from __future__ import annotations

import json
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_samples import rezip
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.artifact import digest_of
from deploy_sparse.bundle import open_bundle
from deploy_sparse.bundle.archive import MOST_MEMBERS, is_member_name
from deploy_sparse.errors import ArtifactError


def refused(path: Path, message: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    with pytest.raises(ArtifactError, match=message):
        open_bundle(path)
    assert {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")} == before


def written(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/etc/evil",
        "folder/model.onnx",
        "C:\\evil",
        "..\\evil",
        "c:evil",
        "..",
        "new\nline",
        "bell\a",
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    assert not is_member_name(name)
    path = written(tmp_path / "evil.zip", (name, b"x"), ("bundle.json", b"{}"))
    refused(path, r"its member '.*' is not named like a plain file\n.*\n.*nothing of it was used")


def test_names_of_real_files_are_taken() -> None:
    assert all(map(is_member_name, ("model.onnx", "model.onnx.data", "gewichte ä.bin", "onnx__Conv_12")))
    assert not is_member_name("")
    assert not is_member_name("x" * 201)


def test_links_and_folders(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("model.onnx")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    refused(written(tmp_path / "link.zip", (link, b"/etc/passwd")), r"its member 'model.onnx' is a link")
    refused(written(tmp_path / "folder.zip", ("sub/", b"")), r"its member 'sub/' is not named like a plain file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["model.onnx", "MODEL.onnx"])
def test_one_name_twice(tmp_path: Path, second: str) -> None:
    path = written(tmp_path / "twice.zip", ("model.onnx", b"good"), (second, b"evil"))
    refused(path, r"it has the member 'model.onnx' twice")


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", b"0" * (50 << 20))
    assert path.stat().st_size < 1 << 20
    refused(path, r"its member 'bundle.json' is compressed, which bundles never are")
    refused(written(tmp_path / "many.zip", *((f"f{i}", b"") for i in range(MOST_MEMBERS + 1))), "more than 1000")


def test_members_that_share_their_bytes(sealed: Path, tmp_path: Path) -> None:
    """Every entry of the table claims the same 40 MB: the sum is more than the file has."""
    path = written(tmp_path / "overlap.zip", ("a", b"0" * 4096), ("b", b""), ("c", b""))
    data = bytearray(path.read_bytes())
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    for at in entries[1:]:
        data[at + 16 : at + 28] = data[entries[0] + 16 : entries[0] + 28]  # checksum and both sizes
        data[at + 42 : at + 46] = struct.pack("<I", 0)  # where it begins
    path.write_bytes(data)
    refused(path, r"its members claim 12288 bytes, but the file has \d+")


def test_sizes_that_are_not_the_real_ones(sealed: Path, tmp_path: Path) -> None:
    data = bytearray(sealed.read_bytes())
    at = data.rindex(b"target.toml") - 46  # its entry in the table
    assert data[at : at + 4] == b"PK\x01\x02"
    (size,) = struct.unpack("<I", data[at + 24 : at + 28])
    for change in (-1, 1):
        data[at + 20 : at + 28] = struct.pack("<II", size + change, size + change)
        path = tmp_path / f"size{change}.zip"
        path.write_bytes(data)
        refused(path, r"target.toml (cannot be read|has \d+ bytes, not)")


def test_truncated_and_empty(sealed: Path, tmp_path: Path) -> None:
    data = sealed.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        path = tmp_path / f"{length}.zip"
        path.write_bytes(data[:length])
        refused(path, "no whole zip file")


def test_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.zip does not exist\n  expected: a bundle: one .zip file"):
        open_bundle(tmp_path / "gone.zip")
    with pytest.raises(ArtifactError, match="is a folder"):
        open_bundle(tmp_path)


def altered(found: dict[str, bytes]) -> None:
    found["model.onnx"] = found["model.onnx"][:-1] + bytes([found["model.onnx"][-1] ^ 1])


def longer(found: dict[str, bytes]) -> None:
    found["README.md"] += b"x"


def without_sample(found: dict[str, bytes]) -> None:
    del found["sample.npz"]


def with_stranger(found: dict[str, bytes]) -> None:
    found["run.sh"] = b"#!/bin/sh"


def without_description(found: dict[str, bytes]) -> None:
    del found["bundle.json"]


def no_json(found: dict[str, bytes]) -> None:
    found["bundle.json"] = b"[" * 100_000


def other_digest(found: dict[str, bytes]) -> None:
    found["bundle.json"] = found["bundle.json"].replace(b'"name": "net"', b'"name": "ten"', 1)


def described(change: Callable[[dict], None]) -> Callable[[dict[str, bytes]], None]:
    """Changes the description, with its digest made to fit."""

    def apply(found: dict[str, bytes]) -> None:
        body = json.loads(found["bundle.json"])
        del body["digest"]
        change(body)
        found["bundle.json"] = json.dumps({**body, "digest": digest_of(body)}).encode()

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (altered, "its model.onnx was altered: its SHA-256 is"),
        (longer, r"its README.md has \d+ bytes, not \d+"),
        (without_sample, "its 'sample.npz' is missing"),
        (with_stranger, "it has 'run.sh', which it does not list"),
        (without_description, "it has no bundle.json"),
        (no_json, "its bundle.json is damaged"),
        (other_digest, "its bundle.json is damaged"),
        (described(lambda body: body.update(kind="engine")), "its bundle.json is damaged"),
        (described(lambda body: body.update(format_version=2)), "has format version 2\n  expected: format version 1"),
        (described(lambda body: body.pop("tolerance")), "its bundle.json lacks something"),
        (described(lambda body: body["engine"].pop("inputs")), "its bundle.json lacks something"),
        (described(lambda body: body.update(files=[])), "it has 'README.md', which it does not list"),
        (described(lambda body: body["engine"]["target"].update(colour="red")), "its target is of another version"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_members_that_are_not_what_is_described(sealed: Path, tmp_path: Path, change, message: str) -> None:
    refused(rezip(sealed, tmp_path / "changed.zip", change), message)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_byte_is_found_or_does_not_matter(sealed: Path, tmp_path_factory, data: st.DataObject) -> None:
    content = bytearray(sealed.read_bytes())
    start = content.index(b"PK\x01\x02")  # the table of members; before it, most of the file is weights
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(start, len(content) - 1)))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "net.zip"
    path.write_bytes(content)
    whole = open_bundle(sealed)
    try:
        found = open_bundle(path)
    except ArtifactError:
        return
    assert (found.digest, found.files, found.manifest) == (whole.digest, whole.files, whole.manifest)
