"""Write report.md and report.html again from a run folder, or reports for each device from the records of several."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from .output import emit

if TYPE_CHECKING:
    from ..measure.contents import Report
    from ..measure.device_report import Source

EXAMPLES = """  deploy-sparse report runs/imp_refill-resnet_digits
  deploy-sparse report records.jsonl --title "ResNet-18" --out reports
  deploy-sparse report runs/first runs/second more.jsonl --out reports
  deploy-sparse report benchmarks/records/cpu-2-cores --out reports
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder with records.jsonl, such as a run's; a folder of such folders; or a .jsonl file of records",
    )
    parser.add_argument(
        "--out",
        help="folder to write to; beside the source by default, or in the folder that holds all sources. One source "
        "with one device gives report.md and report.html, else the files are named after the device",
    )
    parser.add_argument("--title", help="title of every report; not with a single run folder, which has its own")


def execute(options: argparse.Namespace) -> int:
    from ..measure.device_report import device_reports, file_names
    from ..tune.run_report import load_report

    given = [Path(source) for source in options.sources]
    folder = Path(options.out) if options.out else _beside(given)
    places = list(dict.fromkeys(place for path in given for place in _places(path)))
    if len(places) == 1:
        _check_single(places[0], folder, options.title)
        if (places[0] / "report.json").is_file():
            return _write(options, folder, {"report": load_report(places[0])})
    sources = [_source(place) for place in places]
    title = options.title or (_name(places[0]) if len(places) == 1 else None)
    reports = device_reports(sources, title)
    names = file_names(reports)
    if len(places) == len(reports) == 1:
        names = dict.fromkeys(reports, "report")
    return _write(options, folder, {names[device]: report for device, report in reports.items()})


def _write(options: argparse.Namespace, folder: Path, reports: Mapping[str, Report]) -> int:
    """Write every report under its name and say what they say; one report alone is the JSON value itself."""
    from ..tune.deliver import summary_of
    from ..tune.run_report import write_report_files

    values = {}
    for name, report in reports.items():
        write_report_files(folder, report, name)
        values[name] = {**summary_of(report, folder), "report": str(folder / f"{name}.html")}
    value = next(iter(values.values())) if len(values) == 1 else {"reports": values}
    emit(options, value, lambda: "\n\n".join(_text(folder, name, report) for name, report in reports.items()))
    return 0


def _text(folder: Path, name: str, report: Report) -> str:
    from ..measure.contents import MOST_SENTENCES, headlines, verdicts

    sentences = [sentence for sentence in verdicts(report) if sentence.kind != "not timed"]
    if len(sentences) > MOST_SENTENCES:
        sentences = list(headlines(report))
    files = [str(folder / f"{name}.{kind}") for kind in ("md", "html")]
    return "\n".join([*(sentence.text for sentence in sentences), *files])


def _places(path: Path) -> list[Path]:
    """The folders with records, and the files of records, that ``path`` stands for."""
    from ..errors import ArtifactError

    if not path.is_dir():
        return [path]
    if (path / "records.jsonl").is_file() and ((path / "report.json").is_file() or not (path / "run.json").is_file()):
        return [path]
    found = [] if (path / "run.json").is_file() else sorted({file.parent for file in path.rglob("records.jsonl")})
    if not found:
        raise ArtifactError(
            f"{path} holds no finished run",
            expected="a run folder with report.json, or a folder with records.jsonl in it or below it",
            fix=_finish(path),
        )
    return [place for folder in found for place in _places(folder)]


def _source(place: Path) -> Source:
    from ..measure.device_report import Source
    from ..measure.record import read_records
    from ..tune.run_report import load_report

    if place.is_dir() and (place / "report.json").is_file():
        own = load_report(place)
        return Source(own.title, own.records, own.provenance, own.tables, own.conditions, own.plots)
    if place.is_dir():
        return Source(_name(place), read_records(place / "records.jsonl"))
    return Source(_name(place), read_records(place))


def _name(place: Path) -> str:
    """What records are called that do not say it themselves: their folder's name, or their file's."""
    whole = place.resolve()
    return whole.name if place.is_dir() else whole.parent.name if place.stem == "records" else place.stem


def _beside(sources: Sequence[Path]) -> Path:
    """Where reports are written by default: in the folder that holds all sources, or is the only one."""
    from ..errors import ConfigError

    folders = [source if source.is_dir() else source.parent for source in sources]
    if len(folders) == 1:
        return folders[0]
    shared = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if shared == Path(shared.anchor):
        raise ConfigError(
            "no folder holds all sources but the root", expected="a folder to write to", fix="name one with --out"
        )
    return shared


def _check_single(place: Path, folder: Path, title: str | None) -> None:
    """Keep a run's own report from being replaced by one of its records alone, or renamed."""
    from ..errors import ArtifactError, ConfigError

    if place.is_dir():
        if title and (place / "report.json").is_file():
            raise ConfigError("--title with a run folder", expected="--title only with records", fix="leave it out")
        return
    if (folder / "run.json").is_file():
        raise ArtifactError(
            f"{folder} holds a run with a report of its own",
            expected="a folder for the report of these records alone",
            fix=f"render the run's report with deploy-sparse report {folder}, or choose a folder with --out DIR",
        )
    if (place.parent / "report.json").is_file():
        whole = f"deploy-sparse report {quote(str(place.parent))}"
        print(f"note: these are the records alone; the run's tables and curves come with: {whole}", file=sys.stderr)


def _finish(folder: Path) -> str:
    from ..train.run import read_run

    if not (folder / "run.json").is_file():
        other = sorted(path.name for path in folder.glob("*.jsonl"))
        return f"check the path, or name files of records, such as {folder / other[0]}" if other else "check the path"
    run = read_run(folder)
    return f"the run is {run.get('status')}; continue it with: {run.get('command')}"
