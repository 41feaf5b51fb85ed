"""What masks cost in training: a dense optimizer step against the same step under static masks, interleaved.

Both steps are the ones recipes take (`deploy_sparse.train.step`), on two copies of one network and one batch; the masks
leave a random 20 % of every convolution's weights. Blocks of steps alternate (A B, B A, …), so that a drifting machine
drifts for both. The cost is the median over paired blocks of (masked / dense) - 1; its interval is a bootstrap over the
pairs. Two figures beside it say whether to believe it on a busy machine: the same cost in processor time (means, no
interval), and the time of the masks' own work, taken alone, over a dense step. One JSON line a measurement is added to
--out.

    python benchmarks/mask_cost.py --out benchmarks/records/cpu-2-cores/mask-cost/results.jsonl
    python benchmarks/mask_cost.py --subjects resnet18:32 --device cuda --seconds 10 --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy_sparse import zoo
from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.measure.interleave import Samples, interleave
from deploy_sparse.measure.table import Table, markdown
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.structure import Masks, density
from deploy_sparse.train.runtime import Runtime, RuntimeConfig, start_runtime
from deploy_sparse.train.schedule import FitConfig
from deploy_sparse.train.step import TrainStep

SUBJECTS = ("resnet18:32", "resnet_synthetic:64")
IMAGE, CLASSES = (3, 32, 32), 10
DENSITY = 0.2
GOAL = 0.05
RESAMPLES = 4000


def measure(network: str, batch: int, runtime: Runtime, *, seconds: float, block_ms: float) -> dict[str, Any]:
    """One measurement as JSON values; times in ms a step."""
    torch.manual_seed(0)
    model = zoo.build(network)
    masks = _masks(model)
    methods = {"dense": Method(), "masked": StaticMasks(masks)}
    trained = {name: _training(network, model.state_dict(), batch, method, runtime) for name, method in methods.items()}
    calls = {name: _step(training, batch) for name, training in trained.items()}
    calls["masks alone"] = _masks_alone(trained["masked"])
    found = interleave(calls, warmup_ms=1000 * min(2.0, seconds), duration_s=seconds, block_ms=block_ms)
    cost, low, high = relative_cost(found["dense"], found["masked"])
    return {
        "kind": "mask cost",
        "network": network,
        "batch": batch,
        "image_shape": list(IMAGE),
        "density": round(density(masks), 4),
        "cost": round(cost, 5),
        "interval": [round(low, 5), round(high, 5)],
        "within_goal": high <= GOAL,
        "goal": GOAL,
        "cost_in_processor_time": round(found["masked"].cpu_ms / found["dense"].cpu_ms - 1, 5),
        "masks_alone_over_dense": round(_typical(found["masks alone"]) / _typical(found["dense"]), 5),
        "pairs": len(found["dense"].blocks_ms),
        "step_ms": {name: round(_typical(samples), 4) for name, samples in found.items()},
        "blocks_ms": {name: [round(float(v), 4) for v in _medians(samples)] for name, samples in found.items()},
        "runtime": runtime.config.model_dump(mode="json"),
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "environment": environment(),
    }


def relative_cost(dense: Samples, masked: Samples) -> tuple[float, float, float]:
    """Share of a dense step that masks add, and its 95 % interval."""
    ratios = _medians(masked) / _medians(dense)  # [pairs]
    chosen = np.random.default_rng(0).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), (0.025, 0.975))
    return float(np.median(ratios)) - 1, float(low) - 1, float(high) - 1


def _medians(samples: Samples) -> np.ndarray:
    return np.array([np.median(block) for block in samples.blocks_ms])  # [blocks], ms


def _masks(model: torch.nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(mask.shape, generator=generator) < DENSITY for name, mask in dense_masks(model).items()}


def _typical(samples: Samples) -> float:
    return float(np.median(_medians(samples)))


def _training(
    network: str, weights: dict[str, torch.Tensor], batch: int, method: Method, runtime: Runtime
) -> TrainStep:
    model = zoo.build(network)
    model.load_state_dict(weights)
    return TrainStep(model.train(), FitConfig(batch_size=batch), method, runtime, {})


def _step(training: TrainStep, batch: int) -> Callable[[], None]:
    """A call that takes one optimizer step and returns when it is done."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *IMAGE, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    ((images, labels),) = training.runtime.batches([(images, labels)])

    def call() -> None:
        training(images, labels, 0, 1e-4)  # a rate that leaves the network where it is, however long this runs
        _wait(training.runtime)

    call()  # from here on the optimizer has its momentum
    return call


def _masks_alone(training: TrainStep) -> Callable[[], None]:
    def call() -> None:
        training.method.after_step_(training.model, training.optimizer, 0)
        _wait(training.runtime)

    return call


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def text(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    cells = [
        (
            row["network"],
            row["batch"],
            row["device"],
            row["runtime"]["precision"],
            row["step_ms"]["dense"],
            f"{row['cost']:+.2%} ({row['interval'][0]:+.2%} to {row['interval'][1]:+.2%})",
            row["pairs"],
            f"{row['cost_in_processor_time']:+.2%}",
            f"{row['masks_alone_over_dense']:.2%}",
        )
        for row in rows
    ]
    columns = (
        *("network", "batch", "device", "precision", "dense step, ms", "masks add (95 % interval)", "pairs"),
        *("in processor time", "masks alone / dense step"),
    )
    return markdown(Table("Cost of masks", columns, tuple(cells), f"The goal is at most {GOAL:.0%} of a dense step."))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="network:batch, zoo names for 3×32×32 images")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="timed seconds for each of the two steps")
    parser.add_argument("--block-ms", type=float, default=100.0, help="a block of steps is at least this long")
    options = parser.parse_args()
    names = ("device", "threads", "precision", "channels_last")
    runtime = start_runtime(RuntimeConfig(**{name: getattr(options, name) for name in names}))
    for subject in options.subjects:
        network, _, batch = subject.rpartition(":")
        row = measure(network, int(batch), runtime, seconds=options.seconds, block_ms=options.block_ms)
        before = options.out.read_bytes() if options.out.exists() else b""
        write_bytes(options.out, before + (json.dumps(row) + "\n").encode())
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    write_bytes(options.out.with_suffix(".md"), text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
