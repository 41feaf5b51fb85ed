"""Whether the measurement can be believed: against work that is counted, and against clocks that are not its own.

* Known ratios: two callables do the same small product n and m times, and count it. The truth is n / m; does the
  interval hold it, and is the verdict right? Several trials a ratio: a 95 % interval may miss one time in twenty.
* ONNX Runtime's own profiler: two engines are timed as always, in sessions that also write a profile. Each call is set
  beside the `model_run` event of that very call.
* Cold caches: a sum over memory that fits the caches, with warm and with cold ones.
* hyperfine, where it is installed: two processes, timed by it and by the measurement.

One JSON line a measurement is added to --out, and tables of all of them are written beside it.

    python benchmarks/selfcheck.py --out benchmarks/records/cpu-2-cores/selfcheck/results.jsonl
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.engine.onnx.runtime import OrtSession, session_options
from deploy_sparse.measure.compare import REOPENING, Comparison, compare
from deploy_sparse.measure.profile import profile
from deploy_sparse.measure.record import LatencyRecord
from deploy_sparse.measure.timing import summarise

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from selfcheck_table import WITHIN, text

RATIOS = ((2000, 2000), (2100, 2000), (2500, 2000), (4000, 2000), (8000, 2000), (2000, 2500))
TRIALS = 3
NUMBERS = 2048  # of each product's factors: three arrays of 8 KiB stay in the first cache
WIDTHS = (64, 32)  # channels of the networks for ONNX Runtime
IMAGE, LAYERS = 28, 4
MEMORY = 1 << 20  # numbers of 8 bytes in the sum over memory
LOOPS = (8_000_000, 2_000_000)  # of the processes

Row = dict[str, Any]
Way = dict[str, Any]


class Counted:
    """A call that does a product of two arrays ``units`` times; ``done`` counts products, ``calls`` calls."""

    factors = np.linspace(0.5, 1.5, 2 * NUMBERS, dtype=np.float32).reshape(2, NUMBERS)
    result = np.empty(NUMBERS, np.float32)

    def __init__(self, units: int) -> None:
        self.units, self.done, self.calls = units, 0, 0

    def __call__(self) -> None:
        (a, b), result, multiply = self.factors, self.result, np.multiply
        for _ in range(self.units):
            multiply(a, b, result)
        self.done += self.units
        self.calls += 1


def known_ratio(units: tuple[int, int], trial: int, way: Way) -> Row:
    """One pair of workloads of known ratio; ``units`` are products a call of the baseline and of the subject."""
    work = {"dense": Counted(units[0]), "ticket": Counted(units[1])}
    made = profile(work, **way)
    found = made.comparisons[0]
    if any(counted.done != counted.units * counted.calls for counted in work.values()):
        raise AssertionError("work was lost")
    truth = work["dense"].done / work["dense"].calls / (work["ticket"].done / work["ticket"].calls)
    expected = "cannot tell" if truth == 1 else "faster" if truth > 1 else "slower"
    return {
        **_row("known ratio", made.records, way),
        "units": list(units),
        "trial": trial,
        "truth": truth,
        **_ratio(found),
        "holds": _holds(found, truth),
        "off": round(found.ratio / truth - 1, 6),
        "ratio_in_processor_time": round(_processor_ratio(made.records), 4),
        "expected": expected,
    }


def profiler(way: Way) -> list[Row]:
    """Two engines timed by us, beside ONNX Runtime's own record of the same calls."""
    found, events = {}, {}
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as folder:
        sessions = {}
        for width in WIDTHS:
            options = session_options(1)
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/{width}"
            graph = network(width)
            engine = OrtSession(graph)
            engine._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            sessions[width] = engine
        image = np.random.default_rng(0).standard_normal((1, WIDTHS[0], IMAGE, IMAGE), np.float32)
        calls = {width: sessions[width].prepare({"input": image[:, :width]}) for width in WIDTHS}
        made = profile({"dense": calls[WIDTHS[0]], "ticket": calls[WIDTHS[1]]}, **way)
        for record, width in zip(made.records, WIDTHS, strict=True):
            profiled = json.loads(Path(sessions[width]._session.end_profiling()).read_text())
            found[width] = record
            events[width] = model_runs(profiled)
    theirs = {width: by_their_clock(found[width], events[width]) for width in WIDTHS}
    rows = [_beside(width, found[width], theirs[width], way) for width in WIDTHS]
    own, other = made.comparisons[0], compare(theirs[WIDTHS[0]], theirs[WIDTHS[1]])
    ratio = {
        **_row("ratio by ONNX Runtime's profiler", made.records, way),
        "truth": other.ratio,
        **_ratio(own),
        "holds": _holds(own, other.ratio),
        "off": round(own.ratio / other.ratio - 1, 6),
        "expected": other.verdict,
    }
    return [*rows, ratio]


