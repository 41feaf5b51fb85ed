"""Which engines the networks of the zoo compile to: dense, channel-pruned and block-packed, in every precision.

Forms: ``dense``; ``channels``, a one-shot ℓ1 ticket without half of the channels of every group, compacted; ``packed``,
a one-shot ticket of two equal blocks a layer with half of the weights, packed. Each is exported once, compiled with
TensorRT-RTX in fp32, fp16, bf16, int8 and fp8, which needs no GPU, and built for ONNX Runtime in fp32, fp16 and int8.
Scales of int8 and fp8, and agreement with fp32, come from real images for the networks of digits and from seeded
pictures of the synthetic data set for all others (enlarged for torchvision's). Weights are untrained: see
engines_part.py.

For each attempt one JSON line is added to --out: the precision read back, layers in it, agreement, parity of the
export, seconds, bytes, seconds of a second identical build (median of 3), for ONNX Runtime the engine's own results
against PyTorch; or the reason why not. A network in one form runs in a process of its own; each build has a time limit.
What --out has is not measured again; --again measures again, and the last line counts. Tables are written beside (.md).

    python benchmarks/engines.py --out benchmarks/records/cpu-2-cores/engines/results.jsonl
    python benchmarks/engines.py --out results.jsonl --networks "*"   # torchvision's four too
    python benchmarks/engines.py --out results.jsonl --networks resnet_digits --forms dense --again failed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from engines_part import FORMS, HITS, MULTIPLE, RULE, SEED, SPARSITY, images_of, merged
from engines_table import text
from surgery_subject import on_one_line

__all__ = ["text"]

SCRIPT = Path(__file__).with_name("engines_part.py")
EXTRAS = tuple(f"torchvision/{name}" for name in ("resnet18", "resnet50", "mobilenet_v3_small", "vit_b_16"))
NETWORKS = (*zoo.ZOO, *EXTRAS)
RTX = "rtx-sm89"
PRECISIONS = {"rtx": ("fp32", "fp16", "bf16", "int8", "fp8"), "cpu": ("fp32", "fp16", "int8")}
LIMIT_S, PREPARE_S = 600.0, 1800.0

Row = dict[str, Any]
Key = tuple[str, str, str]  # network, form, target/precision


def conditions(rtx: str) -> Row:
    """The record's first line: versions, hardware and settings."""
    return {
        "kind": "conditions",
        "environment": environment(),
        "targets": {"rtx": rtx, "cpu": "cpu"},
        "forms": list(FORMS),
        "sparsity": SPARSITY,
        "blocks": RULE.parts,
        "multiple": MULTIPLE,
        "weights": f"untrained, seed {SEED}",
        "data": {network: images_of(network)[0] for network in NETWORKS},
        "threads": 1,
        "second_builds": HITS,
    }


def attempts(rtx: str) -> tuple[str, ...]:
    """Every target and precision, as ``"<target>/<precision>"``; TensorRT-RTX where it is installed."""
    targets = {"rtx": rtx, "cpu": "cpu"}
    wanted = [kind for kind in PRECISIONS if kind == "cpu" or find_spec("tensorrt_rtx") is not None]
    return tuple(f"{targets[kind]}/{precision}" for kind in wanted for precision in PRECISIONS[kind])


