"""Is a latency budget spent better by what layers cost? Against the same share everywhere, and one threshold for all.

For every seed a dense network is trained. Then for every latency asked three tickets are made of it, one-shot by the ℓ1
norm, from the same latency table and with the same multiple of channels:

* ``latency budget``: the channels worth the most within the time (``deploy-sparse ticket --latency``);
* ``same share``: the same share of every group of channels, which is what equal MACs come to without a table;
* ``one threshold``: the channels above one threshold over all groups, scores in units of their group's mean.

The limit of each is corrected until its compact network, built and timed beside the dense one, is as near to the asked
latency as it gets; all three are timed once more together with the dense network, in one run, and then trained for some
epochs. Retained: the mean share of a group's score that is kept, and the geometric mean, whose logarithm is the
budget's default worth. Accuracy is on the test split, of the epoch with the best validation accuracy; untrained: before
any training without the channels. One JSON line a network.

    python benchmarks/budgets.py cpu-2-cores --seeds 0 1 2 --latencies 0.5x 0.25x --runtime.threads 1
    python benchmarks/budgets.py scratch --seeds 0 --epochs 1 --fit.epochs 1 --data.arguments.train_images 256
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deploy_sparse.artifact import environment, read_json, write_bytes
from deploy_sparse.cli.catalog import find_config, find_recipe, load_config, load_recipe
from deploy_sparse.engine.build import build_engine
from deploy_sparse.measure.profile import profile
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.allocation import (
    Allocation,
    LatencyBudget,
    Problem,
    allocate,
    one_threshold,
    problem_of,
    silent_masks,
    uniform,
)
from deploy_sparse.sparsify.coupling import channel_pools
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.sparsify.worth import kept_worth, mean_scores, part_of
from deploy_sparse.surgery.compact import Compact, compact
from deploy_sparse.ticket import Provenance, Ticket
from deploy_sparse.train.console import Console
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.interrupt import Interrupts
from deploy_sparse.train.run import open_run
from deploy_sparse.train.tickets import RewindPoint
from deploy_sparse.tune.budget import Asked, budget_of, land
from deploy_sparse.tune.budget_table import even_cuts, table_for
from deploy_sparse.tune.budget_ticket import Source, source_of
from deploy_sparse.tune.budget_timing import BesideDense
from deploy_sparse.workflow.config import StudyConfig
from deploy_sparse.workflow.prepare import Work, prepare

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
BUDGET = "latency budget"
ARMS: Mapping[str, Callable[[Problem], Allocation]] = {
    BUDGET: allocate,
    "same share": uniform,
    "one threshold": one_threshold,
}
DEFAULTS = {"--fit.epochs": "8", "--deploy.targets": '["cpu"]', "--deploy.batches": "[1]"}
LANDING = 0.02  # tolerance here: the arms are to be equally fast
PASSES = 8
NOTE = (
    "Latency, MACs: of the dense network's; latency as measured, all networks of a seed side by side in one run. "
    "Retained: mean share of the groups' scores that is kept, and the geometric mean. The lead is the latency budget's "
    "test accuracy minus the row's, as the mean and by seed."
)

Row = dict[str, Any]


@contextmanager
def working(config: StudyConfig, folder: Path) -> Iterator[Work]:
    """A run folder of this benchmark; what an earlier attempt finished there is taken up."""
    with (
        Interrupts("run the command again") as interrupts,
        open_run(
            folder,
            "budgets",
            config.model_dump(mode="json"),
            resume=True,
            command="python benchmarks/budgets.py",
            console=Console(),
            poll=interrupts.poll,
        ) as run,
    ):
        yield prepare(config, run, method="budgets")
        run.finish({})


def measure(config: StudyConfig, latencies: list[str], epochs: int, table: Path, folder: Path) -> list[Row]:
    """All networks of one seed.

    Args:
        epochs: of training after the channels went.
        table: file of the latency table, measured by the first seed.
    """
    with working(config, folder) as work:
        dense = work.trainer.dense(Method(), {}, rewind_epoch=0)
        short = replace(work.trainer, fit=config.fit.model_copy(update={"epochs": epochs}))
        inputs = (torch.zeros(2, *work.data.image_shape),)
        source = source_of(work.network(dense.best.weights).cpu().eval(), inputs, work.trainer.model)
        rows = [{**_about(work, "dense", "", dense.best), "measured": 1.0}]
        for text in latencies:
            cuts = {arm: _kept(work, source, inputs, text, arm, table) for arm in ARMS}
            networks = {arm: compact(ticket, work.trainer.factory, inputs) for arm, ticket in cuts.items()}
            times = _together(work, inputs, networks)
            for arm, ticket in cuts.items():
                stage = f"{arm.replace(' ', '-')}/{text}"
                trained = short.train(stage, RewindPoint(ticket), StaticMasks(ticket.masks), ticket.masks, keep="best")
                plan = networks[arm].plan
                rows.append(
                    {
                        **_about(work, arm, text, trained),
                        **times[arm],
                        **ticket.provenance.config,
                        "untrained_accuracy": _test_accuracy(work, ticket),
                        "macs": plan.cost_after.macs / plan.cost_before.macs,
                    }
                )
        return rows


def _kept(work: Work, source: Source, inputs: tuple[torch.Tensor, ...], text: str, arm: str, table: Path) -> Ticket:
    """An arm's ticket at the asked latency; kept in the run folder, as another timing might choose others."""
    return work.run.once(
        f"cut/{arm.replace(' ', '-')}-{text}",
        lambda: _landed(work, source, inputs, Asked.parse(text), arm, table),
        lambda ticket, folder: ticket.save(folder),
        Ticket.load,
    )


