"""Numbers as people read them, and tables of them as plain text and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

UNKNOWN = "–"

Cell = str | int | float | None


class Code(str):
    """Text of a cell to be copied as it is, for example a command; shown as a code span."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A titled table; every row has one cell for each column.

    Cells are text, numbers (shown with at most four significant digits) or None (unknown). A column is set flush
    right when its cells are numbers or look like them. In a report those that are ``first`` stand unfolded right after
    the verdict.

    Raises:
        ConfigError: a row of another length than ``columns``.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    first: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"row {number} of the table {self.title!r} has {len(row)} cells",
                    expected=f"{len(self.columns)}, one for each of: {', '.join(self.columns)}",
                    fix="give None for a cell that is unknown",
                )

    @property
    def cells(self) -> tuple[tuple[str, ...], ...]:
        """The rows as text."""
        return tuple(tuple(cell_text(cell) for cell in row) for row in self.rows)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether it is set flush right."""
        return tuple(
            any(cell != UNKNOWN for cell in column) and all(cell == UNKNOWN or _looks_numeric(cell) for cell in column)
            for column in (tuple(row[i] for row in self.cells) for i in range(len(self.columns)))
        )


def significant(value: float, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits and no exponent: 0.012345 -> ``0.01235``, 1234.5 -> ``1234``."""
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(decimals, 0)}f}"


def count(value: float | None) -> str:
    """A count with its prefix: 512, 12.35k, 1.235M, 2.1G."""
    if value is None:
        return UNKNOWN
    for factor, prefix in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if prefix == "T" or float(f"{abs(value) / factor:.4g}") < 1000:
            break
    text = significant(value / factor)
    return (text.rstrip("0").rstrip(".") if "." in text else text) + prefix


def times(ratio: float | None) -> str:
    """A ratio: ``1.84×``."""
    return UNKNOWN if ratio is None else f"{significant(ratio, 3)}×"


def ratio_and_interval(ratio: float, low: float, high: float) -> tuple[str, str]:
    """``("1.84×", "1.79 to 1.90")``: equal decimals, one more where the interval comes close to 1."""
    decimals = 3 if low < 1.1 else 2 if low < 10 else 1
    return f"{ratio:.{decimals}f}×", f"{low:.{decimals}f} to {high:.{decimals}f}"


def percent(fraction: float | None) -> str:
    """A fraction as ``97.22 %``."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.2f} %"


def cell_text(cell: Cell) -> str:
    """A table cell as text."""
    if cell is None:
        return UNKNOWN
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return count(cell) if abs(cell) >= 10_000 else str(cell)
    return significant(cell) if isinstance(cell, float) else cell


def plain(table: Table) -> str:
    """The table as aligned plain text, two spaces between columns."""
    lines = [table.columns, *table.cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    numeric = table.numeric

    def row(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    text = [row(table.columns), "  ".join("-" * width for width in widths), *(row(cells) for cells in table.cells)]
    return "\n".join([*text, *([table.note] if table.note else [])]) + "\n"


def markdown(table: Table) -> str:
    """The table as GitHub Markdown, without its title."""
    rule = ["---:" if right else ":---" for right in table.numeric]
    lines = [[escape_markdown(name) for name in table.columns], rule]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.cells]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return text + (f"\n{escape_markdown(table.note)}\n" if table.note else "")


def escape_markdown(text: str) -> str:
    """``text`` on one line with every character that Markdown or HTML would read as markup made harmless."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*_[]|~#" else character for character in text)


def _markdown_cell(cell: str) -> str:
    """A code span shows everything as it is but the bar, which ends a table's cell even there unless escaped."""
    text = " ".join(cell.strip().splitlines())
    if not isinstance(cell, Code) or not text or "\\|" in text:  # a bar after a backslash has no form in a code span
        return escape_markdown(cell)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _looks_numeric(cell: str) -> bool:
    return re.fullmatch(r"[+−-]?\d[\d.]*( ?[%×kMGT])?", cell) is not None
