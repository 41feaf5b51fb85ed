"""Kernel timings that builds of full TensorRT leave for later ones: a file for each GPU and version.

A build that finds its layers timed does not time them again, which makes it faster and its choice of kernels steadier.
Concurrent builds merge what they found, none loses another's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...artifact import write_bytes
from ...errors import ArtifactError
from ..target import Target

log = logging.getLogger("deploy_sparse.tensorrt")


def timing_file(target: Target, version: str, gpu_name: str) -> Path | None:
    """Where timings of this GPU and version are kept; None for targets that keep none.

    ``deploy-sparse/timings`` in the user's cache: ``$XDG_CACHE_HOME``, or ``~/.cache`` without.
    """
    if target.runtime != "tensorrt" or not target.timing_cache:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt {version} {gpu_name}")
    return root / "deploy-sparse" / "timings" / f"{words.strip('-')}.cache"


def attach_timings(config: Any, path: Path | None) -> Any:
    """Give a builder configuration the timings in the file and return them; None without a file's name.

    Timings of another machine or version are refused by TensorRT, and the build starts with none.
    """
    if path is None:
        return None
    cache = config.create_timing_cache(_content(path))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def save_timings(config: Any, cache: Any, path: Path) -> None:
    """Merge the timings of a finished build into the file. A file that cannot be written is a warning, no error."""
    try:
        with _locked(path):
            others = _content(path)
            if others and (found := config.create_timing_cache(others)) is not None:
                cache.combine(found, ignore_mismatch=False)
            write_bytes(path, bytes(cache.serialize()))
    except (ArtifactError, OSError) as problem:
        log.warning("kernel timings are not kept: %s", str(problem).splitlines()[0])


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is a file beside it, as the file itself is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
