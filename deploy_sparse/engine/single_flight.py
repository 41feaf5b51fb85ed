"""One build of an engine at a time, across processes: the others wait for it and find its result.

The lock is held by the kernel on a file beside the entry, so a builder that is killed gives it up. The file itself
means nothing and is removed by whoever held it last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .entry import ENTRY_NAME
from .watch import Watch

log = logging.getLogger("deploy_sparse.build")

_PREFIX = ".lock-"
_TRIES = 20
_here = threading.local()


class _NoLocks(Exception):
    """The filesystem does not take locks."""


@contextmanager
def single_flight(folder: Path, watch: Watch | None = None) -> Iterator[None]:
    """Hold the lock of the entry ``folder`` for the body, which looks for the entry first and builds it otherwise.

    Where no lock can be had, as in a folder that may only be read or on a filesystem without locks, the body runs
    without one: entries are written whole or not at all, so that only work is done twice.

    Args:
        folder: the entry's; its parent is made where it is missing, and removed again if it is left empty.
        watch: ends the wait for another builder as it ends a build.

    Raises:
        BuildError: cancelled, or over its time, by now or while it waited.
    """
    held: set[Path] = _here.__dict__.setdefault("held", set())
    path = lock_of(folder).absolute()
    if path in held:  # a build within a build of the same thread would wait for itself
        yield
        return
    watch = watch or Watch()
    watch.check()
    made = [parent for parent in folder.parents if not parent.exists()]
    lock = _lock(path, watch)
    held.add(path)
    try:
        yield
    finally:
        held.discard(path)
        if lock is not None:
            _give_up(lock, path)
        with contextlib.suppress(OSError):  # not empty, or somebody else was faster
            for parent in made:
                parent.rmdir()


def lock_of(folder: Path) -> Path:
    """The file on which builders of the entry ``folder`` hold their lock."""
    return folder.with_name(f"{_PREFIX}{folder.name}")


def is_lock(path: Path) -> bool:
    """Whether this is such a file, which is no part of a store's content."""
    if not (path.name.startswith(_PREFIX) and ENTRY_NAME.fullmatch(path.name.removeprefix(_PREFIX))):
        return False
    try:
        found = path.lstat()
    except FileNotFoundError:  # it was given up just now
        return True
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def remove_idle_locks(folder: Path) -> None:
    """Remove lock files that killed builders left in a folder of engines. Those that are held stay."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, _NoLocks):
            if is_lock(path):
                lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if _is_locked(lock) and _is_at(lock, path):
                        path.unlink()
                finally:
                    os.close(lock)


def _lock(path: Path, watch: Watch) -> int | None:
    """A descriptor that holds the lock of the file that is at ``path`` now; None where there are no locks."""
    for _ in range(_TRIES):
        if (lock := _opened(path)) is None:
            return None
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, lock)
            try:
                if not _is_locked(lock):
                    log.info("another build of %s is under way: waiting for it", path.name.removeprefix(_PREFIX))
                    watch.wait(partial(_is_locked, lock), "waiting for another build of this engine")
            except _NoLocks as problem:
                log.debug("building without a lock: %s", problem)
                return None
            if _is_at(lock, path):
                undo.pop_all()
                return lock
            # else the last holder removed the file, and another one may be there
    return None


def _opened(path: Path) -> int | None:
    for _ in range(_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a failed builder removed the folder that it had made
            continue
        except OSError as problem:
            log.debug("building without a lock: %s", problem)
            break
    return None


def _is_locked(lock: int) -> bool:
    """Try to lock a descriptor; False where somebody else holds it.

    Raises:
        _NoLocks: the filesystem has none.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise _NoLocks(problem) from None
    return True


def _is_at(lock: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), os.lstat(path))
    return False


def _give_up(lock: int, path: Path) -> None:
    try:
        with contextlib.suppress(OSError):
            if _is_at(lock, path):
                path.unlink()  # while it is held: nobody can have locked this very file and be at work
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child process may have the descriptor too
    finally:
        os.close(lock)