def _landed(work: Work, source: Source, inputs: tuple[torch.Tensor, ...], asked: Asked, arm: str, file: Path) -> Ticket:
    """An arm's ticket at the asked latency; its provenance says how it got there and what it kept."""
    deploy, factory = work.config.deploy, work.trainer.factory
    table = table_for(
        file,
        factory(),
        inputs,
        deploy.targets[0],
        batch=deploy.batches[0],
        cuts=even_cuts(source, factory, inputs),
        poll=work.run.poll,
        say=work.run.console.say,
    )
    budget = budget_of(table, asked)

    def made(limit: float) -> tuple[Ticket, Allocation]:
        problem = _problem(source, replace(budget, ms=limit))
        found = ARMS[arm](problem)
        masks = silent_masks(problem, found, source.masks, source.weights, source.groups)
        return Ticket(source.weights, masks, source.model, Provenance("budgets")), found

    with TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        beside = BesideDense(
            factory, inputs, deploy.targets[0], deploy.batches[0], deploy.duration_s, Path(scratch), work.run.poll
        )
        say = work.run.console.say
        ticket, landing = land(
            asked, budget.ms, made, beside, tolerance=LANDING, passes=PASSES, say=lambda text: say(f"{arm}: {text}")
        )
    found = landing.chosen.allocation
    told = {
        "predicted": found.ms / found.dense_ms,
        "passes": len(landing.passes),
        "miss": landing.miss,
        "retained": found.retained,
        "geometric": _geometric(source, found),
        "worth": found.worth,
        "kept": list(found.kept),
    }
    return replace(ticket, provenance=Provenance("budgets", told))


def _problem(source: Source, budget: LatencyBudget) -> Problem:
    pools = channel_pools(source.masks, source.groups, "prune_skip")
    return problem_of(pools, source.groups, mean_scores(pools, source.scores), budget)


def _geometric(source: Source, found: Allocation) -> float:
    """Geometric mean, over the groups of channels, of the share of score that is kept."""
    pools = channel_pools(source.masks, source.groups, "prune_skip")
    parts = list(zip(pools, mean_scores(pools, source.scores), found.kept, strict=True))
    logs = sum(kept_worth(pool, scores, [kept], "product")[0] for pool, scores, kept in parts)
    return math.exp(logs / sum(part_of(pool) for pool in pools))


def _together(
    work: Work, inputs: tuple[torch.Tensor, ...], networks: Mapping[str, Compact]
) -> dict[str, dict[str, float | None]]:
    """Measured latency over dense's of every arm, all in one run, with the interval."""
    deploy = work.config.deploy
    with TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        out = Path(scratch)
        engines = {"dense": build_engine(work.trainer.factory().eval(), deploy.targets[0], inputs, out, name="dense")}
        for number, (arm, network) in enumerate(networks.items()):
            engines[arm] = build_engine(network, deploy.targets[0], out=out, name=f"arm{number}")
        made = profile(engines, batches=deploy.batches[:1], duration_s=2 * deploy.duration_s, poll=work.run.poll)
    return {
        c.subject: {
            "measured": 1 / c.ratio,
            "low": None if c.high is None else 1 / c.high,
            "high": None if c.low is None else 1 / c.low,
        }
        for c in made.comparisons
    }


