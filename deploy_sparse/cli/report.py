"""Write report.md and report.html again from a run folder, or from a file of records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote

from .output import emit

EXAMPLES = """  deploy-sparse report runs/imp_refill-resnet_digits
  deploy-sparse report records.jsonl --title "ResNet-18" --out reports
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run folder, or a .jsonl file of records")
    parser.add_argument("--out", help="folder to write to; beside the source by default")
    parser.add_argument("--title", help="title; only with a file of records")


def execute(options: argparse.Namespace) -> int:
    from ..errors import ArtifactError, ConfigError
    from ..measure.compare import compare_all
    from ..measure.contents import Report
    from ..measure.record import read_records
    from ..tune.deliver import summary_of
    from ..tune.run_report import load_report, write_report_files

    source = Path(options.source)
    folder = Path(options.out) if options.out else source if source.is_dir() else source.parent
    if source.is_dir():
        if options.title:
            raise ConfigError("--title with a run folder", expected="--title only with records", fix="leave it out")
        if not (source / "report.json").is_file():
            raise ArtifactError(
                f"{source} holds no finished run", expected="a run folder with report.json", fix=_finish(source)
            )
        report = load_report(source)
    else:
        if (folder / "run.json").is_file():
            raise ArtifactError(
                f"{folder} holds a run with a report of its own",
                expected="a folder for the report of these records alone",
                fix=f"render the run's report with deploy-sparse report {folder}, or choose a folder with --out DIR",
            )
        records = read_records(source)
        report = Report(options.title or source.stem, records, compare_all(records))
        if (source.parent / "report.json").is_file():
            whole = f"deploy-sparse report {quote(str(source.parent))}"
            print(f"note: these are the records alone; the run's tables and curves come with: {whole}", file=sys.stderr)
    write_report_files(folder, report)
    value = summary_of(report, folder)
    emit(
        options, value, lambda: "\n".join([*value["verdicts"], str(folder / "report.md"), str(folder / "report.html")])
    )
    return 0


def _finish(folder: Path) -> str:
    from ..train.run import read_run

    if not (folder / "run.json").is_file():
        return "check the path"
    run = read_run(folder)
    return f"the run is {run.get('status')}; continue it with: {run.get('command')}"
