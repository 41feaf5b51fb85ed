"""Do tickets win? Each ticket against a random re-initialisation and random masks of the same sparsity, several seeds.

For every seed: the dense network, IMP up to the rounds asked for, and then for each structure (unstructured; refill as
published, where each layer masks its own rows; refill of whole silent channels, which residual streams share; regroup)
three trainings under the same budget:

* ``ticket``: the method's masks, weights from the rewind point;
* ``re-initialised``: the same masks, another random initialisation, trained for the whole schedule;
* ``random masks``: as many weights, channels or blocks in every layer, chosen at random, weights from the rewind point.

Accuracy is on the test split, of the epoch with the best validation accuracy. One JSON line a network.

    python benchmarks/tickets.py cpu-2-cores --config resnet_synthetic --rounds 3 6 12 --seeds 0 1 2 --runtime.threads 1
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.cli.catalog import find_config, find_recipe, load_config, load_recipe
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.method import StaticMasks
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.sparsify.regroup import RegroupRule, regroup
from deploy_sparse.structure import Masks, density
from deploy_sparse.ticket import Ticket
from deploy_sparse.train.console import Console
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.interrupt import Interrupts
from deploy_sparse.train.run import open_run
from deploy_sparse.train.tickets import RewindPoint
from deploy_sparse.workflow.prepare import Work, initial_network, prepare
from deploy_sparse.workflow.rounds import Round, mask_rounds, train_dense

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
STRUCTURES = ("unstructured", "refill of rows", "refill of silent groups", "regroup")
REFILL = {
    "refill of rows": {"coupling": "layer", "silent": False},
    "refill of silent groups": {"coupling": "group", "silent": True},
}
ARMS = ("ticket", "re-initialised", "random masks")
NOTE = (
    "Weights left: of the convolutions. The lead is the ticket's test accuracy minus the control's, as the mean and by "
    "seed. Refill of rows is the published mode, and regroup too masks nothing but weights here."
)
REINITIALISED = 10_000  # added to the seed

Row = dict[str, Any]


def measure(config: Any, rule: RegroupRule, at: tuple[int, ...], folder: Path) -> list[Row]:
    """All networks of one seed; continues what an earlier attempt left in ``folder``."""
    command = "python benchmarks/tickets.py"
    with (
        Interrupts("run the command again") as interrupts,
        open_run(
            folder,
            "tickets",
            config.model_dump(mode="json"),
            resume=True,
            command=command,
            console=Console(),
            poll=interrupts.poll,
        ) as run,
    ):
        work = prepare(config, run, method="tickets")
        dense = train_dense(work, config.imp)
        rows = [_row(work, 0, "dense", "", dense.best)]
        every = tuple(range(1, max(at) + 1))
        for found in mask_rounds(work, dense, config.imp, every, lambda found: found.masks):
            if found.number in at:
                rows += _compare(work, found, rule)
        run.finish({"networks": len(rows)})
    return rows


def _compare(work: Work, found: Round, rule: RegroupRule) -> list[Row]:
    rows = []
    for structure in STRUCTURES:
        for arm in ARMS:
            masks = _masks(structure, arm, work, found, rule)
            start = _reinitialised(work, found) if arm == "re-initialised" else found.start
            name = f"tickets/{found.number}-{structure}-{arm}".replace(" ", "-")
            ticket = work.trainer.train(name, start, StaticMasks(masks), masks, keep="best")
            rows.append(_row(work, found.number, structure, arm, ticket))
    return rows


def _masks(structure: str, arm: str, work: Work, found: Round, rule: RegroupRule) -> Masks:
    """The method's masks, or random ones with the same number of weights, channels or blocks in every layer."""
    generator = torch.Generator().manual_seed(work.config.seed)
    weights, chance = found.trained.weights, arm == "random masks"
    if structure == "unstructured":
        return {n: _shuffled(m, generator) for n, m in found.masks.items()} if chance else found.masks
    if structure in REFILL:
        scores = {n: torch.rand(len(m), generator=generator, dtype=torch.float64) for n, m in found.masks.items()}
        return refill(found.masks, weights, work.groups, scores=scores if chance else None, **REFILL[structure])
    masks = regroup(found.masks, weights, work.groups, rule=rule, silent=False).masks
    return {n: _permuted(m, generator) for n, m in masks.items()} if chance else masks


