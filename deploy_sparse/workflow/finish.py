"""The last steps of a recipe: choose a ticket on validation, deploy it beside the dense network, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..measure.line_plot import LinePlot
from ..measure.table import Table
from ..structure import density, row_density
from ..surgery.plan import SurgeryPlan
from ..ticket import Ticket
from ..train.distributed import world
from ..train.evaluate import accuracy
from ..train.tickets import DenseStage
from ..tune.deliver import deliver
from .prepare import Work


def choose(dense: DenseStage, tickets: Mapping[int, Ticket], tolerance: float) -> int:
    """The sparsest ticket within ``tolerance`` of dense on validation, else the most accurate one; by its round.

    Sparsest: with the least of the prunable weights left; of equals the later round.
    """
    score = {number: ticket.provenance.metrics["validation_accuracy"] for number, ticket in tickets.items()}
    left = {number: density({n: t.masks[n] for n in dense.last.masks}) for number, t in tickets.items()}
    least = dense.best.provenance.metrics["validation_accuracy"] - tolerance
    good = [number for number in score if score[number] >= least]
    if good:
        return min(good, key=lambda number: (left[number], -number))
    return max(score, key=lambda number: (score[number], -left[number], number))


def deploy(
    work: Work,
    dense: Ticket,
    ticket: Ticket | None,
    title: str,
    tables: Sequence[Table],
    plots: Sequence[LinePlot] = (),
    explain: Callable[[SurgeryPlan], Sequence[Table]] = lambda plan: (),
) -> Mapping[str, Any]:
    """Everything after training; only the main process of a distributed run does it.

    Args:
        dense: the baseline; one without a validation accuracy is untrained, and timed only.
        ticket: the chosen ticket; without one the dense network is deployed alone.
        tables, plots: what the report shows besides.
        explain: more tables, of the ticket's surgery.

    Returns:
        the results as JSON values, empty on the other processes.
    """
    if not world().main:
        return {}
    if ticket is not None:
        ticket.save(work.run.folder / "ticket")
    found = deliver(
        dense=dense,
        ticket=ticket,
        factory=work.trainer.factory,
        example_inputs=(work.data.validation.head(16),),
        evaluate=lambda predict: accuracy(predict, work.data.test),
        folder=work.run.folder,
        config=work.config.deploy,
        title=f"{work.config.model.name} on {work.config.data.name}: {title}",
        tables=tables,
        plots=plots,
        explain=explain,
        dense_is_trained="validation_accuracy" in dense.provenance.metrics,
        command=work.run.origin,
        poll=work.run.poll,
        say=work.run.console.say,
    )
    return {"ticket" if ticket is not None else "dense": (ticket or dense).hash, **found}


def rounds_table(
    kind: str, dense: DenseStage, rounds: Mapping[int, Ticket], tickets: Mapping[int, Ticket], chosen: int, note: str
) -> Table:
    """Remaining weights and validation accuracy of the dense network, every round and every structural ticket.

    Args:
        kind: what the structural tickets are called.
        rounds: the masks' own trained networks, by round.
        tickets: the structural tickets, by round.
        note: what the method adds to the explanation.
    """
    named = [("dense", dense.last), *((f"round {number}", ticket) for number, ticket in rounds.items())]
    named += [(f"{kind} of round {n}{' (chosen)' if n == chosen else ''}", ticket) for n, ticket in tickets.items()]
    rows = []
    for name, ticket in named:
        masks = {key: ticket.masks[key] for key in dense.last.masks}
        metrics = ticket.provenance.metrics
        shares = (f"{share(masks):.1%}" for share in (row_density, density))
        rows.append((name, *shares, f"{metrics['validation_accuracy']:.2%}", str(metrics["best_epoch"])))
    columns = ("network", "weights in kept channels", "weights used", "best validation accuracy", "best epoch")
    return Table("Rounds", columns, tuple(rows), f"{note} Tickets are chosen on validation, never on test.")
