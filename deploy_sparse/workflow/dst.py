"""The steps that recipes of dynamic sparse training share: masks, baseline, training, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import batch_count
from ..measure.line_plot import LinePlot, Series
from ..measure.table import Table
from ..sparsify.allocation import Allocation, LatencyBudget, allocate, problem_of, silent_masks
from ..sparsify.chase import Chase
from ..sparsify.chase_latency import LatencyChase
from ..sparsify.coupling import ChannelPool, channel_pools, remove_, removed_channels
from ..sparsify.dst import DynamicMasks, initial_masks
from ..sparsify.flops import flops
from ..sparsify.imp import dense_masks, head_of
from ..sparsify.method import Method
from ..structure import density
from ..surgery.cost import layer_macs
from ..surgery.plan import SurgeryPlan
from ..ticket import Ticket
from ..train.distributed import world
from ..train.tickets import RewindPoint
from .budgeted import landed, table_budget
from .dst_config import ChaseConfig, DstConfig, channel_schedule, exploration_of
from .prepare import Work

STAGE = "sparse"


def steps_of_epoch(work: Work) -> int:
    """Optimizer steps of one epoch."""
    return batch_count(work.data.train, work.config.fit.batch_size)


def prunable(work: Work, config: DstConfig) -> dict[str, torch.Tensor]:
    """All-True masks of every convolution and Linear layer that is not excluded, the head included."""
    return dense_masks(work.trainer.factory(), exclude=config.sparse.exclude, head=True)


def first_masks(work: Work, config: DstConfig) -> dict[str, torch.Tensor]:
    """The random masks that the sparse training starts with."""
    return initial_masks(prunable(work, config), config.sparse.density, config.sparse.distribution, config.seed)


def macs_of(work: Work) -> dict[str, int]:
    """The dense network's multiply-accumulates by weight name."""
    return layer_macs(work.trainer.factory().eval(), (torch.zeros(1, *work.data.image_shape),))


def pools_of(work: Work, config: ChaseConfig) -> tuple[ChannelPool, ...]:
    """The channels that may go, from the traced network; none where none are to go."""
    if config.channels.sparsity == 0:
        return ()
    head = head_of(work.trainer.factory())
    return channel_pools(prunable(work, config), work.groups, config.channels.coupling, head=head)


def dynamic_masks(work: Work, config: DstConfig) -> DynamicMasks:
    """The method of the recipes without channel removal."""
    return DynamicMasks(
        first_masks(work, config),
        exploration_of(config, steps_of_epoch(work)),
        distribution=config.sparse.distribution,
        seed=config.seed,
        macs=macs_of(work),
    )


def chase(work: Work, config: ChaseConfig, pools: Sequence[ChannelPool]) -> Chase:
    """The method that also removes channels of these pools."""
    epoch, given = steps_of_epoch(work), config.channels
    masks, moves, when = first_masks(work, config), exploration_of(config, epoch), channel_schedule(config, epoch)
    how: dict[str, Any] = {
        "criterion": given.criterion,
        "floor": given.floor,
        "distribution": config.sparse.distribution,
        "seed": config.seed,
        "macs": macs_of(work),
    }
    if given.budget == "share":
        return Chase(masks, moves, pools, when, **how)
    weights, alike = work.trainer.factory().state_dict(), [torch.ones(pool.size).double() for pool in pools]

    def cut(budget: LatencyBudget) -> tuple[Mapping[str, torch.Tensor], Allocation]:
        """Which channels go is decided while the network trains; how many of each layer is about this."""
        problem = problem_of(pools, work.groups, alike, budget)
        found = allocate(problem)
        return silent_masks(problem, found, prunable(work, config), weights, work.groups), found

    budget = landed(work, given, "channels", table_budget(work, given, 1), weights, cut)
    return LatencyChase(masks, moves, pools, when, work.groups, budget, **how)


def baseline(work: Work, config: DstConfig) -> tuple[Ticket, RewindPoint]:
    """The dense network, trained as long as the sparse one or not at all, and where the sparse training starts."""
    if config.sparse.baseline == "untrained":
        start = work.trainer.initial()
        return start.ticket, start
    dense = work.trainer.dense(Method(), {}, rewind_epoch=0)
    return dense.best, dense.rewind


