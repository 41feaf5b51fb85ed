"""What dynamic sparse training costs: a step away from updates against a dense one, and an update in plain steps.

Both methods move masks over every convolution and Linear layer: `rigl` drops and grows layer by layer, by gradient,
every 100 steps; `chase` explores globally under a soft bound every 1000 steps, and here removes channels in the same
step, which its own schedule keeps apart. Settings are the presets' for a training of 160 epochs of 500 steps.

* Between updates: as in mask_cost.py, two copies of one network and one batch, one dense and without masks. The cost is
  the median over paired blocks of (DST step / dense step) - 1.
* Updates: one network takes plain steps and steps with an update, in alternating blocks. The cost of an update is what
  it adds to a step, in plain steps of the same method: the median over paired blocks of (step with update / plain step)
  - 1. Chase's updates go through the first half of its removals one by one, then start over from the first masks.

Intervals are bootstraps over the pairs; processor time beside them says whether to believe them on a busy machine. One
JSON line a measurement is added to --out.

    python benchmarks/dst_cost.py --out benchmarks/records/cpu-2-cores/dst-cost/results.jsonl
    python benchmarks/dst_cost.py --subjects --updates resnet50:32 --device cuda --seconds 10 --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.measure.interleave import Samples, interleave
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.channel_schedule import ChannelSchedule
from deploy_sparse.sparsify.chase import Chase
from deploy_sparse.sparsify.coupling import channel_pools
from deploy_sparse.sparsify.dst import DynamicMasks, initial_masks
from deploy_sparse.sparsify.exploration import PRESETS
from deploy_sparse.sparsify.imp import dense_masks, head_of
from deploy_sparse.sparsify.method import Method
from deploy_sparse.surgery.cost import layer_macs
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.train.runtime import Runtime, RuntimeConfig, start_runtime
from deploy_sparse.train.schedule import FitConfig
from deploy_sparse.train.step import TrainStep

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from mask_cost import CLASSES, IMAGE, SUBJECTS, relative_cost

UPDATED = ("resnet50:32",)
METHODS = ("rigl", "chase")
DENSITY = 0.1
EPOCH, EPOCHS = 500, 160
REMOVALS = ChannelSchedule(0.5, interval=1000, offset=0, until=130 * EPOCH)
FLOOR = 0.2
STEP_GOAL, UPDATE_GOAL = 0.05, 3.0

Row = dict[str, Any]


def measure_step(network: str, batch: int, name: str, runtime: Runtime, *, seconds: float, block_ms: float) -> Row:
    """What the method adds to a dense step while its masks rest; times in ms a step."""
    dense = _training(network, Method(), batch, runtime)
    sparse = _training(network, make_method(network, name), batch, runtime)
    calls = {"dense": _step(dense, batch), "sparse": _step(sparse, batch), "masks alone": _masks_alone(sparse)}
    found = interleave(calls, warmup_ms=1000 * min(2.0, seconds), duration_s=seconds, block_ms=block_ms)
    row = _row("step between updates", network, batch, name, sparse, runtime)
    alone = _typical(found["masks alone"]) / _typical(found["dense"])
    return {**row, **_cost(found, "dense", "sparse", STEP_GOAL), "masks_alone_over_dense": round(alone, 5)}


def measure_update(network: str, batch: int, name: str, runtime: Runtime, *, seconds: float, block_ms: float) -> Row:
    """What an update adds to a step, in plain steps of the same method; times in ms a step."""
    method = make_method(network, name)
    training = _training(network, method, batch, runtime)
    steps = _Steps(method)
    calls = {"plain": _step(training, batch, steps.plain), "update": _step(training, batch, steps.update)}
    found = interleave(calls, warmup_ms=1000 * min(2.0, seconds), duration_s=seconds, block_ms=block_ms)
    row = _row("update", network, batch, name, training, runtime)
    return {**row, **_cost(found, "plain", "update", UPDATE_GOAL)}


def make_method(network: str, name: str) -> DynamicMasks:
    """One of ``METHODS`` for a zoo network, as the recipes set it up."""
    model = zoo.build(network).eval()
    weights = dense_masks(model, head=True)
    masks, exploration = initial_masks(weights, DENSITY, "erk", 0), PRESETS[name](EPOCH, EPOCHS * EPOCH)
    macs = layer_macs(model, (torch.zeros(1, *IMAGE),))
    if name != "chase":
        return DynamicMasks(masks, exploration, macs=macs)
    groups = channel_groups(model, (torch.zeros(2, *IMAGE),))
    pools = channel_pools(weights, groups, "internal", head=head_of(model))
    return Chase(masks, exploration, pools, REMOVALS, floor=FLOOR, macs=macs)


def _training(network: str, method: Method, batch: int, runtime: Runtime) -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(zoo.build(network).train(), FitConfig(batch_size=batch), method, runtime, {})


def _step(training: TrainStep, batch: int, number: Callable[[], int] = lambda: 0) -> Callable[[], None]:
    """A call that takes optimizer step ``number()``, by default one without an update, and returns when it is done."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *IMAGE, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    ((images, labels),) = training.runtime.batches([(images, labels)])

    def call() -> None:
        training(images, labels, number(), 1e-4)  # a rate that leaves the network where it is, however long this runs
        _wait(training.runtime)

    call()  # from here on the optimizer has its momentum
    return call