def wanted(
    patterns: Iterable[str], forms: Iterable[str], names: Sequence[str], rows: Sequence[Row], again: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Networks and forms with the attempts that the rows lack, or that are to be measured once more."""
    latest = {key_of(row): row for row in rows if row["kind"] == "engine"}
    done = {key for key, row in latest.items() if again == "none" or (again == "failed" and row["outcome"] == "ok")}
    patterns, forms = tuple(patterns), tuple(forms)
    for network in NETWORKS:
        if any(fnmatchcase(network, pattern) for pattern in patterns):
            for form in forms:
                left = tuple(name for name in names if (network, form, name) not in done)
                if left:
                    yield network, form, left


def key_of(row: Row) -> Key:
    """Which attempt a row is about."""
    return row["network"], row["form"], f"{row['target']}/{row['precision']}"


def measure(
    network: str, form: str, names: Sequence[str], *, limit_s: float = LIMIT_S, prepare_s: float = PREPARE_S
) -> Iterator[Row]:
    """A row for each attempt, also for those in which the process did not end by itself; the rest goes on in another.

    Args:
        limit_s: of one build. prepare_s: of making and exporting the network.
    """
    left = list(names)
    while left:
        started = time.perf_counter()
        found, end = _finish(network, form, left, limit_s, prepare_s + 2 * limit_s * len(left))
        shared = found.pop("", {})
        whole = shared.get("stage", "start") is None  # the network was made and exported
        own = {name: found.get(name, {}) for name in left} if whole else dict.fromkeys(left, shared)
        over = [name for name in left if "outcome" in own[name]]
        if len(over) < len(left):  # it died: in the next attempt, or in what all share
            broken = left[len(over) : len(over) + 1] if whole else left
            died = {"outcome": "failed", "error": "process", "reason": end or "the process said nothing"}
            own |= {name: {**own[name], **died} for name in broken}
            over += broken
        for name in over:
            yield _row(network, form, name, {**shared, **own[name]}, time.perf_counter() - started)
        left = left[len(over) :]


def _row(network: str, form: str, name: str, found: Row, wall_s: float) -> Row:
    target, _, precision = name.partition("/")
    about = {"kind": "engine", "network": network, "form": form, "target": target, "precision": precision}
    return {**about, **found, "process_s": round(wall_s, 1)}


def _finish(network: str, form: str, names: Sequence[str], limit_s: float, wall_s: float) -> tuple[dict[str, Row], str]:
    """What the process found, and how it ended where not by itself."""
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        file = Path(folder) / "found.jsonl"
        command = [sys.executable, str(SCRIPT), network, form, str(file), f"{limit_s:g}", *names]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (Path(folder) / "log.txt").open("w+") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=log, env=variables, timeout=wall_s).returncode
                end = "" if code == 0 else f"signal {-code}" if code < 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                code, end = 0, f"no answer in {wall_s:g} s"
            log.seek(0)
            said = log.read().strip().splitlines()
        if code > 0 and said:
            end = f"{end}: {on_one_line(said[-1])}"
        return merged(file.read_text().splitlines() if file.exists() else ()), end


def line(row: Row) -> str:
    """What is said while it runs."""
    ending = row["outcome"] if row["outcome"] == "ok" else f"failed at {row.get('stage')}: {row['reason']}"
    seconds = f", {row['seconds']} s, again {row.get('again_s')} s" if "seconds" in row else ""
    return f"{' '.join(key_of(row))}: {ending}{seconds}"


def read(path: Path, rtx: str) -> list[Row]:
    """The record's rows, the conditions first; of a new record only those.

    Raises:
        SystemExit: the record was measured under other conditions.
    """
    now = conditions(rtx)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(now) + "\n").encode())
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [key for key in now if rows[0].get(key) != now[key]]
    if changed:
        raise SystemExit(f"{path} was measured under other conditions ({', '.join(changed)}): choose another --out")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument(
        "--networks", nargs="+", default=list(zoo.ZOO), help=f"shell patterns; all: {', '.join(NETWORKS)}"
    )
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS, help="none: only write the tables")
    parser.add_argument("--rtx", default=RTX, help="target of TensorRT-RTX; default: %(default)s, as fp8 needs it")
    parser.add_argument("--again", choices=("none", "failed", "all"), default="none", help="measure again what is done")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds of one build")
    options = parser.parse_args()
    names = attempts(options.rtx)
    if len(names) == len(PRECISIONS["cpu"]):
        print("tensorrt-rtx is not installed: its engines are left out")
    rows = read(options.out, options.rtx)
    for network, form, left in wanted(options.networks, options.forms, names, rows, options.again):
        for row in measure(network, form, left, limit_s=options.limit_s):
            rows.append(row)
            write_bytes(options.out, options.out.read_bytes() + (json.dumps(row) + "\n").encode())
            print(line(row), flush=True)
        write_bytes(options.out.with_suffix(".md"), text(rows).encode())
    write_bytes(options.out.with_suffix(".md"), text(rows).encode())


if __name__ == "__main__":
    main()