def _shuffled(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)


def _permuted(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows and input channels in another order: as many blocks of the same sizes."""
    rows = torch.randperm(mask.shape[0], generator=generator)
    return mask[rows][:, torch.randperm(mask.shape[1], generator=generator)]


def _reinitialised(work: Work, found: Round) -> RewindPoint:
    """Other initial weights, a fresh optimizer and the whole schedule."""
    other = work.config.model_copy(update={"seed": work.config.seed + REINITIALISED})
    return RewindPoint(replace(found.start.ticket, weights=initial_network(other).state_dict()))


def _row(work: Work, number: int, structure: str, arm: str, ticket: Ticket) -> Row:
    network = work.network(ticket.masked_weights()).eval()
    convolutions = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 2}
    return {
        "seed": work.config.seed,
        "round": number,
        "structure": structure,
        "arm": arm,
        "density": round(density(convolutions), 6),
        "validation_accuracy": ticket.provenance.metrics["validation_accuracy"],
        "test_accuracy": accuracy(network, work.data.test),
        "ticket": ticket.hash,
    }


def table(rows: list[Row]) -> Table:
    """Mean test accuracy over the seeds, and each ticket's lead over its controls: the mean, and every seed's."""
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["round"], row["structure"], row["arm"], row["seed"]): row for row in rows}
    table = []
    for number, structure, arm in dict.fromkeys((row["round"], row["structure"], row["arm"]) for row in rows):
        own = [found[number, structure, arm, seed] for seed in seeds]
        leads = []
        if arm in ARMS[1:]:
            tickets = [found[number, structure, "ticket", seed] for seed in seeds]
            leads = [100 * (t["test_accuracy"] - r["test_accuracy"]) for t, r in zip(tickets, own, strict=True)]
        table.append(
            (
                f"round {number}, {structure}, {arm}" if arm else structure,
                f"{mean(row['density'] for row in own):.1%}",
                f"{mean(row['test_accuracy'] for row in own):.2%}",
                " / ".join(f"{row['test_accuracy']:.2%}" for row in own),
                f"{mean(leads):+.2f} ({', '.join(f'{lead:+.2f}' for lead in leads)})" if leads else "–",
            )
        )
    columns = (
        "network",
        "weights left",
        "mean test accuracy",
        f"seeds {', '.join(map(str, seeds))}",
        "ticket's lead, points",
    )
    return Table(
        "Tickets against their controls",
        columns,
        tuple(table),
        NOTE,
    )


def _configured(name: str, overrides: list[str]) -> tuple[Any, RegroupRule]:
    """A small config's training and IMP, and its rule of regroup."""
    found = {}
    for recipe in map(find_recipe, ("imp_refill", "imp_regroup")):
        found[recipe.name], _ = load_config(load_recipe(recipe), find_config(recipe, name), overrides)
    blocks: Any = found["imp_regroup"]
    return found["imp_refill"], blocks.regroup.block_rule()


def text(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    return markdown(table([row for row in rows if row.get("kind") != "conditions"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="name of the device's folder, for example cpu-2-cores")
    parser.add_argument("--config", default="resnet_synthetic", help="a config that imp_refill and imp_regroup have")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 6, 12], help="IMP rounds whose masks are compared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folders go")
    options, overrides = parser.parse_known_args()
    rows: list[Row] = []
    for seed in options.seeds:
        config, rule = _configured(
            options.config, [*overrides, "--seed", str(seed), "--imp.rounds", str(max(options.rounds))]
        )
        rows += measure(config, rule, tuple(options.rounds), options.runs / f"tickets-{options.config}-seed{seed}")
    folder = RECORDS / options.device / f"tickets-{options.config}"
    body = {
        "config": config.model_dump(mode="json", exclude={"deploy", "seed", "refill"}),
        "structures": {**REFILL, "regroup": {**asdict(rule), "silent": False}},
        "rounds": options.rounds,
        "environment": environment(),
    }
    lines = [json.dumps({"kind": "conditions", **body}), *(json.dumps(row) for row in rows)]
    write_bytes(folder / "results.jsonl", ("\n".join(lines) + "\n").encode())
    write_bytes(folder / "results.md", text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
