"""What shortcuts cost where masks disagree: all layers write what any of them writes, or each looks its zeros up.

Every layer loses its own rows of smallest ℓ1 norm, whatever the other layers of its shortcut lose, with their biases
and norms. Such a ticket is compacted twice: with ``shortcuts="union"``, the default, and with ``"spread"``, which adds
each layer's own rows into the stream by index. Both are proven equal to the masked network, exported, and timed beside
the dense network in alternating blocks. One JSON line for each network, sparsity and batch is added to --out.

    python benchmarks/shortcuts.py --out benchmarks/records/cpu-2-cores/shortcuts/results.jsonl
    python benchmarks/shortcuts.py --networks resnet18 --sparsities 0.5 --target cpu --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.target import Target, load_target
from deploy_sparse.measure.profile import profile
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.structure import ChannelGroup, Slice
from deploy_sparse.surgery.compact import Compact, compact
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

NETWORKS = ("torchvision/resnet18:64", "torchvision/resnet50:64", "torchvision/resnet18:224")
SPARSITIES = (0.25, 0.5, 0.75)
BATCHES = (1, 8)
FORMS = ("union", "spread")


def own_rows(model: torch.nn.Module, groups: Sequence[ChannelGroup], sparsity: float) -> Ticket:
    """A ticket in which every layer lost its own rows of smallest ℓ1 norm, silently; no layer asks another one."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        for producer in group.producers if group.pinned is None else ():
            weight = weights[producer.weight.name]
            norms = weight.abs().flatten(1).sum(dim=1)  # [rows]
            gone = torch.zeros(len(norms), dtype=torch.bool)
            gone[norms.argsort()[: int(sparsity * len(norms))]] = True
            parts = [s for s in (producer.weight, producer.bias, *producer.norms) if s is not None]
            for part in parts:
                _mask_(masks, weights, part, gone)
    return Ticket(weights, masks, ModelRef("user factory", {}), Provenance("own rows"))


def _mask_(masks: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], part: Slice, gone: torch.Tensor) -> None:
    mask = masks.setdefault(part.name, torch.ones_like(weights[part.name], dtype=torch.bool))
    mask.index_fill_(part.dim, part.positions(gone), False)


def measure(network: str, sparsity: float, target: Target, *, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """One row for each batch size."""
    name, _, size = network.rpartition(":")
    inputs = torch.randn(2, 3, int(size), int(size), generator=torch.Generator().manual_seed(0))

    def factory() -> torch.nn.Module:
        torch.manual_seed(0)
        return zoo.build(name).eval()

    model = factory()
    ticket = own_rows(model, channel_groups(model, inputs), sparsity)
    made = {form: compact(ticket, factory, inputs, multiple=target.width_multiple, shortcuts=form) for form in FORMS}
    engines = {"dense": build_engine(model, target, inputs, folder, name="dense")}
    engines |= {form: build_engine(made[form], target, out=folder, name=form) for form in FORMS}
    return [row for batch in BATCHES for row in _timed(network, sparsity, batch, engines, made, seconds)]


def _timed(
    network: str, sparsity: float, batch: int, engines: dict[str, Engine], made: dict[str, Compact], seconds: float
) -> list[dict[str, Any]]:
    found = profile(engines, "dense", batches=(batch,), duration_s=seconds)
    ratios = {
        c.subject: [round(v, 4) if v is not None else None for v in (c.ratio, c.low, c.high)] for c in found.comparisons
    }
    before = made["union"].plan.cost_before.macs
    return [
        {
            "kind": "shortcuts",
            "network": network,
            "sparsity": sparsity,
            "batch": batch,
            "target": engines["dense"].target.name,
            "macs": {form: round(each.plan.cost_after.macs / before, 4) for form, each in made.items()},
            "look_ups": len(made["spread"].plan.shape.spreads),
            "float64": {form: each.parity.float64.max_rel for form, each in made.items()},
            "speed_up": ratios,
            "pairs": found.comparisons[0].pairs,
            "environment": environment(),
        }
    ]


def text(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""

    def ratio(row: dict[str, Any], form: str) -> str:
        middle, low, high = row["speed_up"][form]
        return f"{middle:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")

    cells = [
        (
            row["network"],
            f"{row['sparsity']:.0%}",
            row["batch"],
            *(f"{row['macs'][form]:.0%}" for form in FORMS),
            row["look_ups"],
            *(ratio(row, form) for form in FORMS),
        )
        for row in rows
    ]
    columns = (
        *("network", "rows gone in each layer", "batch", "MACs, union", "MACs, spread", "look-ups"),
        *("union over dense", "spread over dense"),
    )
    note = (
        f"Speed-up over the dense network on target {rows[0]['target']}, with 95 % intervals; both forms are exactly "
        "equal to the masked network. Union: all layers of a shortcut write what any of them writes. Spread: each "
        "writes its own rows and looks the zeros up."
    )
    return markdown(Table("Masks that disagree across shortcuts", columns, tuple(cells), note))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; the table is written beside it")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="zoo network:image size")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed seconds for each network and batch")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    target = load_target(options.target)
    for network in options.networks:
        for sparsity in options.sparsities:
            with tempfile.TemporaryDirectory(prefix="shortcuts-") as folder:
                found = measure(network, sparsity, target, seconds=options.seconds, folder=Path(folder))
            rows += found
            write_bytes(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
            write_bytes(options.out.with_suffix(".md"), text(rows).encode())
            for row in found:
                print(network, sparsity, row["batch"], row["macs"], row["speed_up"], flush=True)


if __name__ == "__main__":
    main()
