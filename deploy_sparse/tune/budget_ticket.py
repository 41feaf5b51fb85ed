"""Tickets whose channels are kept within a latency: what a network or a ticket has to keep, and the ticket of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import environment
from ..engine.target import Target
from ..errors import ConfigError, nearest
from ..measure.record import LatencyRecord
from ..sparsify import entry_scores
from ..sparsify._passes import held_batches
from ..sparsify.allocation import Allocation, LatencyBudget
from ..sparsify.channel_scores import OF_DATA, OF_WEIGHTS, channel_scores
from ..sparsify.coupling import channel_pools, narrowable
from ..sparsify.refill import refill_within
from ..sparsify.worth import Worth
from ..structure import ChannelGroup, Masks, density
from ..surgery.graph import channel_groups
from ..ticket import ModelRef, Provenance, Ticket
from .budget import PASSES, Asked, Landing, Say, Times, budget_of, land
from .budget_timing import BesideDense
from .formats import require_timing

SCORES: tuple[str, ...] = (*OF_WEIGHTS, "random", *OF_DATA)


@dataclass(frozen=True, eq=False)
class Source:
    """A network's channels and what they score.

    Attributes:
        weights: the whole state dict, on the CPU.
        masks: of the weights whose channels may go; what of them survives does not matter any more.
        groups: the traced network's channel groups.
        scores: ``[c_out]`` by weight name.
        origin: the ticket's provenance, but for the budget.
        model: which network it is.
    """

    weights: Mapping[str, torch.Tensor]
    masks: Masks
    groups: Sequence[ChannelGroup]
    scores: Mapping[str, torch.Tensor]
    origin: Provenance
    model: ModelRef

    def ticket(self, budget: LatencyBudget, described: Mapping[str, Any]) -> tuple[Ticket, Allocation]:
        """The ticket whose channels are worth the most within the budget; its weights are the source's own.

        Args:
            budget: limit, table, multiple.
            described: what its provenance says of the budget besides: what was asked, target, batch, the table.

        Raises:
            ConfigError: the least time is above the budget.
        """
        masks, found = refill_within(self.masks, self.weights, self.groups, budget, scores=self.scores)
        config = {
            **self.origin.config,
            **described,
            "limit_ms": budget.ms,
            "multiple": budget.multiple,
            "worth": budget.worth,
        }
        metrics = {
            "density": round(density(masks), 6),
            "predicted_ms": found.ms,
            "predicted_dense_ms": found.dense_ms,
            "retained": round(found.retained, 6),
        }
        origin = replace(self.origin, config=config, metrics=metrics)
        return Ticket(self.weights, masks, self.model, origin).validate(), found


def source_of(
    network: nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    model: ModelRef,
    *,
    ticket: Ticket | None = None,
    score: str = "l1",
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    note: Mapping[str, Any] | None = None,
) -> Source:
    """What may be kept of a network, or of a ticket's.

    Args:
        network: with the weights to score, on the CPU; it is not changed.
        example_inputs: what it is traced with, batch first.
        model: which network it is.
        ticket: whose masks say what is scored: only weights that survive count, as in refill; without one all do.
        score: one of :data:`SCORES`; those of data need batches.
        batches: images and labels.
        exclude: shell patterns of weight names that keep all channels; so does what they are coupled with.
        seed: for the score ``"random"``.
        note: more for the provenance, such as where the weights come from.

    Raises:
        ConfigError: an unknown score, batches that are missing, a pattern that matches nothing, or nothing may go.
        SurgeryError: the network cannot be traced.
    """
    if score not in SCORES:
        raise ConfigError(
            f"score {score!r}",
            expected=f"one of {', '.join(SCORES)}",
            fix=f"{nearest(score, SCORES)}choose one of them",
        )
    groups, held = channel_groups(network, example_inputs), held_batches(batches)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    given = {} if ticket is None else ticket.masks
    masks, axes = _narrowable(weights, groups, given, exclude)
    rows = {name: mask.movedim(axes[name], 0) for name, mask in masks.items()}
    if score == "random":
        full = {name: torch.ones(len(mask), dtype=torch.bool) for name, mask in rows.items()}
        scores: Mapping[str, torch.Tensor] = entry_scores.random(full, seed)
    else:
        moved = {name: weights[name].movedim(dim, 0) for name, dim in axes.items()}
        scores = channel_scores(score, rows, weights=moved, model=network, batches=held)
    pruned = any(not bool(mask.all()) for mask in masks.values())
    origin = Provenance(
        "refill" if pruned else "oneshot",
        {"budget": "latency", "score": score, "exclude": list(exclude), **(note or {})},
        seed,
        data={"samples": sum(len(labels) for _, labels in held)} if held else {},
        versions=environment(),
        parent=None if ticket is None else ticket.hash,
    )
    return Source(weights, masks, groups, scores, origin, model)


def ticket_within(
    source: Source,
    factory: Callable[[], nn.Module],
    example_inputs: tuple[torch.Tensor, ...],
    target: Target,
    asked: Asked,
    table: Times,
    *,
    batch: int,
    digest: str,
    multiple: int | None = None,
    worth: Worth = "product",
    check: bool = True,
    passes: int = PASSES,
    duration_s: float = 2.0,
    poll: Callable[[], None] = lambda: None,
    say: Say = lambda text: None,
) -> tuple[Ticket, Landing, tuple[LatencyRecord, ...]]:
    """The ticket of a source that has the asked latency on a target, how it was reached, and the records of its timing.

    Args:
        source: whose channels are kept.
        factory: constructs the dense network.
        example_inputs: what engines are traced with, batch first.
        target: where it is deployed; it must run here for ``check``.
        asked: the latency.
        table: of this network on this target.
        batch: the table's; what is timed too.
        digest: of the table, for the provenance.
        multiple: of the kept channels; the table's own by default.
        worth: what is made large, see :func:`~..sparsify.worth.kept_worth`.
        check: build dense and compact engines, time them side by side, and correct the limit; see :func:`.budget.land`.
        passes: tickets to make at most.
        duration_s: timed seconds for each engine and pass.
        poll: called between steps; what it raises ends the call.
        say: receives progress lines.

    Raises:
        ConfigError: the latency cannot be reached, or the target does not run here.
        SurgeryError, ExportError, BuildError, EngineError, MissingDependencyError: a network cannot be built or run.
    """
    if check:
        require_timing(target)
    budget = budget_of(table, asked, multiple=multiple, worth=worth)
    described = {"latency": str(asked), "target": target.name, "batch": batch, "table": digest}
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        beside = BesideDense(factory, example_inputs, target, batch, duration_s, Path(scratch), poll)
        ticket, landing = land(
            asked,
            budget.ms,
            lambda limit: source.ticket(replace(budget, ms=limit), described),
            beside if check else None,
            passes=passes,
            say=say,
        )
    return ticket, landing, tuple(beside.records)


def _narrowable(
    weights: Mapping[str, torch.Tensor], groups: Sequence[ChannelGroup], given: Masks, exclude: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Masks of the weights that write channels that may go, and the axis along which each writes them."""
    masks = {
        name: given.get(name, torch.ones_like(weights[name], dtype=torch.bool)) for name in narrowable(groups, exclude)
    }
    writers = [rows for pool in channel_pools(masks, groups, "prune_skip") for rows in pool.writers]
    if not writers:
        reasons = list(dict.fromkeys(group.pinned for group in groups if group.pinned is not None))
        raise ConfigError(
            f"no layer can be narrowed: {'; '.join(reasons) or 'the network has no channels, or all are excluded'}",
            expected="layers whose channels only layers of this network read",
            fix="exclude fewer layers, or choose another network",
        )
    axes = {rows.name: rows.dim for rows in writers}
    return {name: masks[name] for name in axes}, axes
