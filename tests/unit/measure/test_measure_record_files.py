"""Files of records: appended whole or not at all, checked beforehand, refused where they hold anything else."""

import json
import os
import subprocess
import threading
import time

import pytest

from deploy_sparse.errors import ArtifactError
from deploy_sparse.measure import record as record_module
from deploy_sparse.measure.record import (
    append_records,
    check_appendable,
    read_records,
    write_records,
)


def test_torn_last_line_is_named_and_never_built_upon(tmp_path, make_record):
    path = tmp_path / "a.jsonl"
    append_records(path, [make_record(), make_record()])
    torn = path.read_bytes()[:-40]
    path.write_bytes(torn)
    for use in (
        lambda: read_records(path),
        lambda: append_records(path, [make_record()]),
        lambda: check_appendable(path),
    ):
        with pytest.raises(ArtifactError, match=r"a\.jsonl, line 2: the last line is cut short") as caught:
            use()
    assert path.read_bytes() == torn
    command = caught.value.fix.partition("keep the whole lines with: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_records(tmp_path / "whole.jsonl") == (make_record(),)


def test_whole_last_record_without_line_end_is_never_cut(tmp_path, make_record):
    path = tmp_path / "a b.jsonl"
    path.write_text(make_record().to_json_line())
    for use in (lambda: read_records(path), lambda: append_records(path, [make_record()])):
        with pytest.raises(ArtifactError, match="line 1: the last line has no line end") as caught:
            use()
    subprocess.run(caught.value.fix.partition("with: ")[2], shell=True, check=True)
    assert read_records(path) == (make_record(),)


FOREIGN = {
    "run.json": '{\n  "status": "finished"\n}\n',
    "one-line.json": '{"status": "finished"}\n',
    "no-end.txt": "notes",
    "empty-line.txt": "\n",
    "torn.jsonl": '{"schema_version":1,"run_id":"x',
    "binary": "\x00\x01\n\x00",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_file_of_something_else_is_never_appended_to_nor_cut(tmp_path, make_record, name):
    path = tmp_path / name
    path.write_text(FOREIGN[name])
    for use in (
        lambda: read_records(path),
        lambda: append_records(path, [make_record()]),
        lambda: check_appendable(path),
    ):
        with pytest.raises(ArtifactError, match=r"is no file of records \(line 1: ") as caught:
            use()
        assert "remove" not in caught.value.fix
        assert "head" not in caught.value.fix
        assert path.read_text() == FOREIGN[name]


def test_later_line_that_is_no_record_stops_an_append(tmp_path, make_record):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{make_record().to_json_line()}\nnotes\n")
    for use in (lambda: append_records(path, [make_record()]), lambda: check_appendable(path)):
        with pytest.raises(ArtifactError, match=r"a\.jsonl, line 2: "):
            use()
    assert path.read_text().endswith("\nnotes\n")


def test_file_without_a_record_is_refused_by_readers_only(tmp_path, make_record):
    path = tmp_path / "a.jsonl"
    path.touch()
    for empty in (path, "/dev/null"):
        with pytest.raises(ArtifactError, match=r"holds no record(.|\n)*deploy-sparse profile"):
            read_records(empty)
    check_appendable(path)
    append_records(path, [make_record()])
    assert read_records(path) == (make_record(),)


def test_place_is_checked_beforehand_and_nothing_left_behind(tmp_path, make_record, monkeypatch):
    new = tmp_path / "sub" / "a.jsonl"
    check_appendable(new)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    check_appendable("a.jsonl")
    append_records(new, [make_record()])
    before = new.read_bytes()
    check_appendable(new)
    assert new.read_bytes() == before
    (tmp_path / "file").write_text("in the way")
    for place, text in (
        (tmp_path, "is a folder"),
        ("/dev/null", "is no ordinary file"),
        (tmp_path / "file" / "a.jsonl", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        for use in (
            lambda place=place: check_appendable(place),
            lambda place=place: append_records(place, [make_record()]),
        ):
            with pytest.raises(ArtifactError, match=text):
                use()


def test_folder_without_write_permission_is_found_beforehand(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_module.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(ArtifactError, match=r"a\.jsonl cannot be written \(Permission denied\)"):
        check_appendable(tmp_path / "a.jsonl")


def test_write_replaces_the_whole_file_or_nothing(tmp_path, make_record, monkeypatch):
    path = tmp_path / "sub" / "a.jsonl"
    write_records(path, [make_record(), make_record("ticket")])
    write_records(path, [make_record("ticket")])
    assert read_records(path) == (make_record("ticket"),)
    with pytest.raises(ArtifactError, match="no record to write"):
        write_records(path, [])

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module.artifact.os, "replace", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write_records(path, [make_record()])
    assert read_records(path) == (make_record("ticket"),)
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda c: {**c, "batch": "1"}, "line 2: batch: Input should be a valid integer"),
        (lambda c: {**c, "latency": 3}, "line 2: latency: Extra inputs are not permitted"),
        (lambda c: {**c, "schema_version": 3}, "line 2: schema version 3"),
        (lambda c: {**c, "sparsity": 80}, "line 2: sparsity: Input should be less than or equal to 1"),
        (lambda c: {**c, "status": "timed", "reason": None}, "line 2: the record of 'dense' at batch 1 is 'timed' w"),
        (lambda c: {k: v for k, v in c.items() if k != "subject"}, "line 2: subject: Field required"),
        (lambda c: [c], "line 2: schema version None"),
    ],
)
def test_line_that_is_no_record_is_named(tmp_path, make_record, alter, message):
    path = tmp_path / "a.jsonl"
    append_records(path, [make_record(), make_record(timed=False)])
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(alter(json.loads(second)))}\n")
    with pytest.raises(ArtifactError) as caught:
        read_records(path)
    assert f"a.jsonl, {message}" in str(caught.value)
    assert "from a copy" in caught.value.fix
    assert "remove" not in caught.value.fix


def test_garbage_and_not_a_number_are_refused(tmp_path, make_record):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ArtifactError, match=r"a\.jsonl is no file of records \(line 1"):
        read_records(path)
    path.write_text(make_record(timed=False).to_json_line().replace("3.25", "NaN") + "\n")
    with pytest.raises(ArtifactError, match=r"line 1: build_seconds"):
        read_records(path)


def test_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ArtifactError, match="deploy-sparse profile"):
        read_records(tmp_path / "none.jsonl")


def test_failed_write_leaves_the_file_as_it_was(tmp_path, make_record, monkeypatch):
    path = tmp_path / "a.jsonl"
    append_records(path, [make_record()])
    before = path.read_bytes()

    def full_disk(descriptor, data):
        os.write(descriptor, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module, "_write_all", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        append_records(path, [make_record()])
    assert path.read_bytes() == before


def test_writers_side_by_side_lose_nothing(tmp_path, make_record, monkeypatch):
    path = tmp_path / "a.jsonl"

    def in_two_pieces(descriptor, data):
        os.write(descriptor, data[:300])
        time.sleep(0.002)
        os.write(descriptor, data[300:])

    monkeypatch.setattr(record_module, "_write_all", in_two_pieces)

    def write(name):
        for batch in range(1, 6):
            append_records(path, [make_record(name, batch=batch), make_record(name, batch=batch + 100)])

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(r.subject, r.batch) for r in read_records(path)]
    assert sorted(found) == sorted((n, b + k) for n in "abcd" for b in range(1, 6) for k in (0, 100))
    assert all(found[i][1] + 100 == found[i + 1][1] for i in range(0, len(found), 2))  # a call's records stay together
