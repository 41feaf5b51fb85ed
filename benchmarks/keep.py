"""Keep a finished run's records under benchmarks/records/<device>/<run> and bring the pages' tables up to date."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from deploy_sparse.measure.contents import final_table
from deploy_sparse.measure.table import markdown
from deploy_sparse.tune.run_report import load_report, write_report_files

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RECORD = re.compile(r"<!-- record: (\S+) -->\n(.*?)<!-- end of record -->", re.DOTALL)
RESULTS = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- end of results -->", re.DOTALL)


def keep(run: Path, device: str) -> Path:
    """Copy the run's records and render its reports; returns the record's folder."""
    folder = ROOT / "benchmarks" / "records" / device / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("records.jsonl", "report.json"):
        shutil.copyfile(run / name, folder / name)
    write_report_files(folder, load_report(folder))
    return folder


def with_tables(page: str) -> str:
    """A page's text with every marked table taken from its record."""

    def report(match: re.Match[str]) -> str:
        text = markdown(final_table(load_report(ROOT / match[1])))
        return f"<!-- record: {match[1]} -->\n{text}<!-- end of record -->"

    def results(match: re.Match[str]) -> str:
        return f"<!-- results: {match[1]} -->\n{(ROOT / match[1]).read_text()}<!-- end of results -->"

    return RESULTS.sub(results, RECORD.sub(report, page))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a finished run's folder; without one only pages are updated")
    parser.add_argument("device", nargs="?", help="name of the device's folder, for example cpu-2-cores")
    options = parser.parse_args()
    if options.run is not None:
        if options.device is None:
            parser.error("a run needs its device's name: keep.py RUN DEVICE")
        print(keep(options.run, options.device))
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
