"""How long regroup takes for ResNet-50, and how much magnitude it retains beside the published ratio rule.

Quality is measured layer by layer on the same weights and unstructured masks. The ratio rule (8 parts, ratio 1.5, tile
32) makes blocks of a row partition; its density is then given to the budget rule as its budget:

* ``chance``: rows are divided by chance into equal parts, the least that any partitioner would do;
* ``own``: rows are divided by this package's partition, in the place of hMETIS.

Both times the budget rule once takes the same groups of rows, where its columns cannot hold less, and once divides the
rows itself. In layers where 8 parts would have no more than 16 rows, of which the published program makes no block,
it gets as many parts as make blocks.

The weights are a ticket's (``--ticket``, unstructured), or drawn: normal, with log-normal scales of rows, of input
channels, and of input channels for each of 12 kinds of rows, so that rows have something in common; and magnitude masks
over all layers together. Drawn weights are a stand-in that favours no rule by construction; real tickets decide.

    python benchmarks/regroup_quality.py --out regroup.jsonl --ticket runs/imp_regroup-resnet_digits/rounds/4
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision

from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.regroup import RegroupRule, regroup
from deploy_sparse.sparsify.regrouping.columns import within_budget
from deploy_sparse.sparsify.regrouping.free import ratio_blocks
from deploy_sparse.sparsify.regrouping.partition import group_sums, partition
from deploy_sparse.sparsify.regrouping.rule import Columns
from deploy_sparse.sparsify.regrouping.sizes import equal_shares, group_sizes
from deploy_sparse.sparsify.regrouping.table import Block, Limits, table_of
from deploy_sparse.structure import Masks
from deploy_sparse.ticket import Ticket

Row = dict[str, Any]
Weights = Mapping[str, torch.Tensor]
DENSITY = 0.2  # of drawn masks: IMP after seven rounds
KINDS = 12
GRANULARITIES: tuple[Columns, ...] = ("position", "channel")

SPEED_RULES = {
    "paper": RegroupRule(),
    "paper, channels": RegroupRule(columns="channel"),
    "code": RegroupRule("code"),
    "budget": RegroupRule("budget"),
    "budget, channels, equal": RegroupRule("budget", columns="channel", blocks="equal", multiple=16),
    "disjoint": RegroupRule(columns="channel", blocks="disjoint"),
}


def convolutions(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a torchvision network's convolution weights."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    return {f"{n}.weight": tuple(layer.weight.shape) for n, layer in layers.items()}


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Seeded weights and their magnitude masks."""
    generator, weights = torch.Generator().manual_seed(seed), {}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for name, (rows, channels, *kernel) in shapes.items():
        kind = torch.randint(KINDS, (rows,), generator=generator)
        scale = torch.exp(0.3 * normal(rows, 1) + 0.3 * normal(1, channels) + 0.4 * normal(KINDS, channels)[kind])
        weight = normal(rows, channels, *kernel) * scale[:, :, None, None]
        weights[name] = weight / weight.std()
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = everything.kthvalue(round((1 - DENSITY) * len(everything))).values
    return weights, {name: weight.abs() > threshold for name, weight in weights.items()}


def measure_speed(repeats: int) -> Iterator[Row]:
    """Seconds for the 53 convolutions of ResNet-50 at ImageNet's shapes."""
    weights, masks = drawn(convolutions("resnet50"), seed=0)
    for name, rule in SPEED_RULES.items():
        wall, cpu = [], []
        for _ in range(repeats):
            started = time.perf_counter(), time.process_time()
            found = regroup(masks, weights, rule=rule)
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.process_time() - started[1])
        yield {
            "kind": "speed",
            "rule": name,
            "wall_s": [round(s, 3) for s in wall],
            "cpu_s": [round(s, 3) for s in cpu],
            "density": [round(d, 5) for d in (found.total.density_before, found.total.density_after)],
            "in_block_share": round(found.total.in_block_share, 5),
            "retained_magnitude": round(found.total.retained_magnitude, 5),
        }


def measure_quality(source: str, masks: Masks, weights: Weights, columns: Columns) -> Iterator[Row]:
    """One row for each layer with blocks and each partition that the ratio rule is given."""
    for name, mask in masks.items():
        if mask.dim() < 2 or mask.shape[1] < 2 or bool(mask.all()):
            continue
        for parts in ("chance", "own"):
            if (row := compare(mask, weights[name], RegroupRule("code", columns=columns), parts)) is not None:
                yield {"kind": "quality", "source": source, "layer": name, "columns": columns, "parts": parts, **row}


