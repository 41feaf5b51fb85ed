"""What block-packed layers save in ONNX Runtime: single layers, whole networks, and what the planner makes of tickets.

* ``layers``: 3×3 convolutions whose blocks are disjoint, equal, or free, against the dense layer. ``alone`` looks its
  channels up on both sides; ``inside`` leaves to its neighbours what they can take, as in a network.
* ``networks``: one-shot block tickets (no training) of whole networks, packed in full, against the dense network.
  Layers that write into one residual stream divide their rows alike, but for one form.
* ``planner``: the same tickets, and channel tickets, through ``format="auto"``, against the dense network.

Everything packed is proven equal to the masked layer or network before it is timed. Subjects alternate with the dense
one in blocks. ``of ideal`` is the speed-up over the ratio of multiply-accumulates. One JSON line a measurement is added
to --out; what it has is not measured again. Beside it the tables (.md) and a report with plots (.html) are written.

    python benchmarks/packed.py --out benchmarks/records/cpu-2-cores/packed/results.jsonl
    python benchmarks/packed.py --parts layers --seconds 1 --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.api import oneshot_ticket
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.target import Target, load_target
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.profile import Profile, profile
from deploy_sparse.measure.report import Report, render_html
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.regroup import RegroupRule
from deploy_sparse.surgery.compact import Compact, compact
from deploy_sparse.surgery.packed import PackedConv2d, packing_of
from deploy_sparse.ticket import ModelRef, Ticket
from deploy_sparse.tune.formats import choose_format

LAYERS = ((128, 28), (256, 14), (512, 7), (256, 8), (512, 4))  # channels, height and width
NETWORKS = ("resnet18:32", "torchvision/resnet18:224", "torchvision/resnet50:224")
ZOO = (*(f"{name}:{entry.input_shape[1]}" for name, entry in zoo.ZOO.items()), *NETWORKS[1:])
FORMS = ("disjoint", "equal", "free")
QUARTER = "equal, a quarter pruned"  # where packing should break even
WHOLE = ("disjoint", "equal", "equal, each layer for itself")  # blocks of whole networks
PARTS = (2, 4, 8)  # blocks of a layer, and one over its density
SPARSITIES = (0.3, 0.5, 0.75, 0.9)
GOALS = {2: 0.92, 4: 0.92, 8: 0.88}

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how long everything is timed."""

    target: Target
    seconds: float
    batch: int = 1

    def time(self, networks: dict[str, nn.Module], inputs: torch.Tensor) -> Profile:
        """All of them side by side, the first one's time over theirs."""
        with tempfile.TemporaryDirectory(prefix="packed-") as folder:
            engines = {n: build_engine(m, self.target, inputs, folder, name=n) for n, m in networks.items()}
            return profile(engines, next(iter(engines)), batches=(self.batch,), duration_s=self.seconds)


def layer_rows(bench: Bench, done: set[str]) -> Iterator[Row]:
    """Single convolutions."""
    for channels, size in LAYERS:
        for form, parts in (*product(FORMS, PARTS), (QUARTER, 2)):
            key = f"layer {channels}@{size} {form} {parts}"
            if key not in done:
                yield {"key": key, **_layer(bench, channels, size, form, parts)}


def _layer(bench: Bench, channels: int, size: int, form: str, parts: int) -> Row:
    generator = torch.Generator().manual_seed(parts)
    mask = block_mask(channels, form, parts, generator)
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator) * mask)
    alone = PackedConv2d.of(dense, packing_of(mask))
    ordered = block_mask(channels, form, parts, generator, ordered=True)
    twin = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    with torch.no_grad():
        twin.weight.copy_(torch.randn(dense.weight.shape, generator=generator) * ordered)
    inside = PackedConv2d.of(twin, packing_of(ordered))
    x = torch.randn(2, channels, size, size, generator=generator)
    for layer, packed in ((dense, alone), (twin, inside)):
        assert torch.allclose(layer(x), packed(x), atol=1e-3)
    found = bench.time({"dense": dense, "alone": alone, "inside": inside}, x)
    return {
        "part": "layers",
        "layer": f"3×3, {channels} channels at {size}×{size}",
        "channels": channels,
        "form": form,
        "blocks": parts,
        "ideal": float(mask.numel() / mask.sum()),
        **_times(found),
    }


