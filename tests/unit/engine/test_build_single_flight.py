"""One builder of an entry at a time, in threads and processes; killed ones, cancelled ones, and folders without locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy_sparse.engine import single_flight as module
from deploy_sparse.engine.collect import collect
from deploy_sparse.engine.single_flight import lock_of, remove_idle_locks, single_flight
from deploy_sparse.engine.store import read_store
from deploy_sparse.engine.watch import Progress, Watch
from deploy_sparse.errors import BuildError

NAME = "tiny-cpu-0123456789ab"
BUILDER = """
import sys, time
from pathlib import Path
from deploy_sparse.engine.single_flight import single_flight
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with single_flight(folder):
    if not folder.exists():
        with open(log, "a") as stream:
            stream.write("begin ")
        time.sleep(0.2)
        folder.mkdir()
        with open(log, "a") as stream:
            stream.write("end ")
"""
HOLDER = """
import sys, time
from pathlib import Path
from deploy_sparse.engine.single_flight import single_flight
with single_flight(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def started(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_processes_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "out" / NAME, tmp_path / "log"
    builders = [started(BUILDER, folder, log) for _ in range(4)]
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    for builder in builders:
        builder.communicate()
        assert builder.returncode == 0
    assert log.read_text() == "begin end "
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_threads_hold_it_one_after_the_other(tmp_path: Path) -> None:
    inside, most = [], []

    def build(_: int) -> None:
        with single_flight(tmp_path / NAME):
            inside.append(None)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(build, range(16)))
    assert most == [1] * 16
    assert not list(tmp_path.iterdir())


def test_a_build_within_a_build_does_not_wait_for_itself(tmp_path: Path) -> None:
    with single_flight(tmp_path / NAME):
        with single_flight(tmp_path / NAME, Watch(time_limit_s=5)):
            assert lock_of(tmp_path / NAME).exists()
        assert lock_of(tmp_path / NAME).exists()
    assert not list(tmp_path.iterdir())


def test_other_entries_do_not_wait(tmp_path: Path) -> None:
    with single_flight(tmp_path / NAME), single_flight(tmp_path / NAME.replace("0", "1")):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_builder_gives_it_up(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    holder = started(HOLDER, folder)
    assert lock_of(folder).exists()
    assert read_store(tmp_path).others == ()
    remove_idle_locks(tmp_path)
    assert lock_of(folder).exists()  # it is held
    holder.kill()
    holder.communicate()
    assert lock_of(folder).exists()
    with single_flight(folder, Watch(time_limit_s=5)):
        pass
    assert not list(tmp_path.iterdir())


def test_gc_removes_what_killed_builders_left_and_nothing_else(tmp_path: Path) -> None:
    lock_of(tmp_path / NAME).touch()
    held = lock_of(tmp_path / NAME.replace("0", "2"))
    kept = {tmp_path / ".lock-mine", lock_of(tmp_path / NAME.replace("0", "1"))}
    for path in kept:
        path.write_text("" if path.name == ".lock-mine" else "precious")
    with single_flight(tmp_path / held.name.removeprefix(".lock-")):
        assert {*collect(tmp_path, dry_run=True).others} == {path.name for path in kept}
        assert len(list(tmp_path.iterdir())) == 4
        collect(tmp_path)
        assert {*tmp_path.iterdir()} == {*kept, held}
    assert {*tmp_path.iterdir()} == kept


def problem_of(folder: Path, watch: Watch) -> str:
    with pytest.raises(BuildError) as caught, single_flight(folder, watch):
        pytest.fail("two builders at once")
    return str(caught.value)


def test_a_waiting_builder_says_so_and_can_be_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, seen = tmp_path / NAME, []
    with single_flight(folder), caplog.at_level(logging.INFO, logger="deploy_sparse.build"):
        stop = threading.Event()
        watch = Watch(lambda progress: (seen.append(progress), stop.set()), cancel=stop)
        with ThreadPoolExecutor(1) as other:
            assert "cancelled" in other.submit(problem_of, folder, watch).result()
            assert "limit of 0.1 s" in other.submit(problem_of, folder, Watch(time_limit_s=0.1)).result()
        assert lock_of(folder).exists()
    assert isinstance(seen[0], Progress)
    assert seen[0].what == "waiting for another build of this engine"
    assert caplog.messages == [f"another build of {NAME} is under way: waiting for it"] * 2
    assert not list(tmp_path.iterdir())


def test_nothing_is_begun_that_is_to_stop(tmp_path: Path) -> None:
    assert "cancelled" in problem_of(tmp_path / "out" / NAME, Watch(cancel=lambda: True))
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), single_flight(tmp_path / "a" / "b" / NAME):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with single_flight(tmp_path / "a" / "b" / NAME):
        (tmp_path / "a" / "b" / NAME).mkdir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [NAME]


@pytest.mark.parametrize("problem", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: int) -> None:
    def refuses(*_: object) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(module.fcntl, "flock", refuses)
    with single_flight(tmp_path / NAME), single_flight(tmp_path / NAME):
        (tmp_path / NAME).mkdir()
    lock_of(tmp_path / NAME).touch()
    remove_idle_locks(tmp_path)
    assert lock_of(tmp_path / NAME).exists()  # who knows whether it is held


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with single_flight(tmp_path / "file" / NAME):
        pass

    def refuses(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuses)
    with single_flight(tmp_path / NAME):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    lock_of(tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with single_flight(tmp_path / NAME):
        assert not (tmp_path / "elsewhere").exists()


def test_the_lock_is_flock(tmp_path: Path) -> None:
    """Locks of fcntl and of flock do not see each other: all of this package are of one kind."""
    with single_flight(tmp_path / NAME), open(lock_of(tmp_path / NAME)) as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