def network(width: int) -> bytes:
    """``LAYERS`` convolutions of ``width`` channels with ReLUs, [1, width, IMAGE, IMAGE] to the same, as ONNX."""
    random = np.random.default_rng(width)
    nodes, weights, name = [], [], "input"
    for layer in range(LAYERS):
        weight = random.standard_normal((width, width, 3, 3), np.float32) / (3 * width**0.5)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"weight{layer}"))
        nodes.append(helper.make_node("Conv", [name, f"weight{layer}"], [f"conv{layer}"], pads=[1, 1, 1, 1]))
        name = "output" if layer == LAYERS - 1 else f"relu{layer}"
        nodes.append(helper.make_node("Relu", [f"conv{layer}"], [name]))
    shape = [1, width, IMAGE, IMAGE]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, shape) for end in ("input", "output")]
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def model_runs(profiled: Sequence[Row]) -> list[float]:
    """Milliseconds of every run in a profile of ONNX Runtime, whose unit is the microsecond."""
    return [event["dur"] / 1e3 for event in profiled if event["name"] == "model_run"]


def by_their_clock(record: LatencyRecord, runs_ms: Sequence[float]) -> LatencyRecord:
    """The record with the same calls by ONNX Runtime's clock: the last of ``runs_ms``, as warming up comes first."""
    blocks, place = [], len(runs_ms) - sum(map(len, record.samples_ms))
    for block in record.samples_ms:
        blocks.append(tuple(runs_ms[place : place + len(block)]))
        place += len(block)
    stats = summarise([sample for block in blocks for sample in block])
    return record.model_copy(update={"samples_ms": tuple(blocks), "stats": stats})


def _beside(width: int, ours: LatencyRecord, theirs: LatencyRecord, way: Way) -> Row:
    pairs = zip(_flat(ours), _flat(theirs), strict=True)
    more = sorted(1e3 * (own - other) for own, other in pairs)
    edge = len(more) // 100
    return {
        **_row("calls by ONNX Runtime's profiler", [ours], way),
        "layers": LAYERS,
        "width": width,
        "calls": len(more),
        "ours_p50_ms": round(median(_flat(ours)), 6),
        "theirs_p50_ms": round(median(_flat(theirs)), 6),
        "more_us": {"p1": round(more[edge], 3), "p50": round(median(more), 3), "p99": round(more[-1 - edge], 3)},
        "holds": more[edge] > -1.0,  # theirs is inside ours, and counts in whole microseconds
    }


def cold(way: Way) -> Row:
    """A sum over memory that fits the last cache, with warm and with cold caches."""
    values = np.ones(MEMORY, np.int64)  # [MEMORY], written, so that its pages are memory
    made = {cache: profile({"dense": values.sum}, cache=cache, **way).records[0] for cache in ("warm", "cold")}
    times = {cache: record.stats.p50 for cache, record in made.items() if record.stats is not None}
    return {
        **_row("cold caches", made.values(), way),
        "bytes": values.nbytes,
        "evicted_bytes": made["cold"].conditions.evicted_bytes,
        "calls": {cache: len(_flat(record)) for cache, record in made.items()},
        "p50_ms": {cache: round(time, 6) for cache, time in times.items()},
        "ratio": round(times["cold"] / times["warm"], 4),
        "holds": times["cold"] > times["warm"],
    }


