"""How many groups a layer is divided into, and how many rows each gets."""

from __future__ import annotations

from collections.abc import Sequence

from .rule import RegroupRule
from .table import Limits, Table

DEFAULT_PARTS = 8
"""The program's number of parts."""


def up_to(number: int, multiple: int) -> int:
    """``number`` rounded up to a multiple."""
    return -(-number // multiple) * multiple


def equal_shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` shares that differ by at most one, larger first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def group_sizes(rows: int, least: int, rule: RegroupRule) -> list[int]:
    """Rows of each group of a partition of ``rows`` rows into multiples of the tile, the remainder in the last.

    No more groups than ``rule.parts``, and none smaller than ``least``. Only the program's rule, given its number of
    parts explicitly, makes them as small as that number asks for, without regard to the tile.
    """
    if rule.rule == "code" and rule.parts:
        parts = min(rule.parts, rows)
    else:
        parts = max(1, min(rule.parts or DEFAULT_PARTS, rows // up_to(least, rule.tile)))
    if rows // rule.tile < parts:
        return equal_shares(rows, parts)
    sizes = [tiles * rule.tile for tiles in equal_shares(rows // rule.tile, parts)]
    sizes[-1] += rows % rule.tile
    return sizes


def equal_parts(alive: int, rows: int, least: int, rule: RegroupRule) -> int:
    """The largest number of equal groups a layer can have."""
    known = range(1, (rule.parts or DEFAULT_PARTS) + 1)
    return max(n for n in known if equal_rows(alive, rows, n, least, rule.tile) is not None)


def equal_rows(alive: int, rows: int, parts: int, least: int, tile: int) -> int | None:
    """Rows of each of ``parts`` equal groups that hold all ``alive`` rows of ``rows``, or None if there are none such.

    A multiple of the tile where the layer has that many rows, else an exact division of the layer. Groups may be filled
    up with rows in which nothing survives, by less than one group in all.
    """
    if parts == 1:
        return alive
    tiled, exact = up_to(-(-alive // parts), tile), rows // parts
    for each in (tiled, exact) if rows % parts == 0 else (tiled,):
        if least <= each and each * parts <= rows and each * (parts - 1) < alive:
            return each
    return None


def disjoint_parts(alive: int, tables: Sequence[Table], limits: Sequence[Limits], rule: RegroupRule) -> int:
    """How many disjoint blocks layers with equally many rows get, each as many as the others.

    At most ``rule.parts``, or those that come nearest the areas asked for, of the numbers that all layers can have.
    """
    able = [_disjoint_numbers(alive, table, own, rule) for table, own in zip(tables, limits, strict=True)]
    known = able[0].intersection(*able[1:])
    if rule.parts:
        return max(n for n in known if n <= rule.parts)
    areas = [(table.counts.numel(), own.area) for table, own in zip(tables, limits, strict=True)]
    return min(known, key=lambda n: (sum(abs(whole / n - area) for whole, area in areas), n))


def _disjoint_numbers(alive: int, table: Table, limits: Limits, rule: RegroupRule) -> set[int]:
    """Numbers of disjoint blocks that a layer can have, 1 among them.

    Those that divide rows and columns evenly. If only 1 does, any number will do that leaves each block its least rows
    and columns.
    """
    rows, columns = table.counts.shape
    able = [n for n in range(1, columns + 1) if columns // n >= limits.columns]
    even = [n for n in able if columns % n == 0 and equal_rows(alive, rows, n, limits.rows, rule.tile) is not None]
    return set(even if len(even) > 1 else [n for n in able if n == 1 or alive // n >= limits.rows])
