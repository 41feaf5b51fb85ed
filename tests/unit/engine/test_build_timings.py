"""The file of kernel timings under builders in processes of their own, some of which are killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BUILDER = """
import sys
from pathlib import Path
from deploy_sparse.engine.trt.timings import attach_timings, save_timings

class Cache:
    def __init__(self, data):
        lines = data.decode().split()
        assert not lines or lines.pop() == "end", "a torn file"
        self.lines = set(lines)
    def combine(self, other, ignore_mismatch):
        self.lines |= other.lines
        return True
    def serialize(self):
        return " ".join([*sorted(self.lines), "end"]).encode()

class Config:
    def create_timing_cache(self, data):
        return Cache(data)
    def set_timing_cache(self, cache, ignore_mismatch):
        return True

who, path = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[3])):
    config = Config()
    cache = attach_timings(config, path)
    cache.lines.add(f"{who}-layer{index}" + "x" * 2000)
    save_timings(config, cache, path)
    print(index, flush=True)
"""


def test_processes_lose_no_timings_and_killed_ones_tear_nothing(tmp_path: Path) -> None:
    path, rounds = tmp_path / "timings" / "t.cache", 15
    words = [sys.executable, "-c", BUILDER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builders = [subprocess.Popen([*words, f"p{i}", str(path), str(rounds)], **pipes) for i in range(3)]
    killed = [subprocess.Popen([*words, f"k{i}", str(path), "100000"], **pipes) for i in range(2)]
    for process in (*builders, *killed):
        assert process.stdout.readline() == "ready\n"
    for process in (*builders, *killed):
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in killed:
        process.stdout.readline()
        time.sleep(0.02)
        process.kill()
        process.communicate()
    for process in builders:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    *lines, last = path.read_text().split()
    assert last == "end"
    found = {line.rstrip("x") for line in lines}
    assert {f"p{i}-layer{index}" for i in range(3) for index in range(rounds)} <= found
    assert {f"k{i}-layer0" for i in range(2)} <= found
