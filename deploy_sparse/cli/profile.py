"""Time engines against a baseline: same inputs, interleaved in one run, ratios with intervals."""

from __future__ import annotations

import argparse
import json
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
    from ..train.interrupt import Interrupts

    pairs = [argument.partition("=") for argument in options.engines]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise ConfigError(
                f"{name + equals + path!r} is no subject",
                expected="NAME=ENGINE, for example dense=engines/out/dense-cpu-0123456789ab",
                fix="add the name",
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError("two engines have one name", expected="a name each", fix="rename one of them")
    engines = {name: open_entry(path) for name, _, path in pairs}
    with Interrupts("run the command again; nothing was written") as interrupts:
        made = profile(
            engines,
            options.baseline or pairs[0][0],
            batches=options.batch,
            duration_s=options.seconds,
            poll=interrupts.poll,
        )
    if options.out:
        made.save(Path(options.out))
    emit(options, {"records": [json.loads(r.to_json_line()) for r in made.records]}, made.table)
    return 0