def block_mask(
    channels: int, form: str, parts: int, generator: torch.Generator, *, ordered: bool = False
) -> torch.Tensor:
    """Random blocks of a 3×3 weight, bool ``[channels, channels, 3, 3]``; ``ordered``: rows of a block are neighbours.

    Disjoint blocks of an ordered mask have neighbouring columns too. Free blocks have rows and columns of about the
    size of equal ones, in multiples of 16.
    """
    size = channels // parts
    mask = torch.zeros(channels, channels, dtype=torch.bool)
    rows = torch.arange(channels) if ordered else torch.randperm(channels, generator=generator)
    columns = torch.arange(channels) if ordered else torch.randperm(channels, generator=generator)
    step = 16 if form == "free" and size > 16 else 0
    start = 0
    for number in range(parts):
        sign = (-1) ** number if number < parts // 2 * 2 else 0
        tall, wide = size + sign * step, size - sign * step
        wide = channels * 3 // 4 if form == QUARTER else wide
        own = columns[number * size : (number + 1) * size]
        if form != "disjoint":
            own = torch.randperm(channels, generator=generator)[:wide]
        mask[rows[start : start + tall, None], own] = True
        start += tall
    return mask[:, :, None, None].expand(-1, -1, 3, 3).contiguous()


def network_rows(bench: Bench, done: set[str]) -> Iterator[Row]:
    """Whole networks, every layer that has blocks packed."""
    for network in NETWORKS:
        for parts in PARTS:
            for form in WHOLE:
                key = f"network {network} {form} {parts}"
                if key not in done:
                    yield {"key": key, **_network(bench, network, form, parts)}


def _network(bench: Bench, network: str, form: str, parts: int) -> Row:
    factory, inputs = subject(network)
    ticket = block_ticket(network, form, parts)
    made = compact(ticket, factory, inputs, multiple=bench.target.width_multiple, format="packed")
    found = bench.time({"dense": factory(), "packed": made.module}, inputs)
    return {
        "part": "networks",
        "network": network,
        "form": form,
        "blocks": parts,
        **_what(made),
        **_times(found),
    }


def _what(made: Compact) -> Row:
    packings = [pack.packing for pack in made.plan.shape.packs]
    return {
        "ideal": made.plan.cost_before.macs / made.plan.cost_after.macs,
        "packed_layers": len(packings),
        "look_ups": sum(p.gathers + p.restores for p in packings) + len(made.plan.shape.spreads),
        "float64": made.parity.float64.max_rel,
    }


def planner_rows(bench: Bench, done: set[str]) -> Iterator[Row]:
    """What ``format="auto"`` makes of one-shot tickets."""
    for pattern in ("blocks", "channels"):
        for network in ZOO:
            for sparsity in SPARSITIES:
                key = f"planner {network} {pattern} {sparsity}"
                if key not in done:
                    yield {"key": key, **_planned(bench, network, pattern, sparsity)}


def _planned(bench: Bench, network: str, pattern: str, sparsity: float) -> Row:
    factory, inputs = subject(network)
    rule = RegroupRule("budget", "channel", "equal", density=1 - sparsity, tile=16, multiple=16, coupling="group")
    model = factory()
    if pattern == "blocks":
        ticket = oneshot_ticket(model, inputs, "blocks", sparsity, rule=rule)
    else:
        ticket = oneshot_ticket(model, inputs, "channels", sparsity)
    made, choice = choose_format(ticket, factory, bench.target, inputs, batch=bench.batch, duration_s=bench.seconds)
    found = bench.time({"dense": factory(), "chosen": made.module}, inputs)
    return {
        "part": "planner",
        "network": network,
        "pattern": pattern,
        "sparsity": sparsity,
        "format": choice.name,
        "candidates": {n.name: round(n.ratio, 4) for n in choice.networks},
        **_what(made),
        **_times(found),
    }