def compare(mask: torch.Tensor, weight: torch.Tensor, rule: RegroupRule, parts: str) -> Row | None:
    """The ratio rule's blocks, and the budget's at the same density; None where the ratio rule finds none."""
    table, _ = table_of(mask, weight, torch.ones(mask.shape[1], dtype=torch.bool), rule)
    alive = table.alive()
    limits = Limits.of(table, rule, len(alive))
    eight = len(alive) // 8 >= limits.rows
    sizes = group_sizes(len(alive), limits.rows, replace(rule, parts=8 if eight else 0))
    if parts == "chance":
        order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))
        sizes = equal_shares(len(alive), len(sizes))
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    else:
        labels = partition(table.values(alive, rule), sizes)
    published = ratio_blocks(table, alive, labels, sizes, rule, limits)
    if not published:
        return None
    norms = table.weights.double().abs().sum(dim=2)  # [rows, columns]
    area, held = covered(published, norms)
    budget = replace(rule, rule="budget", density=area / norms.numel(), parts=0)
    values = table.values(alive, budget)
    same = within_budget(
        group_sums(values, labels, len(sizes)), torch.tensor(sizes), area, narrowest=1, multiple=1
    ).chosen
    groups = [(alive[labels == g], same[g].nonzero().flatten()) for g in range(len(sizes))]
    found = regroup({"w": mask}, {"w": weight}, rule=replace(budget, min_columns=1)).layers[0]
    same_area, same_held = covered(groups, norms)
    return {
        "shape": list(mask.shape),
        "published_parts": eight,
        "blocks": len(published),
        "mask_density": round(table.density, 6),
        "density": {
            "ratio rule": round(area / norms.numel(), 6),
            "same groups": round(same_area / norms.numel(), 6),
            "budget": round(found.density_after, 6),
        },
        "magnitude": {
            "all": float(norms.sum()),
            "ratio rule": held,
            "same groups": same_held,
            "budget": found.retained,
        },
    }


def covered(blocks: tuple[Block, ...] | list[Block], norms: torch.Tensor) -> tuple[int, float]:
    """Rows × columns of blocks, and the ℓ1 norm in them."""
    area = sum(len(rows) * len(columns) for rows, columns in blocks)
    return area, sum(float(norms[rows[:, None], columns].sum()) for rows, columns in blocks)


def speed_table(rows: list[Row]) -> Table:
    """Seconds by rule."""
    return Table(
        "Regroup of ResNet-50",
        ("rule", "wall, s", "CPU, s", "density", "in blocks", "magnitude"),
        tuple(
            (
                row["rule"],
                f"{median(row['wall_s']):.1f}",
                f"{median(row['cpu_s']):.1f}",
                " → ".join(f"{d:.1%}" for d in row["density"]),
                f"{row['in_block_share']:.1%}",
                f"{row['retained_magnitude']:.1%}",
            )
            for row in rows
        ),
    )


def quality_table(rows: list[Row]) -> Table:
    """Retained magnitude at equal density: over all layers, and in the layer that is worst for the budget rule."""
    lines: list[tuple[str | int, ...]] = []
    for key in dict.fromkeys((row["source"], row["columns"], row["parts"]) for row in rows):
        own = [row for row in rows if (row["source"], row["columns"], row["parts"]) == key]
        total = {k: sum(row["magnitude"][k] for row in own) for k in own[0]["magnitude"]}
        density = {k: sum(row["density"][k] * weight_count(row) for row in own) for k in own[0]["density"]}
        size = sum(map(weight_count, own))
        lines.append(
            (
                ", ".join(key),
                len(own),
                " / ".join(f"{density[k] / size:.2%}" for k in ("ratio rule", "budget")),
                f"{total['ratio rule'] / total['all']:.2%}",
                *(f"{total[k] / total['ratio rule']:.4f} ({worst(own, k):.4f})" for k in ("same groups", "budget")),
            )
        )
    return Table(
        "Retained magnitude beside the ratio rule",
        ("weights, columns, parts", "layers", "density, ratio rule / budget", "ratio rule", "same groups", "budget"),
        tuple(lines),
        "The last two columns are multiples of what the ratio rule retains (in brackets: in the worst layer).",
    )


def text(rows: list[Row]) -> str:
    """Both tables as Markdown."""
    conditions, *rest = rows
    speed = [row for row in rest if "wall_s" in row]
    quality = [row for row in rest if "magnitude" in row]
    threads = f"ResNet-50's 53 convolutions, {conditions['threads']} threads:"
    return f"{threads}\n\n{markdown(speed_table(speed))}\n{markdown(quality_table(quality))}"


def weight_count(row: Row) -> int:
    """Entries of a layer."""
    return int(torch.Size(row["shape"]).numel())


def worst(rows: list[Row], kind: str) -> float:
    """The least ratio over layers."""
    return min(float(row["magnitude"][kind] / row["magnitude"]["ratio rule"]) for row in rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--ticket", type=Path, action="append", default=[], help="folder of an unstructured ticket")
    parser.add_argument("--networks", nargs="*", default=["resnet50", "vgg16_bn"], help="for drawn weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed = list(measure_speed(options.repeats))
    sources: dict[str, tuple[Masks, Weights]] = {}
    for folder in options.ticket:
        ticket = Ticket.load(folder)
        sources[f"{ticket.model.name} {ticket.hash[:8]}"] = ticket.masks, ticket.weights
    for network in options.networks:
        weights, masks = drawn(convolutions(network), seed=1)
        sources[f"{network} drawn"] = masks, weights
    quality = [
        row
        for source, (masks, weights) in sources.items()
        for columns in GRANULARITIES
        for row in measure_quality(source, masks, weights, columns)
    ]
    conditions = {"kind": "conditions", "threads": options.threads, "environment": environment()}
    lines = [json.dumps(row) for row in (conditions, *speed, *quality)]
    write_bytes(options.out, ("\n".join(lines) + "\n").encode())
    write_bytes(options.out.with_suffix(".md"), text([conditions, *speed, *quality]).encode())
    print(text([conditions, *speed, *quality]))


if __name__ == "__main__":
    main()
