"""Time engines against a baseline: same inputs, interleaved in one run, ratios with intervals."""

from __future__ import annotations

import argparse
import json
from glob import glob
from pathlib import Path

from .output import emit

EXAMPLES = """  deploy-sparse profile dense=engines/out/dense-cpu-0123456789ab ticket=engines/out/ticket-cpu-ba98765
  deploy-sparse profile a=A b=B --baseline a --batch 1 8 32 --out records.jsonl
  deploy-sparse profile a=A b=B --cpus 0 1 --cold
  deploy-sparse profile a=A b=B --cuda-graph --seconds 3 --iterations 100
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE", help="a name and an engine's folder")
    parser.add_argument("--baseline", help="the name the others are compared with; the first one by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes; 1 by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each engine and batch")
    parser.add_argument("--iterations", type=int, metavar="N", help="timed calls of each, at least; 10 by default")
    parser.add_argument("--warmup", type=float, metavar="MS", help="untimed ms before that; 200 by default")
    parser.add_argument("--cpus", type=int, nargs="+", metavar="N", help="processors to run on; all by default")
    parser.add_argument("--cold", action="store_true", help="evict the processor's caches before each call")
    parser.add_argument("--transfers", action="store_true", help="time from and to NumPy arrays, with copies to a GPU")
    parser.add_argument("--cuda-graph", action="store_true", help="replay runs as CUDA graphs; for engines on a GPU")
    parser.add_argument("--out", help="file of JSON lines to append the records to")


def execute(options: argparse.Namespace) -> int:
    from ..engine.entry import open_entry
    from ..errors import ConfigError
    from ..measure.interleave import MIN_ITERATIONS, WARMUP_MS
    from ..measure.profile import profile
    from ..measure.record import check_appendable
    from ..train.interrupt import Interrupts

    pairs = [_pair(argument) for argument in options.engines]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError("two engines have one name", expected="a name each", fix="rename one of them")
    engines = {name: open_entry(path) for name, path in pairs}
    if options.out:
        check_appendable(Path(options.out))
    with Interrupts("run the command again") as interrupts:
        made = profile(
            engines,
            options.baseline or pairs[0][0],
            batches=options.batch,
            duration_s=options.seconds,
            min_iterations=MIN_ITERATIONS if options.iterations is None else options.iterations,
            warmup_ms=WARMUP_MS if options.warmup is None else options.warmup,
            cache="cold" if options.cold else "warm",
            transfers="included" if options.transfers else "excluded",
            cuda_graph=options.cuda_graph,
            cpus=options.cpus,
            poll=lambda: interrupts.poll("no record was written"),
        )
    try:  # what was measured is kept though nobody may read on, and shown though it cannot be kept
        if options.out:
            made.save(Path(options.out))
    finally:
        emit(options, {"records": [json.loads(r.to_json_line()) for r in made.records]}, made.table)
    return 0


def _pair(argument: str) -> tuple[str, Path]:
    """``NAME=ENGINE``; a pattern in ENGINE that one folder matches stands for it, as shells do not expand it there."""
    from ..errors import ArtifactError, ConfigError

    name, _, path = argument.partition("=")
    if not (name and path):
        raise ConfigError(
            f"{argument!r} is no subject", expected="NAME=ENGINE, for example dense=engines/out/dense-cpu-0123456789ab",
            fix="add the name",
        )  # fmt: skip
    if "*" not in path:
        return name, Path(path)
    found = sorted(glob(path))
    if len(found) != 1:
        raise ArtifactError(
            f"{path} matches {', '.join(found) or 'nothing'}", expected="one engine", fix="write out the folder's name"
        )
    return name, Path(found[0])
