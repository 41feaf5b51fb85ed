"""Bundles whose every hash fits, as somebody makes them who forges one: what they say is checked all the same."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundle_samples import reseal_, rezip

from deploy_sparse.artifact import digest_of
from deploy_sparse.bundle import open_bundle, opened
from deploy_sparse.errors import ArtifactError

Change = Callable[[dict], None]


def described(source: Path, target: Path, change: Change) -> Path:
    """The bundle with another description, whose digest is made to fit."""

    def apply(members: dict[str, bytes]) -> None:
        body = json.loads(members["bundle.json"])
        del body["digest"]
        change(body)
        members["bundle.json"] = json.dumps({**body, "digest": digest_of(body)}).encode()

    return rezip(source, target, apply)


def sampled(source: Path, target: Path, **arrays: bytes) -> Path:
    """The bundle with other arrays in its parity sample."""

    def apply(members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(io.BytesIO(members["sample.npz"])) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in (held | {f"{name}.npy": data for name, data in arrays.items()}).items():
                archive.writestr(name, data)
        members["sample.npz"] = stream.getvalue()
        reseal_(members)

    return rezip(source, target, apply)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (b"#!/bin/sh\n", b"", "other bytes before its members"),
        (b"", b"more", "other bytes behind its table"),
        (b"", None, "other bytes before its members"),  # another bundle, which a reader may take for the first
    ],
)
def test_other_bytes_around_a_bundle(sealed: Path, tmp_path: Path, start: bytes, end: bytes | None, message) -> None:
    data = sealed.read_bytes()
    path = tmp_path / "net.zip"
    path.write_bytes(start + data + (data if end is None else end))
    with pytest.raises(ArtifactError, match=message):
        open_bundle(path)


def test_a_comment_and_a_pipe(sealed: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.zip"
    path.write_bytes(sealed.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hello"
    with pytest.raises(ArtifactError, match="other bytes behind its table"):
        open_bundle(path)
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(ArtifactError, match="it is no plain file"):
        open_bundle(tmp_path / "pipe.zip")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(tolerance=1),
        lambda body: body.update(tolerance=-0.1),
        lambda body: body.update(name=None),
        lambda body: body["engine"].update(outputs=[]),
        lambda body: body["engine"]["inputs"][0].update(shape=["batch", {}, 8, 8]),
        lambda body: body["engine"].update(runtime={"name": 1}),
    ],
    ids=["no tolerance", "negative", "name", "no outputs", "shape", "runtime"],
)
def test_descriptions_that_prove_nothing_or_are_of_other_types(sealed: Path, tmp_path: Path, change: Change) -> None:
    with pytest.raises(ArtifactError, match=r"its bundle\.json lacks something"):
        open_bundle(described(sealed, tmp_path / "net.zip", change))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("output_0", npy(np.full((2, 10), np.nan, np.float32)), "NaN or infinite entries"),
        ("output_0", npy(np.full((2, 10), np.inf, np.float32)), "NaN or infinite entries"),
        ("input_0", npy(np.zeros((0, 1, 8, 8), np.float32)), "no rows"),
        ("input_0", b"\x93NUMPY\x01\x00\x04\x00((((", "no header"),
        ("input_0", npy(np.array([None])), "does not fit"),
    ],
)
def test_samples_to_which_nothing_compares(sealed: Path, tmp_path: Path, name: str, data: bytes, why: str) -> None:
    bundle = open_bundle(sampled(sealed, tmp_path / "net.zip", **{name: data}))
    for use in (bundle.verify, lambda: bundle.rebuild(tmp_path / "out")):
        with pytest.raises(ArtifactError, match=rf"its parity sample has no usable {name}.npy for .*{why}"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_graph_of_other_tensors_than_described(sealed: Path, tmp_path: Path) -> None:
    def renamed(body: dict) -> None:
        body["engine"]["outputs"][0]["name"] = "scores"

    bundle = open_bundle(described(sealed, tmp_path / "net.zip", renamed))
    with pytest.raises(ArtifactError, match="its graph has other outputs than it says"):
        bundle.rebuild(tmp_path / "out")
    assert not list((tmp_path / "out").glob("net-*"))


def test_an_engine_that_was_not_proved_is_removed_whatever_stops_it(sealed: Path, tmp_path: Path, monkeypatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(opened, "load_engine", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_bundle(sealed).rebuild(tmp_path / "out")
    assert not list((tmp_path / "out").glob("net-*"))
