"""A report one can mail: the same content as Markdown for a forge and as one self-contained HTML file.

The HTML holds its style and its plots inline, has no scripts and asks no network for anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from . import contents, figures, line_figure
from .contents import Report as Report
from .contents import final_table as final_table
from .line_plot import values_table
from .table import Code, escape_markdown, markdown
from .table import Table as Table


def render_markdown(report: Report) -> str:
    """The report as GitHub Markdown, with tables in place of plots. Equal reports give equal text."""
    return "\n\n".join(part.strip("\n") for part in _markdown_parts(report)) + "\n"


def render_html(report: Report) -> str:
    """The report as one HTML document. Equal reports give equal text; every text of the report is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["code"] = lambda cell: isinstance(cell, Code)
    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        verdicts=contents.verdicts(report),
        main=contents.main_table(report),
        spread=contents.spread_table(report),
        untimed=contents.untimed_table(report),
        slower=contents.slower(report),
        conditions=contents.conditions_table(report),
        hashes=contents.hashes_table(report),
        accuracy_plots=figures.accuracy_plots(report),
        strip_plots=figures.strip_plots(report),
        line_figures=[line_figure.line_figure(plot) for plot in report.plots],
        figure=figures,
        lines=line_figure,
    )


def _markdown_parts(report: Report) -> Iterator[str]:
    yield f"# {escape_markdown(report.title)}"
    yield from (escape_markdown(line) for line in report.provenance)
    yield "## Verdict"
    yield _bullets(sentence.text for sentence in contents.verdicts(report))
    own = (contents.main_table(report), contents.spread_table(report))
    for table in (*own, *report.tables, *map(values_table, report.plots)):
        yield from _section(table)
    yield from _section(contents.untimed_table(report), empty="Every engine was timed.")
    yield "## What got slower"
    yield _bullets(contents.slower(report))
    yield from _section(contents.conditions_table(report))
    yield from _section(contents.hashes_table(report))


def _section(table: Table, empty: str = "") -> Iterator[str]:
    if table.rows or table.note or empty:
        yield f"## {escape_markdown(table.title)}"
        yield markdown(table) if table.rows else escape_markdown(empty or table.note)


def _bullets(lines: Iterator[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)
