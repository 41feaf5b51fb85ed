"""What regroup is asked for: how blocks are found and what shape they have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from ...errors import ConfigError, nearest
from ...structure import MIN_BLOCK_ROWS

Rule = Literal["paper", "code", "budget"]
Columns = Literal["position", "channel"]
BlockForm = Literal["free", "equal", "disjoint"]
Empty = Literal["dense", "prune"]
Coupling = Literal["layer", "group"]


@dataclass(frozen=True)
class RegroupRule:
    """How a layer's mask becomes dense blocks. 0 means: derived from the layer, as said below.

    The paper gives t1, t2, b1 and b2 no values; what is derived here is our choice.

    Attributes:
        rule: ``"paper"``, Algorithm 3: groups of rows with the columns dense enough in them, again with the rows left
            over until no block is found. ``"code"``, the authors' program: one pass, columns until few enough non-zeros
            of every row are left out. ``"budget"``: as many positions as asked for, where most magnitude lies.
        columns: what a block's columns are: single positions (c, kh, kw) of the kernel, as published, or input
            channels with all their positions, so that blocks are ordinary small convolutions.
        blocks: ``"free"``: sizes as they come. ``"equal"``: the same number of rows and of columns in each, so that a
            layer is one gather and one grouped convolution; the blocks take the width their rule gives them together
            (two that end up with the same columns look like one of twice the rows). ``"disjoint"``: every input
            channel is in one block besides, so that the gather is a permutation; the density is one over the number
            of blocks, so the rule decides no more than that number.
        parts: t1, the most groups a layer is divided into; groups are never smaller than ``min_rows`` for its sake.
            0: 8, the program's value; for disjoint blocks the number that comes nearest the density wanted. Given
            explicitly, ``"code"`` takes it literally for free blocks, as published, however small the groups become.
        min_nonzeros: t2 of ``"paper"``: rows of a group that must be non-zero in a column (in all rows of a smaller
            group; on average over its positions where a column is a channel). 0: such a share of the group's rows
            that the first partition's blocks cover about as many positions as the layer has non-zeros.
        min_rows: b1, the least rows of a block, or all surviving rows where fewer survive. 0: one tile. For ``"code"``
            B2, which a block must exceed, as published; 0: 16.
        min_columns: b2, the columns a group needs to become a block, counted as ``columns`` says. 0: ``multiple``, but
            at least a 64th of the layer's columns; for ``"code"``, which has no b2, 1.
        ratio: of ``"code"``: a block is accepted once it is wider than ``ratio`` times what each row leaves out.
        density: of ``"budget"``: the share of positions that blocks may cover in every layer. 0: as dense as the
            layer's mask.
        tile: groups have a multiple of so many rows, one of them the remainder too; a narrower layer is one group.
        multiple: block widths are rounded up to a multiple of so many columns by the best ones left out, but to no more
            than the layer has. ``"budget"`` buys columns so many at a time and stays within its budget, unless that
            is too little for one block of ``min_columns`` rounded up: then it has that one block. Not for
            disjoint blocks, whose widths follow from their number.
        empty: what becomes of a layer without a block: it stays ``"dense"``, or ``"prune"`` leaves it the smallest
            block allowed, ``min_rows`` in whole tiles by ``min_columns`` (without any weight it would cut the network).
        coupling: ``"layer"``: each layer divides its rows by itself. ``"group"``: layers that write into one residual
            stream divide theirs alike, so that the deployed network can number the stream's channels by these groups
            and puts no rows back into order; for equal and disjoint blocks.

    Raises:
        ConfigError: a value out of range, or one that the rule does not look at.
    """

    rule: Rule = "paper"
    columns: Columns = "position"
    blocks: BlockForm = "free"
    parts: int = 0
    min_nonzeros: int = 0
    min_rows: int = 0
    min_columns: int = 0
    ratio: float = 1.5
    density: float = 0.0
    tile: Literal[16, 32, 64] = 32
    multiple: int = 1
    empty: Empty = "dense"
    coupling: Coupling = "layer"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("rule", "columns", "blocks", "tile", "empty", "coupling"):
            _refuse_unless_one_of(name, getattr(self, name), get_args(hints[name]))
        for name, least in (("parts", 0), ("min_nonzeros", 0), ("min_rows", 0), ("min_columns", 0), ("multiple", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}", expected=f"{least} or more", fix="leave it out for the default"
                )
        self._refuse_small_blocks()
        self._refuse_shares()
        self._refuse_idle()

    def _refuse_small_blocks(self) -> None:
        if 0 < self.min_rows < MIN_BLOCK_ROWS:
            raise ConfigError(
                f"min_rows = {self.min_rows}",
                expected=f"{MIN_BLOCK_ROWS} or more: so few rows are no block that could run faster",
                fix=f"min_rows = {self.tile}, one tile",
            )
        if self.blocks == "disjoint" and self.columns == "position":
            raise ConfigError(
                "disjoint blocks of single positions",
                expected="whole input channels: a position belongs to a channel that other blocks would read too",
                fix='columns = "channel"',
            )

    def _refuse_shares(self) -> None:
        if not 0 <= self.density <= 1:
            raise ConfigError(
                f"density = {self.density}", expected="above 0 and at most 1", fix="0 keeps the density of each mask"
            )
        if not self.ratio > 0:
            raise ConfigError(f"ratio = {self.ratio}", expected="above 0", fix="1.5, the published value")

    def _refuse_idle(self) -> None:
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        for name, rule in (("min_nonzeros", "paper"), ("ratio", "code"), ("density", "budget")):
            if getattr(self, name) != defaults[name] and self.rule != rule:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} with rule = {self.rule!r}",
                    expected=f"{name} only with rule = {rule!r}",
                    fix=f"leave {name} out, or choose rule = {rule!r}",
                )
        if self.coupling == "group" and self.blocks == "free":
            raise ConfigError(
                "coupling = 'group' with free blocks",
                expected="blocks of equal sizes, for which layers can divide their rows alike",
                fix="choose blocks = 'equal' or 'disjoint', or leave coupling out",
            )
        if self.blocks == "disjoint" and (self.min_nonzeros or self.multiple > 1):
            name = "min_nonzeros" if self.min_nonzeros else "multiple"
            raise ConfigError(
                f"{name} = {getattr(self, name)} with disjoint blocks",
                expected="blocks that may choose their columns",
                fix=f"leave {name} out: disjoint blocks share all input channels out among them",
            )


def _refuse_unless_one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        words = [str(word) for word in known]
        raise ConfigError(
            f"{name} = {value!r}",
            expected=f"one of {', '.join(words)}",
            fix=f"{nearest(str(value), words)}mend the value",
        )
