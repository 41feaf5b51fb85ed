"""Does Chase leave better small networks? Against one-shot channel pruning and narrower networks of equal MACs.

For every seed, coupling and density Chase removes half of the prunable channels. What an engine has to run of it (MACs
after surgery, widths not rounded) is what the controls get, or a little more; all are trained for as many epochs:

* ``one-shot``: the dense network for half of the epochs, then of the channels that Chase may remove those with the
  smallest ℓ1 norm go at once, the same share everywhere, and the rest is trained for the other half; each half has a
  schedule of its own;
* ``narrower``: the architecture with all widths scaled down, from its own random initialisation;
* ``one-shot, twice the epochs``: the same pruning after a whole dense training, and a whole training after it.

``dynamic sparse training`` is the same exploration with all channels kept; its amenable channels are those less than
half as dense as their layer.

Accuracy is on the test split, of the epoch with the best validation accuracy: for sparse training of those after all
channels and the surplus of weights are gone, for the others of all. The density is what was asked; where the channels
that stay have no room for it, Chase ends with a dense network. One JSON line a network.

    python benchmarks/chase_quality.py cpu-2-cores --seeds 0 1 2 --densities 0.1 0.2 0.4 --runtime.threads 1
    python benchmarks/chase_quality.py cpu-2-cores --densities 0.1 --fit.epochs 30 --name chase-quality-30-epochs \\
        --runtime.threads 1
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.cli.catalog import find_config, find_recipe, load_config, load_recipe
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.amenable import amenable
from deploy_sparse.sparsify.channel_scores import channel_scores
from deploy_sparse.sparsify.flops import flops
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.sparsify.patterns import channels, silence
from deploy_sparse.structure import Masks, density
from deploy_sparse.surgery.cost import layer_macs
from deploy_sparse.surgery.plan import plan_from_ticket
from deploy_sparse.ticket import Ticket
from deploy_sparse.train.console import Console
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.interrupt import Interrupts
from deploy_sparse.train.run import open_run
from deploy_sparse.train.tickets import RewindPoint
from deploy_sparse.workflow import dst
from deploy_sparse.workflow.dst_config import ChaseConfig
from deploy_sparse.workflow.prepare import Work, prepare

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
CONTROLS = ("one-shot", "narrower", "one-shot, twice the epochs")
NOTE = (
    "MACs: after surgery, of the dense network's. Weights: not zero, of the dense network's. The lead is Chase's test "
    "accuracy minus the control's, as the mean and by seed."
)

Row = dict[str, Any]


@contextmanager
def working(config: ChaseConfig, folder: Path) -> Iterator[Work]:
    """A run folder of this benchmark; what an earlier attempt finished there is taken up."""
    with (
        Interrupts("run the command again") as interrupts,
        open_run(
            folder,
            "chase_quality",
            config.model_dump(mode="json"),
            resume=True,
            command="python benchmarks/chase_quality.py",
            console=Console(),
            poll=interrupts.poll,
        ) as run,
    ):
        yield prepare(config, run, method="chase_quality")
        run.finish({})


def measure(config: ChaseConfig, couplings: list[str], densities: list[float], folder: Path) -> list[Row]:
    """All networks of one seed."""
    rows = []
    with working(config, folder) as work:
        dense = work.trainer.dense(Method(), {}, rewind_epoch=0)
        half = _halved(work).trainer.train("half/dense", dense.rewind, Method(), {}, keep="last")
        rows.append(_row(work, "dense", dense.best))
        for share in densities:
            ticket = _chase(work, _changed(config, couplings[0], share, 0.0), f"dst/{share}", dense.rewind)
            found = amenable(ticket.masks, {})
            rows.append(_row(work, "dynamic sparse training", ticket, f"density {share}"))
            rows[-1] |= {"sparser": found.sparser / found.channels, "amenable": found.amenable / found.channels}
        for coupling in couplings:
            for share in densities:
                own = _changed(config, coupling, share, config.channels.sparsity)
                name = f"{coupling}, density {share}"
                chase = _chase(work, own, f"chase/{coupling}-{share}", dense.rewind)
                rows.append(_row(work, "Chase", chase, name))
                macs = rows[-1]["macs"]
                for arm, start, trainer in (
                    (CONTROLS[0], half, _halved(work).trainer),
                    (CONTROLS[2], dense.last, work.trainer),
                ):
                    masks = one_shot(work, own, start, macs)
                    stage = f"{arm.replace(',', '').replace(' ', '-')}/{coupling}-{share}"
                    ticket = trainer.train(stage, RewindPoint(start), StaticMasks(masks), masks, keep="best")
                    rows.append(_row(work, arm, ticket, name))
                narrow = narrower(config, macs)
                with working(narrow, Path(f"{folder}-narrow-{coupling}-{share}")) as small:
                    found = small.trainer.dense(Method(), {}, rewind_epoch=0)
                    rows.append({**_row(small, CONTROLS[1], found.best, name), "weights": None})
    return rows


def one_shot(work: Work, config: ChaseConfig, trained: Ticket, macs: int) -> Masks:
    """The fewest channels by ℓ1 norm whose MACs are not below ``macs``: the same share of all pools that Chase has.

    Shares are rounded up to channels; pools in turn then lose one channel more where that is not too many.
    """
    masks = dst.prunable(work, config)
    costs = dst.macs_of(work)
    pools = [pool.writers for pool in dst.pools_of(work, config)]
    scores = channel_scores("l1", masks, weights=trained.weights)

    def pruned(shares: dict[str, float]) -> Masks:
        return silence(channels(scores, masks, shares, pools), trained.weights, work.groups)

    def enough(shares: dict[str, float]) -> bool:
        return flops(costs, pruned(shares)).supported >= macs

    low, high = 0.01, 1.0  # high is enough
    for _ in range(20):
        share = (low + high) / 2
        low, high = (low, share) if enough(dict.fromkeys(masks, share)) else (share, high)
    shares = dict.fromkeys(masks, high)
    for pool in pools:
        fewer = {rows.name: max(0.01, high - 1 / len(rows.channels)) for rows in pool}
        shares = {**shares, **fewer} if enough({**shares, **fewer}) else shares
    return pruned(shares)


def narrower(config: ChaseConfig, macs: int) -> ChaseConfig:
    """The configuration with the narrowest evenly scaled network whose MACs are not below ``macs``."""
    known = zoo.entry(config.model.name)
    arguments = {**known.arguments, **config.model.arguments}
    steps = 8 * max(arguments["widths"])

    def scaled(number: int) -> dict[str, Any]:
        return {**arguments, "widths": [max(1, round(width * number / steps)) for width in arguments["widths"]]}

    def cost(number: int) -> int:
        with torch.device("meta"):
            network = zoo.build(config.model.name, **scaled(number)).eval()
            return sum(layer_macs(network, (torch.zeros(1, *known.input_shape),)).values())

    number = bisect_left(range(1, steps), macs, key=cost) + 1
    changed = config.model.model_copy(update={"arguments": scaled(number)})
    return config.model_copy(update={"model": changed})


def _chase(work: Work, config: ChaseConfig, stage: str, start: RewindPoint) -> Ticket:
    method = dst.chase(work, config, dst.pools_of(work, config))
    return work.trainer.train(stage, start, method, None, keep="best")


def _changed(config: ChaseConfig, coupling: str, share: float, sparsity: float) -> ChaseConfig:
    tables = {"sparse": {"density": share}, "channels": {"coupling": coupling, "sparsity": sparsity}}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in tables.items()}
    )


def _halved(work: Work) -> Work:
    fit = work.config.fit.model_copy(update={"epochs": max(1, work.config.fit.epochs // 2)})
    return replace(work, trainer=replace(work.trainer, fit=fit))


def _row(work: Work, arm: str, ticket: Ticket, against: str = "") -> Row:
    network = work.network(ticket.masked_weights()).eval()
    plan = plan_from_ticket(ticket, work.trainer.factory(), (torch.zeros(2, *work.data.image_shape),))
    return {
        "seed": work.config.seed,
        "arm": arm,
        "against": against,
        "macs": plan.cost_after.macs,
        "macs_before": plan.cost_before.macs,
        "parameters": plan.cost_after.parameters,
        "weights": round(density(ticket.masks), 6),
        "widths": [layer.compact[0] for layer in plan.layers],
        "validation_accuracy": ticket.provenance.metrics["validation_accuracy"],
        "test_accuracy": accuracy(network, work.data.test),
        "ticket": ticket.hash,
    }


def table(rows: list[Row]) -> Table:
    """Mean test accuracy over the seeds, and Chase's lead over each control: the mean, and every seed's."""
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["against"], row["arm"], row["seed"]): row for row in rows}
    dense = mean(row["macs"] for row in rows if row["arm"] == "dense")
    lines = []
    for against, arm in dict.fromkeys((row["against"], row["arm"]) for row in rows):
        own = [found[against, arm, seed] for seed in seeds]
        leads = []
        if arm in CONTROLS:
            chase = [found[against, "Chase", seed] for seed in seeds]
            leads = [100 * (c["test_accuracy"] - r["test_accuracy"]) for c, r in zip(chase, own, strict=True)]
        weights = [row["weights"] for row in own]
        lines.append(
            (
                f"{against}: {arm}" if against else arm,
                f"{mean(row['macs'] for row in own) / dense:.1%}",
                None if None in weights else f"{mean(weights):.1%}",
                f"{mean(row['test_accuracy'] for row in own):.2%}",
                " / ".join(f"{row['test_accuracy']:.2%}" for row in own),
                f"{mean(leads):+.2f} ({', '.join(f'{lead:+.2f}' for lead in leads)})" if leads else None,
                f"{mean(row['amenable'] for row in own):.1%}" if "amenable" in own[0] else None,
            )
        )
    columns = ("network", "MACs", "weights", "mean test accuracy", f"seeds {', '.join(map(str, seeds))}")
    return Table(
        "Chase against one-shot pruning and narrower networks",
        (*columns, "Chase's lead, points", "amenable channels"),
        tuple(lines),
        NOTE,
    )


def text(rows: list[Row]) -> str:
    """The table as Markdown."""
    return markdown(table([row for row in rows if row.get("kind") != "conditions"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="name of the device's folder, for example cpu-2-cores")
    parser.add_argument("--config", default="resnet_synthetic", help="a config of the recipe chase")
    parser.add_argument("--couplings", nargs="+", default=["internal", "prune_skip"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", help="of the record; chase-quality-<config> by default")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folders go")
    options, overrides = parser.parse_known_args()
    name = options.name or f"chase-quality-{options.config}"
    recipe = find_recipe("chase")
    rows: list[Row] = []
    for seed in options.seeds:
        words = [*overrides, "--seed", str(seed)]
        config: Any
        config, _ = load_config(load_recipe(recipe), find_config(recipe, options.config), words)
        rows += measure(config, options.couplings, options.densities, options.runs / f"{name}-seed{seed}")
    body = {"config": config.model_dump(mode="json", exclude={"deploy", "seed"}), "environment": environment()}
    lines = [json.dumps({"kind": "conditions", **body}), *(json.dumps(row) for row in rows)]
    folder = RECORDS / options.device / name
    write_bytes(folder / "results.jsonl", ("\n".join(lines) + "\n").encode())
    write_bytes(folder / "results.md", text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
