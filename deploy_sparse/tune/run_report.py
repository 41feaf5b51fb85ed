"""The report files of a run folder, and how they are rendered again from what is stored beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import artifact
from ..errors import ArtifactError, ConfigError
from ..measure.compare import compare_all
from ..measure.contents import Report
from ..measure.line_plot import LinePlot, Series
from ..measure.record import LatencyRecord, read_records
from ..measure.report import render_html, render_markdown
from ..measure.table import Table


@dataclass(frozen=True)
class ReportText:
    """What a report says besides its records; kept as ``report.json``."""

    title: str
    provenance: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    plots: tuple[LinePlot, ...] = ()


def write_report(folder: Path, records: Sequence[LatencyRecord], text: ReportText) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder`` and return the report."""
    tables = list(map(_stored, text.tables))
    body: dict[str, Any] = {"kind": "report", "title": text.title, "provenance": text.provenance, "tables": tables}
    body["conditions"] = text.conditions
    if text.plots:
        body["plots"] = [asdict(plot) for plot in text.plots]
    artifact.write_json(folder / "report.json", {**body, "digest": artifact.digest_of(body)})
    report = _report(records, text)
    write_report_files(folder, report)
    return report


def load_report(folder: Path) -> Report:
    """Read a run folder's records and report text again.

    Raises:
        ArtifactError: no such files, or damaged ones.
    """
    stored = artifact.read_json(folder / "report.json")
    digest = stored.pop("digest", None) if isinstance(stored, dict) else None
    if digest is None or artifact.digest_of(stored) != digest:
        raise ArtifactError(
            f"{folder / 'report.json'} is damaged",
            expected="the report text as a run wrote it",
            fix="continue the run with --resume; it is written again",
        )
    try:
        tables = tuple(
            Table(t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"])), t["note"], t.get("first", False))
            for t in stored["tables"]
        )
        conditions = tuple((label, value) for label, value in stored["conditions"])
        plots = tuple(map(_plot, stored.get("plots", ())))  # reports of earlier versions have none
        text = ReportText(stored["title"], tuple(stored["provenance"]), tables, conditions, plots)
    except (KeyError, TypeError, ValueError, ConfigError) as problem:
        raise ArtifactError(
            f"{folder / 'report.json'} is no report text ({problem!r})",
            expected="the file a run wrote",
            fix="continue the run with --resume",
        ) from None
    return _report(read_records(folder / "records.jsonl"), text)


def _report(records: Sequence[LatencyRecord], text: ReportText) -> Report:
    return Report(
        text.title,
        tuple(records),
        compare_all(records),
        text.provenance,
        tables=text.tables,
        conditions=text.conditions,
        plots=text.plots,
    )


def _stored(table: Table) -> dict[str, Any]:
    plain = {"title": table.title, "columns": table.columns, "rows": table.rows, "note": table.note}
    return {**plain, "first": True} if table.first else plain


def _plot(stored: Mapping[str, Any]) -> LinePlot:
    """A plot as it was stored; earlier versions knew no intervals and no predictions."""
    plain = {key: value for key, value in stored.items() if key != "series"}
    return LinePlot(series=tuple(map(_series, stored["series"])), **plain)


def _series(stored: Mapping[str, Any]) -> Series:
    return Series(
        stored["label"],
        tuple((x, y) for x, y in stored["points"]),
        tuple(bounds and (bounds[0], bounds[1]) for bounds in stored.get("intervals", ())),
        tuple(stored.get("predicted", ())),
    )


def write_report_files(folder: Path, report: Report, name: str = "report") -> None:
    """Write ``report.md`` and ``report.html`` into ``folder``, or files of another name."""
    artifact.write_bytes(folder / f"{name}.md", render_markdown(report).encode())
    artifact.write_bytes(folder / f"{name}.html", render_html(report).encode())
