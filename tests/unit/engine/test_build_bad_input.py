"""Builds that cannot succeed: what went wrong is said, and the store stays as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy_sparse import artifact
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.store import read_store
from deploy_sparse.errors import ArtifactError

FULL_DISK = """
import resource, signal, sys
from deploy_sparse.engine.build import build_engine
from deploy_sparse.errors import ArtifactError
import deploy_sparse.engine.onnx.runtime, onnx.checker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    build_engine(sys.argv[1], "cpu", out=sys.argv[2], name="other")
except ArtifactError as problem:
    print(problem)
"""
BUILDER = """
import sys
from deploy_sparse.engine.build import build_engine
import deploy_sparse.engine.onnx.runtime, onnx.checker
print("ready", flush=True)
sys.stdin.readline()
engine = build_engine(sys.argv[1], "cpu", out=sys.argv[2])
print(engine.manifest["digest"], engine.folder.name)
"""


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_disk_that_is_full(entry: Path, exported: OnnxFile, share: float) -> None:
    """A limit on the size of files stands for the disk: writing fails in its middle, in the kernel."""
    store = entry.parent
    limit = int(exported.path.stat().st_size * share)
    words = [sys.executable, "-c", FULL_DISK, str(exported.path), str(store), str(limit)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "cannot be written (File too large)" in found.stdout
    assert "free the space; nothing that was there is lost" in found.stdout
    assert [path.name for path in store.iterdir()] == [entry.name]
    assert [item.state for item in read_store(store).entries] == ["good"]
    assert not build_engine(exported, "cpu", out=store, name="other").cached


@pytest.mark.parametrize("file", range(3))
def test_disk_that_fills_up_at_any_file(
    built: Engine, exported: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    real, left = artifact._write_synced, [file]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(artifact, "_write_synced", write)
    with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device\)"):
        build_engine(exported, "cpu", out=tmp_path / "store")
    assert not [*tmp_path.rglob("*onnx*"), *tmp_path.rglob(".tmp*")]


def test_processes_that_build_one_key_end_up_with_one_entry(exported: OnnxFile, tmp_path: Path) -> None:
    words = [sys.executable, "-c", BUILDER, str(exported.path), str(tmp_path)]
    builders = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    answers = {builder.communicate("go\n")[0] for builder in builders}
    (folder,) = tmp_path.iterdir()
    assert answers == {f"{open_entry(folder).manifest['digest']} {folder.name}\n"}


def test_memory_that_is_too_small_for_the_file(exported: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", refuses)
    with pytest.raises(ArtifactError, match=r"tiny\.onnx does not fit into memory"):
        read_onnx(exported.path)
