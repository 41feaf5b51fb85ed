"""A report one can mail: the same content as Markdown for a forge and as one self-contained HTML file.

The HTML holds its style and its plots inline, has no scripts and asks no network for anything. Records of several
networks have a chapter each; long lists and raw spread are folded away there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files

from . import contents, curves, figures, line_figure, report_conditions, slower
from .contents import Report as Report
from .contents import Sentence
from .contents import final_table as final_table
from .line_plot import LinePlot, values_table
from .table import Code, escape_markdown, markdown
from .table import Table as Table

MOST_ROWS_OPEN = 24  # of a table or list that can be folded; longer ones start folded


@dataclass(frozen=True)
class _Chapter:
    """What is shown of one network; ``title`` is empty where there is only one."""

    title: str
    sentences: tuple[Sentence, ...]
    main: Table
    spread: Table
    curves: tuple[LinePlot, ...]
    accuracy: tuple[figures.AccuracyPlot, ...]
    strips: tuple[figures.StripPlot, ...]

    @property
    def figures(self) -> tuple[line_figure.LineFigure, ...]:
        return tuple(map(line_figure.line_figure, self.curves))


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
        headlines=_headlines(report),
        chapters=_chapters(report),
        line_figures=[line_figure.line_figure(plot) for plot in report.plots],
        untimed=contents.untimed_table(report),
        slower=slower.slower(report),
        unclear=slower.unclear(report),
        missed=slower.missed(report),
        conditions=report_conditions.conditions_table(report),
        hashes=report_conditions.hashes_table(report),
        figure=figures,
        lines=line_figure,
        most_open=MOST_ROWS_OPEN,
    )


def _chapters(report: Report) -> tuple[_Chapter, ...]:
    """In order; the only one has no title, as all of the report is about it."""
    several, summarised = len(report.networks) > 1, bool(_headlines(report))
    return tuple(
        _Chapter(
            title=(chapter.title or "Network not named") if several else "",
            sentences=contents.subject_verdicts(chapter) if summarised else contents.verdicts(chapter),
            main=_told_once(contents.main_table(chapter), first=number == 0),
            spread=contents.spread_table(chapter),
            curves=curves.speed_up_plots(chapter),
            accuracy=figures.accuracy_plots(chapter),
            strips=figures.strip_plots(chapter),
        )
        for number, chapter in enumerate(report.chapters)
    )


def _told_once(table: Table, first: bool) -> Table:
    """How to read the table is said in the first chapter alone."""
    return table if first else replace(table, note=table.note.removesuffix(contents.READING).rstrip())


def _headlines(report: Report) -> tuple[Sentence, ...]:
    """A summary for each network, where there are too many verdicts to read them all first."""
    if len(report.networks) == 1 and len(contents.verdicts(report)) <= contents.MOST_SENTENCES:
        return ()
    return contents.headlines(report)


def _markdown_parts(report: Report) -> Iterator[str]:
    yield f"# {escape_markdown(report.title)}"
    yield from (escape_markdown(line) for line in report.provenance)
    chapters, headlines = _chapters(report), _headlines(report)
    yield "## Verdict"
    if headlines:
        yield _bullets(sentence.text for sentence in headlines)
        yield from _first(report)
    for chapter in chapters:
        if chapter.title:
            yield f"## {escape_markdown(chapter.title)}"
        if headlines:
            yield f"{'###' if chapter.title else '##'} Verdicts"
        yield _bullets(sentence.text for sentence in chapter.sentences)
        if not headlines:  # the only chapter has no title, and its sentences are the verdict
            yield from _first(report)
        for table in (chapter.main, *map(values_table, chapter.curves), chapter.spread):
            yield from _section(table, level=3 if chapter.title else 2)
    rest = [table for table in report.tables if not (table.first and chapters)]
    for table in (*rest, *map(values_table, report.plots)):
        yield from _section(table)
    yield from _section(contents.untimed_table(report), empty="Every engine was timed.")
    yield "## What got slower"
    yield _bullets(slower.slower(report))
    yield "### What cannot be told"
    yield _bullets(slower.unclear(report))
    yield from _section(slower.missed(report))
    yield from _section(report_conditions.conditions_table(report))
    yield from _section(report_conditions.hashes_table(report))


def _first(report: Report) -> Iterator[str]:
    for table in report.tables:
        if table.first:
            yield from _section(table)


def _section(table: Table, empty: str = "", level: int = 2) -> Iterator[str]:
    if table.rows or table.note or empty:
        yield f"{'#' * level} {escape_markdown(table.title)}"
        yield markdown(table) if table.rows else escape_markdown(empty or table.note)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)