def sparse_ticket(work: Work, config: DstConfig, method: DynamicMasks, start: RewindPoint) -> Ticket:
    """Train once from the start; the best epoch on validation of those that are sparse enough is kept."""
    ticket = work.trainer.train(STAGE, start, method, None, keep="best")
    used = density({name: ticket.masks[name] for name in method.names})
    if used < 0.999 * method.budget / method.total:
        work.run.console.warn(
            f"the channels that stay hold {used:.1%} of the weights, all of them used, where sparse.density = "
            f"{config.sparse.density} was asked; keep more channels, or choose a lower density"
        )
    return work.trainer.reestimated("reestimated", ticket, batches=None) if config.sparse.reestimate else ticket


@dataclass(frozen=True)
class Explained:
    """What a report says besides accuracy and time: curves, and tables once the surgery is known."""

    plots: Sequence[LinePlot] = ()
    explain: Callable[[SurgeryPlan], Sequence[Table]] = lambda plan: ()


def explained(work: Work, config: DstConfig, ticket: Ticket, pools: Sequence[ChannelPool] = ()) -> Explained:
    """The schedule, how much of the sparsity an engine can use, and curves; nothing where no report is written."""
    if not world().main:
        return Explained()
    return Explained(
        plots=history_plots(work),
        explain=lambda plan: [
            usable_table(work, config, ticket, pools, plan),
            schedule_table(work, config, ticket),
            layers_table(ticket, plan),
        ],
    )


def usable_table(
    work: Work, config: DstConfig, ticket: Ticket, pools: Sequence[ChannelPool], plan: SurgeryPlan
) -> Table:
    """How much of the sparsity is in non-zero weights only, and how much an engine can use."""
    macs = macs_of(work)
    weights = {name: ticket.masks[name] for name in prunable(work, config)}
    left = {name: torch.ones_like(mask) for name, mask in ticket.masks.items()}
    gone, size = 0, sum(pool.size for pool in pools)
    for pool in pools:
        removed = removed_channels(ticket.masks, pool)
        remove_(left, pool, removed)
        gone += int(removed.sum())
    found = flops(macs, ticket.masks, left)
    deployed = plan.cost_after.macs / plan.cost_before.macs
    room = density({name: left[name] for name in weights})
    history = [row for row in metrics_of(work) if row["epoch"] == ticket.provenance.metrics["best_epoch"]]
    rows = [
        ("weights that are not zero, of the masked layers", f"{density(weights):.1%}"),
        ("weights in channels that were not removed, of the masked layers", f"{room:.1%}"),
        *([("channels left, of those that may go", f"{size - gone} of {size}")] if size else []),
        ("FLOPs of non-zero weights only (theoretical)", f"{found.theoretical_share:.1%}"),
        ("FLOPs once removed channels are cut (supported by a GPU)", f"{found.supported_share:.1%}"),
        ("FLOPs of the compact network as it is deployed", f"{deployed:.1%}"),
        *(("theoretical FLOPs of the training, of a dense one as long", f"{r['training_flops']:.1%}") for r in history),
    ]
    note = (
        f"FLOPs of a forward pass, of the dense network's. An engine runs the compact network densely: "
        f"{deployed - found.theoretical_share:.1%} of the dense network's FLOPs are spent on single weights that are "
        "zero. Deployed, widths are rounded up for the target, and channels that died by themselves may be cut too."
    )
    return Table("Sparsity an engine can use", ("what", "value"), tuple(rows), note)


