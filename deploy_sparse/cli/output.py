"""How results reach standard output: aligned text, or one JSON value."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def emit(options: argparse.Namespace, value: Any, text: Callable[[], str]) -> None:
    """Print ``value`` as JSON when asked for, otherwise ``text()``."""
    print(json.dumps(value, indent=2) if options.json else text())


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text, numbers flush right."""
    from ..measure.table import Table, plain

    return plain(Table("", tuple(columns), tuple(map(tuple, rows)))).rstrip("\n")


def key_values(pairs: dict[str, Any]) -> str:
    """``key  value`` lines, keys aligned."""
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in pairs.items())


def result_text(result: Mapping[str, Any]) -> str:
    """What a recipe found: the timed table, the verdicts, and the engines that were compiled only."""
    parts = []
    for name in ("timed", "verdicts", "not_timed"):
        part = result.get(name)
        if isinstance(part, Mapping) and part["rows"]:
            parts.append(table(part["columns"], part["rows"]))
        elif isinstance(part, list) and part:
            parts.append("\n".join(part))
    parts += [f"not built: {target}: {why}" for target, why in result.get("not_built", {}).items()]
    return "\n\n".join(parts)
