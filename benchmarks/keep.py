"""Keep a finished run's records under benchmarks/records/<device>/<run> and bring the README's tables up to date."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from deploy_sparse.measure.contents import final_table
from deploy_sparse.measure.table import markdown
from deploy_sparse.tune.run_report import load_report, write_report_files

ROOT = Path(__file__).resolve().parent.parent
RECORD = re.compile(r"<!-- record: (\S+) -->\n(.*?)<!-- end of record -->", re.DOTALL)


def keep(run: Path, device: str) -> Path:
    """Copy the run's records and render its reports; returns the record's folder."""
    folder = ROOT / "benchmarks" / "records" / device / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("records.jsonl", "report.json"):
        shutil.copyfile(run / name, folder / name)
    write_report_files(folder, load_report(folder))
    return folder


def with_tables(readme: str) -> str:
    """The README's text with every marked table rendered from its record."""

    def table(match: re.Match[str]) -> str:
        text = markdown(final_table(load_report(ROOT / match[1])))
        return f"<!-- record: {match[1]} -->\n{text}<!-- end of record -->"

    return RECORD.sub(table, readme)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("device", help="name of the device's folder, for example cpu-2-cores")
    options = parser.parse_args()
    print(keep(options.run, options.device))
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