def hyperfine(way: Way) -> Row:
    """Two processes, by hyperfine and by us; where it is not installed, a row that says so."""
    tool = shutil.which("hyperfine")
    if tool is None:
        return {**_row("hyperfine", [], way), "installed": False}
    commands = [[sys.executable, "-I", "-S", "-c", f"for _ in range({loops}): pass"] for loops in LOOPS]

    def running(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True)

    made = profile({"dense": running(commands[0]), "ticket": running(commands[1])}, **way)
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as folder:
        out = Path(folder) / "hyperfine.json"
        words = [tool, "--shell=none", "--warmup=2", "--style=none", f"--export-json={out}"]
        subprocess.run([*words, *map(shlex.join, commands)], check=True, stdout=subprocess.DEVNULL)
        results = json.loads(out.read_text())["results"]
    version = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    theirs = [1e3 * median(result["times"]) for result in results]
    ours = [record.stats.p50 for record in made.records if record.stats is not None]
    own, truth = made.comparisons[0], theirs[0] / theirs[1]
    return {
        **_row("hyperfine", made.records, way),
        "installed": True,
        "version": version,
        "ours_p50_ms": [round(time, 4) for time in ours],
        "theirs_p50_ms": [round(time, 4) for time in theirs],
        "truth": truth,
        **_ratio(own),
        "holds": _holds(own, truth),
        "off": round(own.ratio / truth - 1, 6),
    }


def _row(kind: str, records: Any, way: Way) -> Row:
    conditions = [record.conditions for record in records]
    return {
        "kind": kind,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "way": way,
        "cpus": next((c.cpus for c in conditions), None),
        "stats": {record.subject: asdict(record.stats) for record in records if record.stats is not None},
        "environment": environment(),
    }


def _ratio(found: Comparison) -> Row:
    interval = None if found.low is None or found.high is None else [found.low, found.high]
    return {"ratio": found.ratio, "interval": interval, "pairs": found.pairs, "verdict": found.verdict}


def _holds(found: Comparison, truth: float) -> str:
    """Whether the interval holds the truth: ``"yes"``, ``"within 1 %"``, which is no verdict either, or ``"no"``."""
    if found.low is None or found.high is None:
        return "no interval"
    if found.low * (1 - 1e-9) <= truth <= found.high * (1 + 1e-9):  # the last bits are rounding
        return "yes"
    near = found.low * (1 - REOPENING) <= truth <= found.high * (1 + REOPENING)
    return WITHIN if near else "no"


def _processor_ratio(records: Sequence[LatencyRecord]) -> float:
    dense, ticket = (record.cpu_ms for record in records)
    if not dense or not ticket:
        raise AssertionError("no processor time was counted")
    return dense / ticket


def _flat(record: LatencyRecord) -> list[float]:
    return [sample for block in record.samples_ms for sample in block]


def measurements(options: argparse.Namespace) -> Iterator[Row]:
    """Every measurement that was asked for, as it is made."""
    way = {"duration_s": options.seconds, "warmup_ms": 1e3 * min(0.2, options.seconds), "cpus": options.cpus}
    way["block_ms"] = min(50.0, 1e3 * options.seconds / 16)
    if "ratios" in options.parts:
        for trial in range(options.trials):
            for units in RATIOS:
                yield known_ratio(units, trial, way)
    if "profiler" in options.parts:
        yield from profiler(way)
    if "cold" in options.parts:
        yield cold(way)
    if "hyperfine" in options.parts:
        yield hyperfine({**way, "duration_s": 3 * options.seconds, "block_ms": 1.0})


PARTS = ("ratios", "profiler", "cold", "hyperfine")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seconds", type=float, default=1.25, help="timed seconds for each side of a pair")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each known ratio")
    parser.add_argument("--cpus", type=int, nargs="+", help="processors to run on; all by default")
    options = parser.parse_args()
    for row in measurements(options):
        before = options.out.read_bytes() if options.out.exists() else b""
        write_bytes(options.out, before + (json.dumps(row) + "\n").encode())
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    write_bytes(options.out.with_suffix(".md"), text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
