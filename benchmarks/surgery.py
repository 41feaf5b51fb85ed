"""The scoreboard of surgery: torchvision's 80 classifiers, 40 of timm's (surgery_models.toml), Torch-Pruning beside it.

Half of the channels of every group that can be narrowed go, by one-shot ℓ1 masks, once silent and once with live norms
and biases. For each network and each part (see surgery_part.py and surgery_peer.py) one JSON line is added to --out:
success or the reason why not, largest relative errors in float64 and float32, CPU seconds, MACs and parameters kept,
what stayed and why, ONNX and TensorRT-RTX. timm, torch-pruning and tensorrt-rtx are used where they are installed.

Every part runs in a process of its own, on one thread, with limits on time and memory. What --out has is not measured
again, so a board that was interrupted goes on where it stopped; --again measures again, and the last line counts.
Tables are written beside --out: a summary (.md), and models.md with a row for each network.

    python benchmarks/surgery.py --out benchmarks/records/cpu-2-cores/surgery/results.jsonl
    python benchmarks/surgery.py --out results.jsonl --models "torchvision/resnet*" --parts silent live
    python benchmarks/surgery.py --out results.jsonl --again failed --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy_sparse.artifact import environment, write_bytes

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from surgery_part import PARTS, SCORE, SPARSITY, TARGET, merged
from surgery_subject import BATCH, CPU_LIMIT_S, MEMORY_LIMIT_GIB, RUNS, Subject, on_one_line, subjects
from surgery_table import details, text

SCRIPT = Path(__file__).with_name("surgery_part.py")
WALL_LIMIT_S, PROCESS_LIMIT_GIB = 3600.0, 20.0

Row = dict[str, Any]
Job = tuple[Subject, str]


def conditions() -> Row:
    """The record's first line: versions, hardware and settings."""
    versions = environment()
    for library in ("torchvision", "timm", "torch-pruning"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "kind": "conditions",
        "environment": versions,
        "sparsity": SPARSITY,
        "score": SCORE,
        "batch": BATCH,
        "threads": 1,
        "runs": RUNS,
        "target": TARGET,
        "limits": {"cpu_s": CPU_LIMIT_S, "memory_gib": MEMORY_LIMIT_GIB},
    }


def measure(subject: Subject, part: str, *, wall_s: float = WALL_LIMIT_S, memory_gib: float = PROCESS_LIMIT_GIB) -> Row:
    """Run one part in a process of its own and return its row, also where that process did not end by itself."""
    row: Row = {"kind": "part", "model": subject.name, "part": part, "family": subject.family, "image": subject.image}
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        file = Path(folder) / "found.jsonl"
        command = [sys.executable, str(SCRIPT), subject.name, part, str(file)]
        started = time.perf_counter()
        with (Path(folder) / "log.txt").open("w+") as log:
            end = _finish(command, log, wall_s, memory_gib)
            log.seek(0)
            said = log.read().strip().splitlines()
        found = merged(file.read_text().splitlines() if file.exists() else ())
    if end:
        reason = f"{end}: {on_one_line(said[-1])}" if said and end.startswith("exit") else end
        found = {**found, "outcome": "failed", "error": "process", "reason": reason}
    return {**row, **found, "wall_s": round(time.perf_counter() - started, 1)}


def _finish(command: Sequence[str], log: Any, wall_s: float, memory_gib: float) -> str:
    """Wait for the process; how it ended where not by itself, else ``""``."""

    def limit() -> None:
        size = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, preexec_fn=limit)
    try:
        code = process.wait(wall_s)
    except subprocess.TimeoutExpired:
        return f"no answer in {wall_s:g} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return "" if code == 0 else f"signal {-code}" if code < 0 else f"exit {code}"


def wanted(models: Iterable[str], parts: Iterable[str], rows: Sequence[Row], again: str) -> list[Job]:
    """The parts to measure, in the list's order: those that the rows lack, and those to measure once more."""
    latest = {(row["model"], row["part"]): row for row in rows if row["kind"] == "part"}
    patterns, parts = tuple(models), tuple(parts)
    jobs = [
        (subject, part)
        for name, subject in subjects().items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        for part in parts
    ]
    done = {key for key, row in latest.items() if again == "none" or (again == "failed" and row["outcome"] == "ok")}
    return [(subject, part) for subject, part in jobs if (subject.name, part) not in done]


def possible(jobs: Iterable[Job]) -> tuple[list[Job], list[str]]:
    """The jobs whose optional libraries are installed, and what is left out, in words."""
    left: dict[str, str] = {}
    if find_spec("timm") is None:
        left["timm"] = "timm is not installed: its networks are left out"
    if find_spec("torch_pruning") is None:
        left["peer"] = "torch-pruning is not installed: the part 'peer' is left out"
    jobs = list(jobs)
    kept = [job for job in jobs if not {job[0].collection, job[1]} & left.keys()]
    return kept, list(left.values()) if len(kept) < len(jobs) else []


def run(jobs: Sequence[Job], workers: int, add: Callable[[Row], None], **limits: float) -> None:
    """Measure the parts, ``workers`` at a time, and then the large networks' one after another."""
    lock = threading.Lock()

    def one(job: Job) -> None:
        row = measure(*job, **limits)
        with lock:
            add(row)

    for large, together in ((False, workers), (True, 1)):
        with ThreadPoolExecutor(together) as pool:
            for future in [pool.submit(one, job) for job in jobs if job[0].alone == large]:
                future.result()


def line(row: Row) -> str:
    """What is said while the board runs."""
    seconds = f", {row['cpu_s']} CPU s" if "cpu_s" in row else ""
    ending = row["outcome"] if row["outcome"] == "ok" else f"{row['outcome']} at {row.get('stage')}: {row['reason']}"
    return f"{row['model']} {row['part']}: {ending}{seconds} ({row['wall_s']} s)"


def read(path: Path) -> list[Row]:
    """The record's rows, the conditions first; of a new record only those.

    Raises:
        SystemExit: the record was measured under other conditions.
    """
    now = conditions()
    if not path.exists():
        write_bytes(path, (json.dumps(now) + "\n").encode())
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [key for key in now if rows[0].get(key) != now[key]]
    if changed:
        raise SystemExit(f"{path} was measured under other conditions ({', '.join(changed)}): choose another --out")
    return rows


def tables(path: Path) -> str:
    """Write the summary and the table of networks beside the record; returns the summary."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    summary = text(rows)
    write_bytes(path.with_suffix(".md"), summary.encode())
    write_bytes(path.with_name("models.md"), details(rows).encode())
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--models", nargs="+", default=["*"], help="shell patterns of torchvision/<name>, timm/<name>")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="none: only write the tables")
    parser.add_argument("--again", choices=("none", "failed", "all"), default="none", help="measure again what is done")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--wall-s", type=float, default=WALL_LIMIT_S, help="limit of one part")
    parser.add_argument("--memory-gib", type=float, default=PROCESS_LIMIT_GIB, help="limit of one part's process")
    options = parser.parse_args()
    jobs, left_out = possible(wanted(options.models, options.parts, read(options.out), options.again))
    print(*left_out, sep="\n", end="\n" * bool(left_out))
    count = iter(range(1, len(jobs) + 1))

    def add(row: Row) -> None:
        write_bytes(options.out, options.out.read_bytes() + (json.dumps(row) + "\n").encode())
        print(f"[{next(count)}/{len(jobs)}] {line(row)}", flush=True)

    run(jobs, options.jobs, add, wall_s=options.wall_s, memory_gib=options.memory_gib)
    print(tables(options.out))


if __name__ == "__main__":
    main()