def schedule_table(work: Work, config: DstConfig, ticket: Ticket) -> Table:
    """What the settings and presets came to, in steps, and which network was kept."""
    epoch, metrics = steps_of_epoch(work), ticket.provenance.metrics
    moves = exploration_of(config, epoch)
    grows = f"{'all layers as one pool' if moves.scope == 'global' else 'layer by layer'}, growth by {moves.growth}"
    rows = [
        ("training", f"{config.fit.epochs} epochs of {epoch} steps"),
        ("updates", f"every {moves.interval} steps until step {moves.stop}; {grows}"),
    ]
    first = 0
    if moves.soft is not None:
        first, last = moves.soft.until, moves.soft.final
        grows = f"grows {moves.soft.surplus:.1%} of all weights above it at first, {last:.1%} at last"
        rows.append((f"until step {first}", f"an update drops to the budget and {grows} (soft bound)"))
    if first < moves.stop:
        share = f"{moves.fraction_at(first):.1%} of the budget"
        if moves.decay == "cosine":
            share += f" at first, {moves.fraction_at(moves.stop):.1%} at last"
        rows.append((f"from step {first}", f"an update drops and grows {share}"))
    if isinstance(config, ChaseConfig) and config.channels.sparsity > 0:
        events = channel_schedule(config, epoch).events()
        aim = f", until the table gives {config.channels.latency}" * (config.channels.budget == "latency")
        steps = f"at {len(events)} steps from {events[0]} to {events[-1]}"
        rows.append(("channels go", f"{steps}, by {config.channels.criterion}{aim}"))
    best, accuracy = int(metrics["best_epoch"]) + 1, metrics["validation_accuracy"]
    rows.append(("network kept", f"of epoch {best}, with {accuracy:.2%} on validation"))
    if config.sparse.reestimate:
        rows.append(("BatchNorm", "statistics re-estimated over the training split after the training"))
    return Table("Schedule", ("what", "value"), tuple(rows))


def layers_table(ticket: Ticket, plan: SurgeryPlan) -> Table:
    """By layer: rows and input channels that hold a weight, what is deployed of them, and how full that is."""
    rows = []
    compact = {layer.name: layer.compact for layer in plan.layers}
    for name, mask in ticket.masks.items():
        if mask.dim() > 1:
            cells = mask.reshape(*mask.shape[:2], -1).any(dim=2)  # [c_out, c_in]
            outputs, inputs = int(cells.any(dim=1).sum()), int(cells.any(dim=0).sum())
            used = (f"{outputs} of {mask.shape[0]}", f"{inputs} of {mask.shape[1]}")
            small, filled = "×".join(map(str, compact[name][:2])), plan.partly_filled.get(name, 1.0)
            rows.append((name, *used, small, f"{mask.float().mean():.1%}", f"{filled:.1%}"))
    columns = ("layer", "outputs with a weight", "inputs with a weight", "deployed", "density", "density deployed")
    return Table("Layers", columns, tuple(rows), "Deployed: output times input channels of the compact network.")


def metrics_of(work: Work) -> list[dict[str, float]]:
    """The rows of metrics of the sparse training, by epoch."""
    lines = (work.run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["training"] == STAGE]


def history_plots(work: Work) -> tuple[LinePlot, ...]:
    """What the masks were like over time: channels that emptied, and weights and FLOPs."""
    rows = metrics_of(work)
    plots = [
        LinePlot(
            "Channels sparser than their layer",
            "epoch",
            "share of channels",
            (
                _series("sparser than the layer", rows, "sparser_channels"),
                _series("less than half as dense (amenable)", rows, "amenable_channels"),
            ),
            "Of the channels that are there. At random about half are sparser than their layer, and hardly one is less "
            "than half as dense.",
        ),
        LinePlot(
            "Weights, channels and FLOPs",
            "epoch",
            "share of the dense network",
            (
                _series("weights", rows, "density"),
                _series("weights ever used", rows, "explored"),
                _series("FLOPs, non-zero weights", rows, "theoretical_flops"),
                _series("FLOPs, removed channels cut", rows, "supported_flops"),
                *(
                    [_series("channels, of those that may go", rows, "channels_left")]
                    if "channels_left" in rows[0]
                    else []
                ),
            ),
            "Of one forward pass; weights ever used are those that were unmasked at any time.",
        ),
    ]
    return tuple(plots)


def _series(label: str, rows: Sequence[Mapping[str, float]], key: str) -> Series:
    return Series(label, tuple((row["epoch"] + 1, row[key]) for row in rows))