class _Steps:
    """Numbers of steps that an update follows, and of the plain steps after each."""

    def __init__(self, method: DynamicMasks) -> None:
        self.method, self.taken = method, 0
        self.first = {name: tensor.clone() for name, tensor in method.state().items()}
        removals = [taken for taken in REMOVALS.events() if taken <= REMOVALS.until // 2]
        self.updates = cycle(removals if isinstance(method, Chase) else [method.exploration.interval])

    def update(self) -> int:
        before, self.taken = self.taken, next(self.updates)
        if self.taken < before:  # removed channels do not come back of themselves
            self.method.restore_(self.first)
        return self.taken - 1

    def plain(self) -> int:
        return self.taken


def _masks_alone(training: TrainStep) -> Callable[[], None]:
    def call() -> None:
        training.method.after_backward_(training.model, 0)
        training.method.after_step_(training.model, training.optimizer, 0)
        _wait(training.runtime)

    return call


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def _row(kind: str, network: str, batch: int, name: str, training: TrainStep, runtime: Runtime) -> Row:
    """What was measured, and where; ``figures`` are the masks' after the last step."""
    return {
        "kind": kind,
        "network": network,
        "batch": batch,
        "image_shape": list(IMAGE),
        "method": name,
        "density": DENSITY,
        "figures": training.method.figures(),
        "runtime": runtime.config.model_dump(mode="json"),
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "environment": environment(),
    }


def _cost(found: Mapping[str, Samples], base: str, other: str, goal: float) -> Row:
    cost, low, high = relative_cost(found[base], found[other])
    blocks = {name: [round(median(block), 4) for block in samples.blocks_ms] for name, samples in found.items()}
    return {
        "cost": round(cost, 5),
        "interval": [round(low, 5), round(high, 5)],
        "within_goal": high <= goal,
        "goal": goal,
        "cost_in_processor_time": round(found[other].cpu_ms / found[base].cpu_ms - 1, 5),
        "pairs": len(found[base].blocks_ms),
        "step_ms": {name: round(_typical(samples), 4) for name, samples in found.items()},
        "blocks_ms": blocks,
    }


def _typical(samples: Samples) -> float:
    return median(median(block) for block in samples.blocks_ms)


def text(rows: list[Row]) -> str:
    """The measurements as two Markdown tables, those that were made."""
    steps = [row for row in rows if row["kind"] == "step between updates"]
    updates = [row for row in rows if row["kind"] == "update"]
    return "\n".join(markdown(table) for table in (_step_table(steps), _update_table(updates)) if table.rows)


def _step_table(rows: list[Row]) -> Table:
    cells = [
        (
            *_what(row),
            row["step_ms"]["dense"],
            f"{row['cost']:+.2%} ({row['interval'][0]:+.2%} to {row['interval'][1]:+.2%})",
            row["pairs"],
            f"{row['cost_in_processor_time']:+.2%}",
            f"{row['masks_alone_over_dense']:.2%}",
        )
        for row in rows
    ]
    columns = (
        *("method", "network", "batch", "device", "precision", "dense step, ms", "DST adds (95 % interval)", "pairs"),
        *("in processor time", "masks alone / dense step"),
    )
    note = f"Away from updates the goal is at most {STEP_GOAL:.0%} of a dense step."
    return Table("Steps between updates", columns, tuple(cells), note)


def _update_table(rows: list[Row]) -> Table:
    cells = [
        (
            *_what(row),
            row["step_ms"]["plain"],
            f"{row['cost']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})",
            row["pairs"],
            f"{row['cost_in_processor_time']:.2f}",
        )
        for row in rows
    ]
    columns = (
        *("method", "network", "batch", "device", "precision", "plain step, ms"),
        *("an update adds, in plain steps (95 % interval)", "pairs", "in processor time"),
    )
    return Table("Updates", columns, tuple(cells), f"The goal for an update is at most {UPDATE_GOAL:g} plain steps.")


def _what(row: Row) -> tuple[str, str, int, str, str]:
    return row["method"], row["network"], row["batch"], row["device"], row["runtime"]["precision"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--subjects", nargs="*", default=SUBJECTS, help="network:batch for steps between updates")
    parser.add_argument("--updates", nargs="*", default=UPDATED, help="network:batch for updates")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="timed seconds for each kind of step")
    parser.add_argument("--block-ms", type=float, default=100.0, help="a block of steps is at least this long")
    options = parser.parse_args()
    names = ("device", "threads", "precision", "channels_last")
    runtime = start_runtime(RuntimeConfig(**{name: getattr(options, name) for name in names}))
    for measure, subjects in ((measure_step, options.subjects), (measure_update, options.updates)):
        for subject in subjects:
            network, _, batch = subject.rpartition(":")
            for name in options.methods:
                row = measure(network, int(batch), name, runtime, seconds=options.seconds, block_ms=options.block_ms)
                before = options.out.read_bytes() if options.out.exists() else b""
                write_bytes(options.out, before + (json.dumps(row) + "\n").encode())
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    write_bytes(options.out.with_suffix(".md"), text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
