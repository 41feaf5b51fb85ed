"""Measure a suite: networks in sparse forms, on one or more targets, with one report. A stopped run is continued by the
same command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import join
from typing import Any

from .output import emit, result_text, table

EXAMPLES = """  deploy-sparse bench
  deploy-sparse bench smoke
  deploy-sparse bench channels --only "ResNet-18*" --batch 1
  deploy-sparse bench channels --target tensorrt torch-cuda --cuda-graph --out runs/bench-channels-gpu
  deploy-sparse bench ./my_suite.toml --seconds 2

without a suite, the shipped ones are listed; what the folder holds already is not measured again
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", nargs="?", help="a suite's name, or a TOML file; without it the names are listed")
    parser.add_argument("--target", nargs="+", metavar="NAME", default=[], help="targets instead of the suite's")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="batch sizes instead of the suite's")
    parser.add_argument("--out", help="folder of the records and the report; runs/bench-<suite> by default")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=[], help="networks, or NETWORK/FORM, with * and ?"
    )
    parser.add_argument("--cpus", type=int, nargs="+", metavar="N", default=[], help="processors to run on")
    parser.add_argument("--cuda-graph", action="store_true", help="replay runs as CUDA graphs, on targets for a GPU")
    parser.add_argument(
        "--seconds", type=float, help="timed seconds for each subject and batch; the suite's by default"
    )


def execute(options: argparse.Namespace) -> int:
    from ..suites.config import list_suites, load_suite

    if options.suite is None:
        suites = [load_suite(name) for name in list_suites()]
        value = [{"suite": s.name, "title": s.title, "about": s.about, "networks": len(s.networks)} for s in suites]
        rows = [(s.name, len(s.networks), s.title) for s in suites]
        emit(options, value, lambda: table(("suite", "networks", "title"), rows))
        return 0
    return _measure(options, load_suite(options.suite))


def _measure(options: argparse.Namespace, suite: Any) -> int:
    from ..config import config_from
    from ..measure.subjects import checked_batches
    from ..suites.config import Suite
    from ..suites.report import write_suite_report
    from ..suites.running import Selection, check, run
    from ..suites.state import opened
    from ..train.interrupt import Interrupts
    from ..tune.deliver import summary_of

    changes = {"seconds": options.seconds, "cuda_graph": options.cuda_graph or None}
    if changes := {key: value for key, value in changes.items() if value is not None}:
        given = suite.model_dump(mode="json", exclude_unset=True)
        suite = config_from(Suite, given, changes, source="the command line")
    batches = checked_batches(options.batch) if options.batch else ()
    selection = Selection(tuple(options.target), batches, tuple(options.only), tuple(options.cpus))
    check(suite, selection)
    folder = Path(options.out or f"runs/bench-{suite.name}")
    command = _command(options)
    with Interrupts(command) as interrupts, opened(folder, suite) as found:
        new = run(
            suite, found, selection, poll=interrupts.poll, say=lambda text: print(text, file=sys.stderr, flush=True)
        )
        report = write_suite_report(found, suite, command)
    value = {"folder": str(folder), "suite": suite.name, "new_records": new, "records": len(report.records)}
    value |= summary_of(report, folder)
    emit(options, value, lambda: _text(value))
    return 0


def _text(value: dict[str, Any]) -> str:
    told = f"{value['new_records']} new records, {value['records']} in {value['folder']}; report: {value['report']}"
    return f"{result_text(value)}\n\n{told}"


def _command(options: argparse.Namespace) -> str:
    words = ["deploy-sparse", "bench", options.suite]
    for name in ("target", "batch", "only", "cpus"):
        if given := getattr(options, name):
            words += [f"--{name}", *map(str, given)]
    for name in ("out", "seconds"):
        if (given := getattr(options, name)) is not None:
            words += [f"--{name}", f"{given:g}" if isinstance(given, float) else given]
    return join([*words, "--cuda-graph"] if options.cuda_graph else words)