def _about(work: Work, arm: str, asked: str, ticket: Ticket) -> Row:
    return {
        "seed": work.config.seed,
        "arm": arm,
        "asked": asked,
        "validation_accuracy": ticket.provenance.metrics["validation_accuracy"],
        "test_accuracy": _test_accuracy(work, ticket),
        "ticket": ticket.hash,
    }


def _test_accuracy(work: Work, ticket: Ticket) -> float:
    return accuracy(work.network(ticket.masked_weights()).eval(), work.data.test)


def table_of(rows: list[Row]) -> Table:
    """Mean over the seeds, and the latency budget's lead over each other arm: the mean, and every seed's."""
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["asked"], row["arm"], row["seed"]): row for row in rows}
    lines = []
    for asked, arm in dict.fromkeys((row["asked"], row["arm"]) for row in rows):
        own = [found[asked, arm, seed] for seed in seeds]
        leads = []
        if arm in ARMS and arm != BUDGET:
            best = [found[asked, BUDGET, seed] for seed in seeds]
            leads = [100 * (b["test_accuracy"] - r["test_accuracy"]) for b, r in zip(best, own, strict=True)]
        lines.append(
            (
                f"{asked}: {arm}" if asked else arm,
                f"{mean(row['measured'] for row in own):.3f}",
                " / ".join(f"{row['measured']:.3f}" for row in own),
                f"{mean(row['macs'] for row in own):.1%}" if asked else None,
                f"{mean(row['retained'] for row in own):.1%}" if asked else None,
                f"{mean(row['geometric'] for row in own):.1%}" if asked else None,
                f"{mean(row['untrained_accuracy'] for row in own):.2%}" if asked else None,
                f"{mean(row['test_accuracy'] for row in own):.2%}",
                " / ".join(f"{row['test_accuracy']:.2%}" for row in own),
                f"{mean(leads):+.2f} ({', '.join(f'{lead:+.2f}' for lead in leads)})" if leads else None,
            )
        )
    columns = ("network", "latency", "by seed", "MACs", "retained", "geometric", "untrained", "mean test accuracy")
    return Table(
        "Channels within a latency: by cost, by share, by threshold",
        (*columns, f"seeds {', '.join(map(str, seeds))}", "lead, points"),
        tuple(lines),
        NOTE,
    )


def text(rows: list[Row]) -> str:
    """The table as Markdown."""
    return markdown(table_of([row for row in rows if row.get("kind") != "conditions"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="name of the device's folder, for example cpu-2-cores")
    parser.add_argument("--config", default="resnet_synthetic", help="a config of the recipe dense")
    parser.add_argument("--widths", default="[48, 96, 192]", help="of the network: wide enough to choose")
    parser.add_argument(
        "--latencies", nargs="+", default=["0.5x", "0.25x"], help="as deploy-sparse ticket --latency takes them"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of training after the channels went")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", type=Path, help="a latency table's file; measured into the runs by default")
    parser.add_argument("--name", help="of the record; budgets-<config> by default")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folders go")
    options, overrides = parser.parse_known_args()
    name = options.name or f"budgets-{options.config}"
    recipe = find_recipe("dense")
    file = options.table or options.runs / f"{name}-table.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for seed in options.seeds:
        words = ["--model.arguments.widths", options.widths, *overrides, "--seed", str(seed)]
        for key, value in DEFAULTS.items():
            words += [] if key in overrides else [key, value]
        config: Any
        config, _ = load_config(load_recipe(recipe), find_config(recipe, options.config), words)
        rows += measure(config, options.latencies, options.epochs, file, options.runs / f"{name}-seed{seed}")
    body = {
        "config": config.model_dump(mode="json", exclude={"seed": True}),
        "epochs": options.epochs,
        "table": read_json(file)["digest"],
        "environment": environment(),
    }
    lines = [json.dumps({"kind": "conditions", **body}), *(json.dumps(row) for row in rows)]
    folder = RECORDS / options.device / name
    write_bytes(folder / "results.jsonl", ("\n".join(lines) + "\n").encode())
    write_bytes(folder / "results.md", text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
