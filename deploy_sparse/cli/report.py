"""Write report.md and report.html again from a run folder, or from a file of records."""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import emit

EXAMPLES = """  deploy-sparse report runs/imp_refill-resnet_digits
  deploy-sparse report records.jsonl --title "ResNet-18" --out reports
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run folder, or a .jsonl file of records")
    parser.add_argument("--out", help="folder to write to; beside the source by default")
    parser.add_argument("--title", help="title; only with a file of records")


def execute(options: argparse.Namespace) -> int:
    from ..errors import ConfigError
    from ..measure.record import read_records
    from ..tune.deliver import summary_of
    from ..tune.run_report import ReportText, load_report, write_report, write_report_files

    source = Path(options.source)
    if source.is_dir():
        if options.title:
            raise ConfigError(
                "--title with a run folder", expected="--title only with a .jsonl file", fix="leave it out"
            )
        folder = Path(options.out) if options.out else source
        report = load_report(source)
        write_report_files(folder, report)
    else:
        folder = Path(options.out) if options.out else source.parent
        report = write_report(folder, read_records(source), ReportText(options.title or source.stem))
    value = summary_of(report, folder)
    emit(
        options, value, lambda: "\n".join([*value["verdicts"], str(folder / "report.md"), str(folder / "report.html")])
    )
    return 0
