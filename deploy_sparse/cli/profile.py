"""Time engines against a baseline: same inputs, interleaved in one run, ratios with intervals."""

from __future__ import annotations

import argparse
import json
from glob import glob
from pathlib import Path

from .output import emit

EXAMPLES = """  deploy-sparse profile dense=engines/out/dense-cpu-0123456789ab ticket=engines/out/ticket-cpu-ba98765
  deploy-sparse profile a=A b=B --baseline a --batch 1 8 32 --out records.jsonl
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE", help="a name and an engine's folder")
    parser.add_argument("--baseline", help="the name the others are compared with; the first one by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes; 1 by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each engine and batch")
    parser.add_argument("--out", help="file of JSON lines to append the records to")


def execute(options: argparse.Namespace) -> int:
    from ..engine.entry import open_entry
    from ..errors import ConfigError
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
            poll=lambda: interrupts.poll("no record was written"),
        )
    emit(options, {"records": [json.loads(r.to_json_line()) for r in made.records]}, made.table)
    if options.out:
        made.save(Path(options.out))
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
