"""Artifacts appear whole or not at all, and nothing altered is accepted."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse import artifact
from deploy_sparse.errors import ArtifactError


def _write(folder, **payload):
    return artifact.write_artifact(folder, "thing", payload or {"data.bin": b"12345"}, {"note": "n"})


def test_round_trip_keeps_body_files_and_digest(tmp_path):
    written = _write(tmp_path / "a")
    read = artifact.read_artifact(tmp_path / "a" / "data.bin", "thing", remake="make")
    assert (read.body, read.digest, read.files) == ({"note": "n"}, written.digest, written.files)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["data.bin", "thing.json"]


def test_writing_the_same_content_twice_is_a_no_op_and_other_content_is_refused(tmp_path):
    _write(tmp_path / "a")
    before = (tmp_path / "a" / "thing.json").stat().st_mtime_ns
    _write(tmp_path / "a")
    assert (tmp_path / "a" / "thing.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"already holds another thing[\s\S]*choose another output folder"):
        artifact.write_artifact(tmp_path / "a", "thing", {"data.bin": b"54321"}, {"note": "n"})
    assert (tmp_path / "a" / "data.bin").read_bytes() == b"12345"


def test_a_folder_with_something_else_is_never_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(ArtifactError, match="already exists and is no thing"):
        _write(tmp_path / "a")
    assert (tmp_path / "a" / "precious").read_text() == "x"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "a"
    _write(folder, **{"data.bin": bytes(range(40))})
    name = data.draw(st.sampled_from(["data.bin", "thing.json"]))
    before = (folder / name).read_bytes()
    content = bytearray(before)
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    (folder / name).write_bytes(content)
    try:
        same_content = json.loads(content) == json.loads(before) if name == "thing.json" else False
    except ValueError:
        same_content = False
    if same_content:  # only insignificant white space changed
        assert artifact.read_artifact(folder, "thing", remake="make thing").body == {"note": "n"}
    else:
        with pytest.raises(ArtifactError, match="make thing"):
            artifact.read_artifact(folder, "thing", remake="make thing")


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_truncation_names_file_and_sizes(tmp_path, keep):
    _write(tmp_path / "a")
    path = tmp_path / "a" / "data.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ArtifactError, match=rf"data.bin is damaged: it has {keep} bytes, not 5[\s\S]*make it again: mk"
    ):
        artifact.read_artifact(tmp_path / "a", "thing", remake="mk")


def test_missing_payload_missing_folder_and_other_kind_are_told_apart(tmp_path):
    _write(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"the artifact .thing., not .ticket."):
        artifact.read_artifact(tmp_path / "a", "ticket", remake="mk")
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        artifact.read_artifact(tmp_path / "nowhere", "thing", remake="mk")
    (tmp_path / "a" / "data.bin").unlink()
    with pytest.raises(ArtifactError, match="the file is missing"):
        artifact.read_artifact(tmp_path / "a", "thing", remake="mk")


def test_a_newer_format_version_is_refused(tmp_path):
    _write(tmp_path / "a")
    path = tmp_path / "a" / "thing.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ArtifactError, match=r"format version 2[\s\S]*expected: format version 1"):
        artifact.read_artifact(tmp_path / "a", "thing", remake="mk")


def test_write_bytes_replaces_atomically_and_leaves_no_temporary(tmp_path):
    artifact.write_bytes(tmp_path / "f", b"old")
    artifact.write_bytes(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"new"


def test_an_unwritable_place_is_one_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"cannot be written[\s\S]*nothing that was there is lost"):
        _write(tmp_path / "file" / "a")


def test_killed_writers_leave_nothing_under_the_final_name(tmp_path):
    """A writer that dies at its n-th system call that changes the disk leaves either everything or nothing."""
    code = textwrap.dedent(
        """
        import os, sys
        from deploy_sparse import artifact
        left = int(sys.argv[2])
        def dying(call):
            def wrapped(*args, **kwargs):
                global left
                left -= 1
                if left < 0: os._exit(9)
                return call(*args, **kwargs)
            return wrapped
        for name in ("fsync", "rename", "mkdir"): setattr(os, name, dying(getattr(os, name)))
        artifact.write_artifact(__import__("pathlib").Path(sys.argv[1]), "thing", {"a": b"1", "b": b"22"}, {})
        """
    )
    codes = []
    for step in range(12):
        target = tmp_path / str(step) / "out"
        codes.append(subprocess.run([sys.executable, "-c", code, str(target), str(step)], check=False).returncode)
        if codes[-1] == 0:
            break
        if target.exists():
            assert artifact.read_artifact(target, "thing", remake="mk").body == {}
    assert codes[-1] == 0
    assert len(codes) > 4


def test_canonical_json_is_independent_of_order_and_refuses_nan():
    assert artifact.canonical_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.canonical_json(float("nan"))


def test_environment_names_versions_without_importing_them():
    program = "import sys, deploy_sparse.artifact as a; e = a.environment(); assert 'torch' in e; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})


def test_kind_of_ignores_foreign_json(tmp_path):
    (tmp_path / "thing.json").write_text(json.dumps({"kind": "thing"}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    assert artifact.kind_of(tmp_path) is None


def test_a_damaged_sidecar_still_tells_its_kind(tmp_path):
    artifact.write_artifact(tmp_path / "a", "ticket", {"data.bin": b"1"}, {})
    path = tmp_path / "a" / "ticket.json"
    path.write_bytes(path.read_bytes()[:20])
    assert artifact.kind_of(tmp_path / "a") == "ticket"
    with pytest.raises(ArtifactError, match=r"ticket.json is not valid JSON[\s\S]*make it again: mk"):
        artifact.read_artifact(tmp_path / "a", "ticket", remake="mk")


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "a").mkdir()
    _write(tmp_path / "a")
    assert artifact.read_artifact(tmp_path / "a", "thing", remake="mk").body == {"note": "n"}


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_values_that_json_does_not_know_are_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ArtifactError, match=r"holds a value that JSON does not know"):
        artifact.write_artifact(tmp_path / "a", "thing", {}, {"x": value})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("step", ["iterdir", "sha256_file"])
def test_a_folder_that_goes_while_it_is_looked_at_is_no_surprise(tmp_path, monkeypatch, step):
    """A clean-up may take a folder between any two looks: a writer fills the place, a reader gets the usual error."""
    gone = tmp_path / "a"
    _write(gone)
    owner = Path if step == "iterdir" else artifact
    real = getattr(owner, step)

    def late(path):
        shutil.rmtree(gone, ignore_errors=True)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, late)
        if step == "iterdir":
            assert _write(gone).folder == gone
        else:
            with pytest.raises(ArtifactError, match=r"data\.bin is damaged: the file is missing"):
                artifact.read_artifact(gone, "thing", remake="make")
    _write(gone)
    assert artifact.read_artifact(gone, "thing", remake="make").body == {"note": "n"}


@pytest.mark.parametrize("failing", ["sha256_file", "iterdir"])
def test_what_cannot_be_read_is_one_message(tmp_path, monkeypatch, failing):
    _write(tmp_path / "a")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(*((artifact, failing) if failing == "sha256_file" else (Path, failing)), denied)
    with pytest.raises(ArtifactError, match=r"cannot be read \(Permission denied\)"):
        _write(tmp_path / "a")
