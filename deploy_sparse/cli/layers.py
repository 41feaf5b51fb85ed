"""Where the time goes: layers of two engines side by side, and why a layer did not gain what its MACs predict."""

from __future__ import annotations

import argparse

from .output import emit

EXAMPLES = """  deploy-sparse layers dense=engines/out/dense-cpu-0123456789ab sparse=engines/out/ticket-cpu-ba9876543210
  deploy-sparse layers dense=A sparse=B --batch 32 --rows 50
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", nargs=2, metavar="NAME=ENGINE", help="the dense one, then the other")
    parser.add_argument("--batch", type=int, help="samples of a run; the smallest that the first one takes by default")
    parser.add_argument("--seconds", type=float, default=2.5, help="under the profiler, for each engine")
    parser.add_argument("--rows", type=int, default=20, help="layers to show before the rest is added up")


def execute(options: argparse.Namespace) -> int:
    from ..errors import ConfigError
    from ..measure.table import plain
    from ..train.interrupt import Interrupts
    from ..tune.layers import ROUNDS, profile_layers
    from .profile import _pair

    (first, dense), (second, sparse) = (_pair(argument) for argument in options.engines)
    if first == second:
        raise ConfigError("both engines have one name", expected="a name each", fix="rename one of them")
    if not options.seconds > 0 or options.rows < 1:
        raise ConfigError(
            f"{options.seconds} seconds and {options.rows} rows", expected="more than none", fix="leave both out"
        )
    with Interrupts("run the command again") as interrupts:
        report = profile_layers(
            dense,
            sparse,
            options.batch,
            names=(first, second),
            seconds=options.seconds / ROUNDS,
            poll=lambda: interrupts.poll("nothing was kept"),
        )
    emit(options, report.as_json(), lambda: plain(report.table(options.rows)).rstrip("\n"))
    return 0
