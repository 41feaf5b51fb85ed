"""Refill as a step of a recipe: its configuration table, and a round's masks refilled by it."""

from __future__ import annotations

import torch
from pydantic import Field

from ..config import Config
from ..measure.table import Table
from ..sparsify.channel_scores import Criterion
from ..sparsify.refill import Budget, Coupling, refill, refill_report
from ..structure import Masks
from .prepare import Work
from .rounds import Round


class RefillConfig(Config):
    """From an unstructured mask to whole channels."""

    rounds: tuple[int, ...] = Field((), description="rounds to refill; empty for the last one")
    criterion: Criterion = Field("l1", description="what a channel is scored by")
    extra: float = Field(0.0, ge=0, le=1, description="refill+: share of the dropped channels to take back")
    coupling: Coupling = Field("layer", description="layer: the paper's rule; group: one choice per residual stream")
    multiple: int = Field(1, ge=1, description="round kept channels up to this multiple; 1 is the paper's rule")
    budget: Budget = Field("paper", description="paper: ⌈q⌉ channels; code: ⌊q⌋ + 1")
    silent: bool = Field(True, description="false: leave BatchNorm and the readers of dropped channels live")
    score_batches: int = Field(4, ge=1, description="training batches for the criteria that need data")
    tolerance: float = Field(
        0.005, ge=0, lt=1, description="validation accuracy that may be lost when choosing a round"
    )


def refilled(work: Work, rule: RefillConfig, found: Round) -> dict[str, torch.Tensor]:
    """The round's masks as whole channels, scored with the round's own trained weights (Algorithm 2)."""
    return refill(
        found.masks,
        found.trained.weights,
        work.groups,
        scores=work.channel_scores(rule.criterion, found.masks, found.trained, rule.score_batches),
        coupling=rule.coupling,
        multiple=rule.multiple,
        extra=rule.extra,
        budget=rule.budget,
        silent=rule.silent,
        shares=found.shares,
    )


def channels_table(before: Masks, after: Masks, number: int) -> Table:
    """Which layers keep how many channels.

    Args:
        before: the round's masks.
        after: the same layers refilled.
    """
    rows = [
        (c.layer, f"{c.kept} of {c.channels}", f"{c.before:.1%}", f"{c.refilled:.1%}", f"{c.after:.1%}")
        for c in refill_report(before, after)
    ]
    columns = ("layer", "channels kept", "density of the mask", "in kept channels", "used")
    return Table(f"Channels of round {number}", columns, tuple(rows), "Before surgery rounds widths for the target.")


NOTE = (
    "Shares of the prunable weights. Refill fills up the kept output channels (first column); what reads "
    "dropped channels is not used (second column)."
)
"""What the table of rounds says of refill."""
