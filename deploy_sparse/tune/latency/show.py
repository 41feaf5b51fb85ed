"""A latency table for people: its numbers in sentences, tables and plots, as a report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ... import artifact
from ...measure.line_plot import LinePlot, Series
from ...measure.table import Table, significant, times
from ..run_report import ReportText, write_report
from .measure import Measured
from .multiple import Staircase
from .shapes import LayerShape
from .table import LatencyTable

HEAVIEST = 6  # layers in a plot


def write_table(folder: Path, measured: Measured, *, title: str, command: str) -> Path:
    """Write ``table.json``, the records of the whole networks and the report; returns the table's path.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    path = measured.table.save(folder / "table.json")
    records = measured.networks.records
    lines = "".join(f"{record.to_json_line()}\n" for record in records)
    artifact.write_bytes(folder / "records.jsonl", lines.encode())
    write_report(folder, records, report_text(measured.table, title=title, command=command))
    return path


def report_text(table: LatencyTable, *, title: str, command: str) -> ReportText:
    """What the report says besides the records."""
    return ReportText(
        title,
        tuple(summary(table)),
        tables=(cuts_table(table), layers_table(table), staircases_table(table)),
        conditions=(("command", command), ("batch of the layers", str(table.batch))),
        plots=tuple(plots(table)),
    )


def summary(table: LatencyTable) -> list[str]:
    """The table in a few sentences."""
    own = table.target["width_multiple"]
    points = sum(len(surface.points) + len(surface.checks) for surface in table.surfaces.values())
    share = 1 - table.rest_ms / table.dense_ms
    lines = [f"Round widths up to multiples of {table.multiple} on {table.target['name']}. {_against(table, own)}"]
    if not table.staircases:
        lines[0] = f"No layer is wide enough to read a multiple from; target {table.target['name']} says {own}."
    lines.append(
        f"Dense, at batch {table.batch}: {significant(table.dense_ms)} ms, of which {share:.0%} come with the "
        f"channels of {len(table.layers)} layers ({len(table.surfaces)} shapes, {points} measured points)."
    )
    if table.error is not None:
        lines.append(
            f"Predicted times of {len(table.cuts)} cut networks, each from the others, are off by at most "
            f"{table.error:.1%}."
        )
    if any(not surface.settled for surface in table.surfaces.values()):
        lines.append("Time ran out before every layer was refined; the same command goes on.")
    return lines


def cuts_table(table: LatencyTable) -> Table:
    """What narrower networks took, and what the table says of them."""
    rows = tuple(
        (
            cut.name,
            f"{cut.ratio:.3f}",
            None if cut.low is None or cut.high is None else f"{cut.low:.3f} to {cut.high:.3f}",
            None if cut.predicted is None else f"{cut.predicted:.3f}",
            None if cut.error is None else f"{100 * cut.error:+.1f} %",
            f"{cut.layers:.3f}",
        )
        for cut in table.cuts
    )
    note = (
        "Times as shares of the dense network's. Predicted: from the layers and what the other networks here say of "
        f"how much they count amid the network; all of them together say {significant(table.context, 3)} times what "
        "they take alone."
    )
    columns = ("network", "measured", "95 % interval", "predicted", "error", "layers alone")
    return Table("Whole networks against the table", columns, rows, note if rows else "No cut network was timed.")


def layers_table(table: LatencyTable) -> Table:
    """Every distinct layer at its dense widths."""
    rows = tuple(
        (
            str(shape),
            count,
            table.context * table.surfaces[shape].ms(shape.c_in, shape.c_out),
            f"{count * table.context * table.surfaces[shape].ms(shape.c_in, shape.c_out) / table.dense_ms:.1%}",
            len(table.surfaces[shape].points),
            _percent(table.surfaces[shape].error),
        )
        for shape, count in _by_time(table)
    )
    note = "Error: the largest at counts that were measured only to check the interpolation."
    return Table("Layers", ("layer", "uses", "ms", "of the network", "points", "error"), rows, note)


def staircases_table(table: LatencyTable) -> Table:
    """Where the multiple was read."""
    rows = tuple(
        (str(found.layer), found.multiple, times(found.dearest), f"{100 * found.noise:.1f} %")
        for found in table.staircases
    )
    columns = ("layer, with equal input and output channels", "multiple", "dearest count", "noise")
    note = "Dearest count: its time over its time when rounded up. Noise: standard error of a time."
    return Table("Multiples", columns, rows, note if rows else "")


def plots(table: LatencyTable) -> list[LinePlot]:
    """The staircases, and the heaviest layers over their input and output channels."""
    found = []
    if table.staircases:
        series = tuple(Series(str(s.layer), _relative(s)) for s in table.staircases)
        found.append(
            LinePlot("The staircase", "input and output channels", "time over that of the largest count", series)
        )
    heaviest = [shape for shape, _ in _by_time(table)[:HEAVIEST]]
    for name, along in (("input", "in"), ("output", "out")):
        series = tuple(
            Series(str(shape), points) for shape in heaviest if len(points := _edge(table, shape, along)) > 1
        )
        if series:
            found.append(LinePlot(f"Layers over their {name} channels", f"{name} channels", "ms alone", series))
    return found


def _edge(table: LatencyTable, shape: LayerShape, along: str) -> tuple[tuple[float, float | None], ...]:
    points = table.surfaces[shape].points.items()
    if along == "in":
        return tuple(sorted((float(i), ms) for (i, j), ms in points if shape.one_count or j == shape.c_out))
    return () if shape.one_count else tuple(sorted((float(j), ms) for (i, j), ms in points if i == shape.c_in))


def _relative(found: Staircase) -> tuple[tuple[float, float | None], ...]:
    ms = found.ms
    return tuple((float(count), time / ms[max(ms)]) for count, time in sorted(ms.items()))


def _against(table: LatencyTable, own: int) -> str:
    if table.multiple == own:
        return "The target's width_multiple is the same."
    if table.multiple == 1:
        return f"No multiple pays here, or the noise hides it; the target's width_multiple is {own}."
    return f"The target's width_multiple is {own}: set it to {table.multiple} to round to what was measured here."


def _by_time(table: LatencyTable) -> list[tuple[LayerShape, int]]:
    """Distinct layers and how often each is used, those that take most of the time first."""

    def time(entry: tuple[LayerShape, int]) -> float:
        shape, count = entry
        return -count * table.surfaces[shape].ms(shape.c_in, shape.c_out)

    return sorted(Counter(table.layers.values()).items(), key=time)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"