def subject(network: str) -> tuple[Callable[[], nn.Module], torch.Tensor]:
    """A factory of the network with its first weights, and a batch of noise for it."""
    name, _, size = network.rpartition(":")

    def factory() -> nn.Module:
        torch.manual_seed(0)
        return zoo.build(name).eval()

    channels = zoo.ZOO[name].input_shape[0] if name in zoo.ZOO else 3
    return factory, torch.randn(2, channels, int(size), int(size), generator=torch.Generator().manual_seed(0))


def block_ticket(network: str, form: str, parts: int) -> Ticket:
    """A one-shot ticket of blocks of whole input channels."""
    factory, inputs = subject(network)
    coupling: Literal["layer", "group"] = "layer" if "itself" in form else "group"
    rule = RegroupRule(blocks="disjoint", columns="channel", parts=parts, tile=16, coupling=coupling)
    if form != "disjoint":
        rule = RegroupRule(
            "budget", "channel", "equal", parts=parts, density=1 / parts, tile=16, multiple=16, coupling=coupling
        )
    ticket = oneshot_ticket(factory(), inputs, "blocks", 1 - 1 / parts, rule=rule)
    return replace(ticket, model=ModelRef("user factory", {}))


def _times(found: Profile) -> Row:
    records = {record.subject: record for record in found.records}
    dense = next(iter(records.values()))
    return {
        "batch": dense.batch,
        "target": dense.target,
        "speed_up": {
            c.subject: [round(c.ratio, 4), c.low and round(c.low, 4), c.high and round(c.high, 4)]
            for c in found.comparisons
        },
        "cpu_speed_up": {
            name: round(dense.cpu_ms / record.cpu_ms, 4) for name, record in records.items() if record is not dense
        },
        "environment": environment(),
    }


def text(rows: list[Row]) -> str:
    """The tables as Markdown."""
    return "\n".join(markdown(table) for table in tables(rows))


def tables(rows: list[Row]) -> tuple[Table, ...]:
    """One table for each part that was measured."""
    makers = {"layers": _layer_table, "networks": _network_table, "planner": _planner_table}
    found = [make([row for row in rows if row["part"] == part]) for part, make in makers.items()]
    return tuple(table for table in found if table.rows)


