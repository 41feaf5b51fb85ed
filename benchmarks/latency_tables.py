"""Latency tables of whole networks: the staircase of a target, what the tables cost, and how well they predict.

For every network a table is made as `deploy-sparse table` makes it, with networks cut by one-shot magnitude that it is
checked on. One JSON line a network is added to --out; those that it has are not measured again, and times of single
layers are kept in the user's cache, so that a stopped run goes on. Beside it the tables (.md) and a report with the
staircases drawn (.html) are written.

    python benchmarks/latency_tables.py --out benchmarks/records/cpu-2-cores/latency-tables/results.jsonl
    python benchmarks/latency_tables.py --networks resnet18:32 --seconds 30 --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.cli.table import CUTS, CutNetworks, network_and_inputs
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.report import Report, render_html
from deploy_sparse.measure.table import Table, markdown, times
from deploy_sparse.tune.latency.measure import measure_table
from deploy_sparse.tune.latency.table import LatencyTable
from deploy_sparse.tune.layer_bench import layer_times_folder

NETWORKS = ("torchvision/resnet18:224", "torchvision/resnet50:224", "torchvision/mobilenet_v2:224", "vgg16_bn:32")

Row = dict[str, Any]


def measure(network: str, target: str, batch: int, seconds: float, network_s: float) -> Row:
    """One network's table, as a row."""
    name, _, size = network.partition(":")
    module, inputs = network_and_inputs(name, int(size))
    started, worked = time.perf_counter(), time.process_time()
    table = measure_table(
        module,
        inputs,
        target,
        batch=batch,
        seconds=seconds,
        network_s=network_s,
        cuts=CutNetworks(module, inputs, CUTS, strict=True),
        cache=layer_times_folder(),
        say=lambda line: print(f"{network}: {line}", file=sys.stderr, flush=True),
    )
    return {
        "network": network,
        "target": table.target["name"],
        "batch": batch,
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - worked, 1),
        **facts(table),
        "environment": environment(),
    }


def facts(table: LatencyTable) -> Row:
    """What a table says, without its points."""
    surfaces = table.surfaces.values()
    return {
        "layers": len(table.layers),
        "shapes": len(table.surfaces),
        "points": sum(len(surface.points) + len(surface.checks) for surface in surfaces),
        "settled": all(surface.settled for surface in surfaces),
        "clock": table.clock,
        "dense_ms": table.dense_ms,
        "rest_ms": table.rest_ms,
        "context": table.context,
        "multiple": table.multiple,
        "error": table.error,
        "staircases": [
            {"layer": str(s.layer), "multiple": s.multiple, "noise": s.noise, "ms": sorted(s.ms.items())}
            for s in table.staircases
        ],
        "cuts": [
            {"name": c.name, "measured": c.ratio, "layers": c.layers, "predicted": c.predicted, "error": c.error}
            for c in table.cuts
        ],
    }


def text(rows: list[Row]) -> str:
    """The rows as Markdown tables."""
    return "\n".join(f"### {table.title}\n\n{markdown(table)}" for table in tables(rows))


def tables(rows: list[Row]) -> tuple[Table, ...]:
    """What the tables cost and say, what they predict, and the staircases."""
    overview = tuple(
        (
            row["network"],
            row["batch"],
            row["shapes"],
            row["points"],
            row["wall_s"],
            row["cpu_s"],
            row["dense_ms"],
            f"{row['rest_ms'] / row['dense_ms']:.1%}",
            f"{row['context']:.2f}",
            row["multiple"],
            None if row["error"] is None else f"{row['error']:.1%}",
        )
        for row in rows
    )
    columns = (
        *("network", "batch", "shapes", "points", "wall s", "CPU s", "dense ms", "rest", "context", "multiple"),
        "largest error",
    )
    note = (
        "Rest: what does not come with the layers' channels. Context: what a layer takes amid the network over what it "
        "takes alone. Largest error: of the cut networks below, each predicted from the others. Seconds are those of "
        "the call that finished, with cutting, verifying and exporting the networks; times of layers that a stopped "
        "call had left in the cache cost it nothing."
    )
    predicted = tuple(
        (
            row["network"],
            cut["name"],
            f"{cut['measured']:.3f}",
            None if cut["predicted"] is None else f"{cut['predicted']:.3f}",
            None if cut["error"] is None else f"{100 * cut['error']:+.1f} %",
        )
        for row in rows
        for cut in row["cuts"]
    )
    steps = tuple(
        (
            row["network"],
            found["layer"],
            found["multiple"],
            f"{100 * found['noise']:.1f} %",
            *(times(_relative(found).get(back)) for back in (16, 15, 12, 8, 4, 1)),
        )
        for row in rows
        for found in row["staircases"]
    )
    below = [f"{back} below" for back in (16, 15, 12, 8, 4, 1)]
    return (
        Table("Latency tables", columns, overview, note),
        Table("Predicted networks", ("network", "cut", "measured, of dense", "predicted", "error"), predicted),
        Table(
            "Staircases", ("network", "layer, input and output channels alike", "multiple", "noise", *below), steps,
            "Time that many channels below the largest count that was timed, over the time there.",
        ),
    )  # fmt: skip


def report(rows: list[Row]) -> str:
    """The tables with the staircases drawn, as one HTML document."""
    plots = tuple(
        LinePlot(
            f"The staircase of {row['network']}",
            "input and output channels",
            "time over that of the largest count",
            tuple(
                Series(found["layer"], tuple((float(c), ms / found["ms"][-1][1]) for c, ms in found["ms"]))
                for found in row["staircases"]
            ),
        )
        for row in rows
        if row["staircases"]
    )
    conditions = tuple((f"{row['network']}: {key}", value) for row in rows for key, value in row["environment"].items())
    return render_html(Report("Latency tables", (), (), tables=tables(rows), plots=plots, conditions=conditions))


def _relative(found: Row) -> dict[int, float]:
    """Time over that of the largest count, by how far below it the count is."""
    last, most = found["ms"][-1]
    return {last - count: ms / most for count, ms in found["ms"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; the tables are written beside it")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME:PIXELS")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=420.0, help="of refining, at most, for each network")
    parser.add_argument("--network-seconds", type=float, default=2.0, help="timed seconds of each whole network")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {(row["network"], row["target"], row["batch"]) for row in rows}
    for network in options.networks:
        if (network, options.target, options.batch) in known:
            continue
        rows.append(measure(network, options.target, options.batch, options.seconds, options.network_seconds))
        write_bytes(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_bytes(options.out.with_suffix(".md"), text(rows).encode())
        write_bytes(options.out.with_suffix(".html"), report(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
