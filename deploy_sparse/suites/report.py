"""The report of a suite's run, written from what its folder holds."""

from __future__ import annotations

from ..errors import ArtifactError
from ..measure.contents import Report
from ..tune.run_report import ReportText, write_report
from .config import Suite
from .state import Folder
from .tables import Measured, tables

_WEIGHTS = (
    "not trained: tickets are one-shot on random weights and stand here for their times, unless a subject says "
    "otherwise"
)


def write_suite_report(folder: Folder, suite: Suite, command: str = "") -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` of all records so far, and return the report.

    Raises:
        ArtifactError: there is no record yet, or the folder cannot be written.
    """
    records = folder.records
    if not records:
        raise ArtifactError(
            f"{folder.path} holds no record yet", expected="a suite that has measured something", fix="run it first"
        )
    text = ReportText(
        title=suite.title,
        provenance=(f"Suite {suite.name} ({suite.digest[:16]})", *((suite.about,) if suite.about else ())),
        tables=tables(Measured(suite, records, folder.subjects, folder.layers)),
        conditions=(("weights", _WEIGHTS), *((("command", command),) if command else ())),
    )
    return write_report(folder.path, records, text)
