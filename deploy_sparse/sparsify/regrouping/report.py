"""What regroup did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...structure import row_blocks

Outcome = Literal["blocks", "dense", "pruned"]
TITLES = ("layer", "shape", "outcome", "blocks", "density", "in blocks", "fill", "magnitude", "why")


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Attributes:
        name: the weight's name.
        shape: the weight's shape.
        outcome: ``"blocks"``; ``"dense"``: left whole, no block; ``"pruned"``: no block, so only the smallest is left.
        rows: rows of each block.
        columns: positions (c, kh, kw) of each row of each block.
        positions: entries of the weight.
        before: entries that survived in the mask given.
        after: entries that survive now.
        covered: entries in blocks; 0 where there are none.
        inside: of the entries that survived before, those in blocks.
        magnitude: ℓ1 norm of the weights that survived.
        retained: ℓ1 norm of those that survive still.
        reason: why there are no blocks, or ``""``.
    """

    name: str
    shape: tuple[int, ...]
    outcome: Outcome
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    positions: int
    before: int
    after: int
    covered: int
    inside: int
    magnitude: float
    retained: float
    reason: str = ""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.rows)

    @property
    def density_before(self) -> float:
        """Surviving share in the mask given."""
        return self.before / self.positions

    @property
    def density_after(self) -> float:
        """Surviving share now."""
        return self.after / self.positions

    @property
    def in_block_share(self) -> float:
        """Share of the entries that survived before which lie in blocks."""
        return self.inside / max(1, self.before)

    @property
    def fill_rate(self) -> float:
        """Share of the blocks' positions that survived before; 0 without blocks. The others are refilled."""
        return self.inside / max(1, self.covered)

    @property
    def retained_magnitude(self) -> float:
        """Share of the survivors' ℓ1 norm that survives still."""
        return self.retained / self.magnitude if self.magnitude else 1.0


def report_layer(
    name: str, weight: torch.Tensor, before: torch.Tensor, after: torch.Tensor, outcome: Outcome, reason: str
) -> LayerReport:
    """The report of one layer; tensors of one shape, on the CPU."""
    found = (row_blocks(after) or ()) if outcome != "dense" else ()
    magnitudes = weight.detach().double().abs() * before
    return LayerReport(
        name=name,
        shape=tuple(weight.shape),
        outcome=outcome,
        rows=tuple(len(block.rows) for block in found),
        columns=tuple(len(block.columns) for block in found),
        positions=before.numel(),
        before=int(before.sum()),
        after=int(after.sum()),
        covered=sum(len(block.rows) * len(block.columns) for block in found),
        inside=int((before & after).sum()) if found else 0,
        magnitude=float(magnitudes.sum()),
        retained=float((magnitudes * after).sum()),
        reason=reason,
    )


def total(layers: Sequence[LayerReport]) -> LayerReport:
    """All layers as one named ``"all"``; its outcome is ``"blocks"`` if any layer has some."""
    return LayerReport(
        name="all",
        shape=(),
        outcome="blocks" if any(layer.blocks for layer in layers) else "dense",
        rows=tuple(count for layer in layers for count in layer.rows),
        columns=tuple(count for layer in layers for count in layer.columns),
        positions=max(1, sum(layer.positions for layer in layers)),
        before=sum(layer.before for layer in layers),
        after=sum(layer.after for layer in layers),
        covered=sum(layer.covered for layer in layers),
        inside=sum(layer.inside for layer in layers),
        magnitude=sum(layer.magnitude for layer in layers),
        retained=sum(layer.retained for layer in layers),
    )


def layer_table(layers: Sequence[LayerReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and one row of texts for every layer, and one for all of them."""
    rows = [_row(layer, "×".join(map(str, layer.shape)), layer.outcome) for layer in layers]
    outcomes = [layer.outcome for layer in layers]
    kinds = [kind for kind in ("blocks", "dense", "pruned") if kind in outcomes]
    return TITLES, [*rows, _row(total(layers), "", ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds))]


def _row(layer: LayerReport, shape: str, outcome: str) -> tuple[str, ...]:
    in_blocks = (f"{layer.in_block_share:.1%}", f"{layer.fill_rate:.1%}") if layer.blocks else ("-", "-")
    return (
        layer.name,
        shape,
        outcome,
        str(layer.blocks),
        f"{layer.density_before:.1%} → {layer.density_after:.1%}",
        *in_blocks,
        f"{layer.retained_magnitude:.1%}",
        layer.reason,
    )