def plots(rows: list[Row]) -> tuple[LinePlot, ...]:
    """Speed-up over sparsity beside the ideal line, one plot for each layer and network."""
    found = []
    for part, subject_key, measured in (("layers", "layer", "inside"), ("networks", "network", "packed")):
        for name in dict.fromkeys(row[subject_key] for row in rows if row["part"] == part):
            own = [row for row in rows if row["part"] == part and row[subject_key] == name]
            equal = {QUARTER: "equal"}  # one line for both
            lines = [
                _line(form, [r for r in own if equal.get(r["form"], r["form"]) == form], measured)
                for form in (*FORMS, WHOLE[2])
            ]
            ideal = tuple((100 * (1 - 1 / ratio), ratio) for ratio in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
            series = (Series("ideal", ideal), *(line for line in lines if line.points))
            note = "Ideal: one over the share of weights left in blocks." if part == "layers" else _IDEAL
            found.append(
                LinePlot(f"{name}: speed-up over dense", "weights outside of blocks, %", "times", series, note)
            )
    return tuple(found)


_IDEAL = "Ideal: one over the share of weights left in blocks; layers without blocks keep the network below it."


def _line(form: str, rows: list[Row], measured: str) -> Series:
    over = "ideal" if measured == "inside" else "blocks"  # of a layer they differ where blocks are not even
    points = {100 * (1 - 1 / row[over]): row["speed_up"][measured][0] for row in rows}
    return Series(form, tuple(sorted(points.items())))


def report(rows: list[Row]) -> str:
    """Plots and tables as one HTML file."""
    first = rows[0]
    lines = (f"Target {first['target']}, batch {first['batch']}; {first['environment']['processor']}",)
    return render_html(Report("Block-packed layers", (), (), lines, tables(rows), (), plots(rows)))


def _ratio(row: Row, name: str) -> str:
    middle, low, high = row["speed_up"][name]
    return f"{middle:.2f}" + (f" ({low:.2f} to {high:.2f})" if low else "")


def _layer_table(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        shares = {name: row["speed_up"][name][0] / row["ideal"] for name in ("alone", "inside")}
        quarter = row["form"] == QUARTER
        goal = None if row["channels"] < 256 else 1 / row["ideal"] if quarter else GOALS[row["blocks"]]
        met = "–" if goal is None else "yes" if shares["inside"] >= goal else "no"
        cells.append(
            (
                row["layer"],
                row["form"],
                row["blocks"],
                f"{row['ideal']:.2f}",
                _ratio(row, "alone"),
                _ratio(row, "inside"),
                *(f"{shares[name]:.2f}" for name in ("alone", "inside")),
                met,
            )
        )
    columns = ("layer", "form", "blocks", "ideal", "alone", "inside", "of ideal, alone", "of ideal, inside", "goal met")
    note = (
        "Dense time over packed time, with 95 % intervals; of ideal: that over the ratio of multiply-accumulates. "
        "Goal: 0.92 of the ideal at 2 and 4 blocks, 0.88 at 8, from 256 channels on; break-even with a quarter pruned."
    )
    return Table("Single layers", columns, tuple(cells), note)


def _network_table(rows: list[Row]) -> Table:
    cells = tuple(
        (
            row["network"],
            row["form"],
            row["blocks"],
            row["packed_layers"],
            row["look_ups"],
            f"{row['ideal']:.2f}",
            _ratio(row, "packed"),
            f"{row['cpu_speed_up']['packed']:.2f}",
            f"{row['speed_up']['packed'][0] / row['ideal']:.2f}",
        )
        for row in rows
    )
    columns = (
        *("network", "form", "blocks", "layers packed", "look-ups", "ideal", "over dense"),
        *("in processor time", "of ideal"),
    )
    return Table(
        "Whole networks, every layer of blocks packed", columns, cells, "Ideal: ratio of multiply-accumulates."
    )


def _planner_table(rows: list[Row]) -> Table:
    cells = tuple(
        (
            row["network"],
            row["pattern"],
            f"{row['sparsity']:.0%}",
            row["format"],
            f"{row['ideal']:.2f}",
            _ratio(row, "chosen"),
            f"{row['cpu_speed_up']['chosen']:.2f}",
        )
        for row in rows
    )
    columns = ("network", "ticket", "sparsity", "chosen", "ideal", "over dense", "in processor time")
    return Table("What the planner chose", columns, cells, "Goal: never below 0.98 of the dense network's speed.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; the tables are written beside it")
    parts = {"layers": layer_rows, "networks": network_rows, "planner": planner_rows}
    parser.add_argument("--parts", nargs="+", choices=parts, default=tuple(parts))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each subject")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    bench = Bench(load_target(options.target), options.seconds, options.batch)
    others = {(row["target"], row["batch"]) for row in rows} - {(bench.target.name, bench.batch)}
    if others:
        parser.error(f"{options.out} holds times of {others}: choose another file for this target and batch")
    for part in options.parts:
        for row in parts[part](bench, {known["key"] for known in rows}):
            rows.append(row)
            write_bytes(options.out, "".join(json.dumps(each) + "\n" for each in rows).encode())
            write_bytes(options.out.with_suffix(".md"), text(rows).encode())
            write_bytes(options.out.with_suffix(".html"), report(rows).encode())
            print(row["key"], f"ideal {row['ideal']:.2f}", row["speed_up"], row["cpu_speed_up"], flush=True)


if __name__ == "__main__":
    main()
