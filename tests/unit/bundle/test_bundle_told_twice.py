"""What a bundle tells twice it tells alike, and what goes wrong with it is said of the bundle."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import onnx
import pytest
from bundle_samples import reseal_, rezip, write_network

from deploy_sparse.artifact import digest_of
from deploy_sparse.bundle import bundle_engine, open_bundle, placing
from deploy_sparse.bundle.placing import content, place_file, place_folder
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.target import Target
from deploy_sparse.errors import ArtifactError, EngineError


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("threads = 1", "threads = 2"), "is another target than the one in bundle.json"),
        (lambda text: text.replace('"cpu"', '"mine"', 1), "is another target than the one in bundle.json"),
        (lambda text: "speed = 3\n" + text, "unknown key 'speed'"),
        (lambda text: text + "]", "is no TOML"),
        (lambda text: "\udcff".encode("utf-8", "surrogateescape"), "is no TOML"),
    ],
    ids=["threads", "name", "unknown key", "no TOML", "no text"],
)
def test_a_target_file_that_says_something_else(sealed: Path, tmp_path: Path, change, why: str) -> None:
    def apply(members: dict[str, bytes]) -> None:
        changed = change(members["target.toml"].decode())
        assert changed != members["target.toml"].decode()
        members["target.toml"] = changed.encode() if isinstance(changed, str) else changed
        reseal_(members)

    with pytest.raises(ArtifactError, match=why):
        open_bundle(rezip(sealed, tmp_path / "net.zip", apply))


@pytest.mark.parametrize(("name", "data"), [("model.onnx.json", None), ("model.onnx", b"other"), ("extra.bin", b"x")])
def test_files_that_are_not_of_the_described_engine(sealed: Path, tmp_path: Path, name: str, data) -> None:
    def apply(members: dict[str, bytes]) -> None:
        engine = json.loads(members["bundle.json"])["engine"]
        members.pop(name, None)
        if data is not None:
            members[name] = data
        reseal_(members)
        body = json.loads(members["bundle.json"])
        del body["digest"]
        body["engine"] = engine  # as it was
        members["bundle.json"] = json.dumps({**body, "digest": digest_of(body)}).encode()

    with pytest.raises(ArtifactError, match=rf"its '{name}' is not of the engine that its bundle\.json describes"):
        open_bundle(rezip(sealed, tmp_path / "net.zip", apply))


def test_targets_with_any_axis_and_description(tmp_path: Path) -> None:
    """Names of axes are whatever exporters make up."""
    shape = ("batch", 1, "s0 + 1", "w.\U0001f3ab")
    extents = {"min": 4, "opt": 8, "max": 8}
    values = {"name": "mine", "runtime": "onnxruntime", "description": "für \x7f \U0001f3ab [x]"}
    target = Target(**values, axes={shape[2]: extents, shape[3]: extents})
    engine = build_engine(write_network(tmp_path / "net.onnx", shape=shape), target, out=tmp_path / "out")
    path = bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path
    bundle = open_bundle(path)
    assert bundle.target == target
    assert bundle.verify().max_abs == 0.0


def test_errors_name_the_bundle_and_not_where_it_was_unpacked(sealed: Path, tmp_path: Path) -> None:
    def damage(members: dict[str, bytes]) -> None:
        members["model.onnx"] = b"no graph"
        del members["model.onnx.json"]
        reseal_(members)

    path = rezip(sealed, tmp_path / "net.zip", damage)
    for use in (open_bundle(path).verify, lambda: open_bundle(path).rebuild(tmp_path / "out")):
        with pytest.raises(ArtifactError) as caught:
            use()
        assert caught.value.given.startswith(f"{path}: model.onnx is not a valid ONNX file")
        assert "deploy-sparse-" not in str(caught.value)
        assert caught.value.fix.startswith("make the bundle again")


def test_other_errors_stay_as_they_are(sealed: Path, tmp_path: Path) -> None:
    def double(members: dict[str, bytes]) -> None:
        model = onnx.load_model_from_string(members["model.onnx"])
        (bias,) = (w for w in model.graph.initializer if w.name == "head.bias")
        bias.raw_data = (onnx.numpy_helper.to_array(bias) + 100).tobytes()
        members["model.onnx"] = model.SerializeToString()
        del members["model.onnx.json"]
        reseal_(members)

    with pytest.raises(EngineError, match="differs from the parity sample") as caught:
        open_bundle(rezip(sealed, tmp_path / "net.zip", double)).verify()
    assert "tolerance" in caught.value.fix


# Names that somebody else takes in the meantime


def test_a_name_taken_while_the_file_was_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.zip"

    def write(stream) -> None:
        stream.write(b"mine")
        path.write_bytes(b"theirs")

    with pytest.raises(ArtifactError, match="already exists with other content"):
        place_file(path, write)
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["net.zip"]
    path.unlink()
    place_file(path, lambda stream: stream.write(b"mine") and None)
    place_file(path, lambda stream: stream.write(b"mine") and None)  # the same again is nothing
    assert path.read_bytes() == b"mine"


def test_a_race_is_not_lost_between_a_look_and_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very step that gives the name finds it taken."""
    path, link = tmp_path / "net.zip", os.link

    def late(source: Path, target: Path) -> None:
        path.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(placing.os, "link", late)
    with pytest.raises(ArtifactError, match="already exists with other content"):
        place_file(path, lambda stream: stream.write(b"mine") and None)
    assert path.read_bytes() == b"theirs"


def test_a_link_to_nothing_is_not_replaced(tmp_path: Path) -> None:
    for name, place in (
        ("net.zip", lambda path: place_file(path, lambda stream: stream.write(b"mine") and None)),
        ("net", lambda path: place_folder(path, {"a": content(b"a")})),
    ):
        path = tmp_path / name
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ArtifactError, match="already exists with other content"):
            place(path)
        assert path.is_symlink()
        assert not (tmp_path / "nowhere").exists()
    assert sorted(os.listdir(tmp_path)) == ["net", "net.zip"]


def test_a_filesystem_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(placing.os, "link", refused)
    path = tmp_path / "net.zip"
    place_file(path, lambda stream: stream.write(b"mine") and None)
    assert path.read_bytes() == b"mine"
    with pytest.raises(ArtifactError, match="already exists with other content"):
        place_file(path, lambda stream: stream.write(b"others") and None)
