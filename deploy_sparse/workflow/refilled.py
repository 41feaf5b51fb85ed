"""Refill as a step of a recipe: its configuration table, and a round's masks refilled by it."""

from __future__ import annotations

import torch
from pydantic import Field

from ..measure.table import Table
from ..sparsify.channel_scores import Criterion
from ..sparsify.refill import Budget, Coupling, refill, refill_report, refill_within
from ..structure import Masks
from .budgeted import LatencyKeys, check_latency, landed, refuse_with_latency, table_budget
from .config import ImpConfig, StudyConfig
from .prepare import Work
from .rounds import Round


class RefillConfig(LatencyKeys):
    """From an unstructured mask to whole channels."""

    rounds: tuple[int, ...] = Field((), description="rounds to refill; empty for the last one")
    criterion: Criterion = Field("l1", description="what a channel is scored by")
    extra: float = Field(0.0, ge=0, le=1, description="refill+: share of the dropped channels to take back")
    coupling: Coupling = Field("layer", description="layer: the paper's rule; group: one choice per residual stream")
    multiple: int = Field(1, ge=1, description="round kept channels up to this multiple; 1 is the paper's rule")
    budget: Budget = Field(
        "paper", description="paper: ⌈q⌉ channels; code: ⌊q⌋ + 1; latency: those worth the most within refill.latency"
    )
    silent: bool = Field(True, description="false: leave BatchNorm and the readers of dropped channels live")
    score_batches: int = Field(4, ge=1, description="training batches for the criteria that need data")
    tolerance: float = Field(
        0.005, ge=0, lt=1, description="validation accuracy that may be lost when choosing a round"
    )


def check_refill(config: StudyConfig, imp: ImpConfig, rule: RefillConfig) -> None:
    """Refuse a latency budget that cannot work, or what does not go with it.

    Raises:
        ConfigError: naming the key and what it accepts.
        MissingDependencyError, BuildError: nothing can be built for the target here.
    """
    check_latency(config.deploy, rule, "refill", rule.budget == "latency")
    if rule.budget == "latency":
        refuse_with_latency(
            "refill",
            {
                f"refill.coupling = {rule.coupling!r}": (
                    rule.coupling != "group",
                    '"group": a latency is that of whole groups of channels',
                ),
                f"refill.extra = {rule.extra}": (rule.extra != 0, "0: the latency says how many channels stay"),
                "refill.silent = false": (not rule.silent, "true: channels that are not silent cannot be cut"),
                "imp.group_aware = true": (imp.group_aware, "false: every round would have the last one's latency"),
            },
        )


def require_reachable(work: Work, rule: RefillConfig, masks: Masks) -> None:
    """Refuse a latency that no refill has, before hours of training; the table is measured now where none is given.

    Args:
        masks: of the weights that will be pruned; which of them survive does not matter for the time.

    Raises:
        ConfigError: the table is of another network, target or batch, or the least time is above the budget.
    """
    if rule.budget == "latency":
        weights = work.trainer.factory().state_dict()
        refill_within(masks, weights, work.groups, table_budget(work, rule, rule.multiple))


def refilled(work: Work, rule: RefillConfig, found: Round) -> dict[str, torch.Tensor]:
    """The round's masks as whole channels, scored with the round's own trained weights (Algorithm 2)."""
    scores = work.channel_scores(rule.criterion, found.masks, found.trained, rule.score_batches)
    if rule.budget == "latency":
        weights = found.trained.weights
        budget = landed(
            work,
            rule,
            f"round-{found.number}",
            table_budget(work, rule, rule.multiple),
            weights,
            lambda limit: refill_within(found.masks, weights, work.groups, limit, scores=scores),
        )
        return refill_within(found.masks, weights, work.groups, budget, scores=scores)[0]
    return refill(
        found.masks,
        found.trained.weights,
        work.groups,
        scores=scores,
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
