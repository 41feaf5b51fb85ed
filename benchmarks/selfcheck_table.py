"""The tables of the self-check."""

from __future__ import annotations

from typing import Any

from deploy_sparse.measure.compare import REOPENING
from deploy_sparse.measure.table import Table, markdown

WITHIN = f"within {REOPENING:.0%}"

Row = dict[str, Any]


def text(rows: list[Row]) -> str:
    """The measurements as Markdown tables, those that were made."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    tables = (
        _known_table(kinds.get("known ratio", [])),
        _calls_table(kinds.get("calls by ONNX Runtime's profiler", [])),
        _theirs_table(kinds.get("ratio by ONNX Runtime's profiler", []) + _installed(kinds)),
        _cold_table(kinds.get("cold caches", [])),
    )
    parts = [markdown(table) for table in tables if table.rows]
    if "hyperfine" in kinds and not _installed(kinds):
        parts.append("hyperfine is not installed here, so nothing was compared with it.\n")
    return "\n".join(parts)


def _installed(kinds: dict[str, list[Row]]) -> list[Row]:
    return [row for row in kinds.get("hyperfine", []) if row["installed"]]


def _known_table(rows: list[Row]) -> Table:
    cells = tuple(
        (
            f"{row['units'][0]} : {row['units'][1]}",
            f"{row['truth']:.3f}",
            *_cells(row),
            f"{row['ratio_in_processor_time']:.3f}",
            row["verdict"],
            row["expected"],
        )
        for row in rows
    )
    held = sum(row["holds"] == "yes" for row in rows)
    near = sum(row["holds"] in ("yes", WITHIN) for row in rows)
    right = sum(row["verdict"] == row["expected"] for row in rows)
    columns = (
        *("work", "true ratio", "ratio (95 % interval)", "off", "pairs", "holds the truth", "in processor time"),
        *("verdict", "right one"),
    )
    note = (
        f"{held} of {len(rows)} intervals hold the truth, {near} with {REOPENING:.0%} on both sides, inside which no "
        f"verdict is given; {right} of {len(rows)} verdicts are right."
    )
    return Table("Known ratios", columns, cells, note)


def _calls_table(rows: list[Row]) -> Table:
    cells = tuple(
        (
            f"{row['layers']} convolutions, {row['width']} channels",
            row["calls"],
            row["ours_p50_ms"],
            row["theirs_p50_ms"],
            *(row["more_us"][name] for name in ("p1", "p50", "p99")),
            "yes" if row["holds"] else "no",
        )
        for row in rows
    )
    columns = (
        *("network", "calls", "p50 ms, ours", "p50 ms, ONNX Runtime's", "ours is longer by µs, p1", "p50", "p99"),
        "theirs is inside ours",
    )
    note = "The same calls on both clocks. What ours has more is the call from Python, and its way back."
    return Table("Calls beside ONNX Runtime's own profiler", columns, cells, note)


def _theirs_table(rows: list[Row]) -> Table:
    cells = tuple((_tool(row), f"{row['truth']:.4f}", *_cells(row)) for row in rows)
    columns = ("by", "its ratio", "our ratio (95 % interval)", "off", "pairs", "holds it")
    return Table("Ratios beside other tools", columns, cells)


def _tool(row: Row) -> str:
    known = row["environment"].get("onnxruntime", "")
    return f"{row['version']}, processes" if row["kind"] == "hyperfine" else f"ONNX Runtime {known}, the same calls"


def _cold_table(rows: list[Row]) -> Table:
    cells = tuple(
        (
            f"{row['bytes'] >> 20} MiB",
            f"{row['evicted_bytes'] >> 20} MiB",
            *(row["p50_ms"][cache] for cache in ("warm", "cold")),
            f"{row['ratio']:.2f}×",
            "yes" if row["holds"] else "no",
        )
        for row in rows
    )
    columns = ("a sum over", "read before each call", "p50 ms, warm", "p50 ms, cold", "cold / warm", "cold is slower")
    return Table("Cold caches", columns, cells)


def _cells(row: Row) -> tuple[str, str, int, str]:
    low, high = row["interval"] or (float("nan"), float("nan"))
    interval = f"{row['ratio']:.4f} ({low:.4f} to {high:.4f})"
    return interval, f"{row['off']:+.2%}", row["pairs"], row["holds"]
