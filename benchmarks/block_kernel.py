"""The block kernel against the best dense convolution on a GPU: 3×3 layers, fp16, channels-last, one run.

A dense layer is timed as cuDNN runs it (with its own search switched on) and as torch.compile does; the faster of the
two is the yardstick. The packed layer has four blocks of interleaved rows, each with its own input channels: in
aligned runs of eight, or scattered. Its output is first checked against the masked dense layer. A timed call replays
a CUDA graph of many passes over inputs that together exceed the second-level cache, and waits; calls alternate
between the subjects. Times are medians over blocks of calls, per pass. One JSON line a measurement is added to --out,
and its table written beside it.

    python benchmarks/block_kernel.py --out benchmarks/records/h200/block-kernel/results.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deploy_sparse.artifact import environment, write_bytes
from deploy_sparse.engine.blocks.kernel import block_conv2d
from deploy_sparse.engine.blocks.layout import prepare
from deploy_sparse.engine.cuda.gpu import local_gpu
from deploy_sparse.errors import EngineError
from deploy_sparse.measure.interleave import Samples, interleave
from deploy_sparse.measure.table import Table, markdown

SIZES = {256: 14, 512: 7}  # channels to height and width, as in ResNets at 224
SPARSITIES = (0.6, 0.75, 0.9)
FORMS = ("runs", "scattered")
GOALS = {0.6: 1.6, 0.75: 2.6, 0.9: 5.0}
BLOCKS = 4
STEP = 32  # kept channels of a block are a multiple of this
PASSES = 100
INPUT_BYTES = 128 << 20  # all inputs together: over twice the second-level cache of an H200

Blocks = list[tuple[list[int], list[int]]]


def blocks_of(channels: int, sparsity: float, form: str) -> Blocks:
    """Interleaved rows in equal blocks, each keeping that share of the input channels, rounded to ``STEP``."""
    kept = max(STEP, round(channels * (1 - sparsity) / STEP) * STEP)
    run = 8 if form == "runs" else 1
    generator = np.random.default_rng(0)
    found = []
    for number in range(BLOCKS):
        starts = generator.choice(channels // run, size=kept // run, replace=False)
        columns = sorted(int(run * start + lane) for start in starts for lane in range(run))
        found.append((list(range(number, channels, BLOCKS)), columns))
    return found


def measure(channels: int, sparsity: float, form: str, batch: int, *, seconds: float) -> dict[str, Any]:
    """One measurement as JSON values; times in ms a pass."""
    size = SIZES[channels]
    blocks = blocks_of(channels, sparsity, form)
    generator = torch.Generator("cuda").manual_seed(0)
    images = (batch, channels, size, size)
    count = max(2, -(-INPUT_BYTES // (2 * batch * channels * size * size)))
    inputs = [
        torch.randn(images, generator=generator, device="cuda", dtype=torch.float16).to(
            memory_format=torch.channels_last
        )
        for _ in range(count)
    ]
    dense = _dense(channels, blocks)
    layout = prepare(dense.weight, blocks, dense.bias, padding=1)
    _check(block_conv2d(inputs[0], layout), dense(inputs[0]), channels)
    subjects = {
        "eager": dense,
        "compiled": torch.compile(dense),
        "kernel": lambda x: block_conv2d(x, layout),
    }
    calls = {name: _graph(subject, inputs) for name, subject in subjects.items()}
    found = interleave(calls, warmup_ms=500, duration_s=seconds)
    times = {name: float(np.median(medians(samples))) / PASSES for name, samples in found.items()}
    best = min(("eager", "compiled"), key=times.__getitem__)
    density = sum(len(rows) * len(columns) for rows, columns in blocks) / channels**2
    return {
        "kind": "block kernel",
        "channels": channels,
        "size": size,
        "batch": batch,
        "form": form,
        "sparsity_asked": sparsity,
        "sparsity": round(1 - density, 4),
        "ms": {name: round(value, 6) for name, value in times.items()},
        "best_dense": best,
        "speedup": round(times[best] / times["kernel"], 4),
        "ideal": round(1 / density, 4),
        "goal": GOALS.get(sparsity),
        "blocks_ms": {name: [round(float(v), 5) for v in medians(samples)] for name, samples in found.items()},
        "passes": PASSES,
        "inputs": count,
        "device": torch.cuda.get_device_name(),
        "environment": environment(),
    }


def medians(samples: Samples) -> np.ndarray:
    """Median of each block of calls, ms."""
    return np.array([np.median(block) for block in samples.blocks_ms])


def _dense(channels: int, blocks: Blocks) -> nn.Conv2d:
    """A dense layer with zeros outside the blocks: it costs what any dense layer costs, and gives the right answer."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, padding=1).cuda().half().to(memory_format=torch.channels_last)
    mask = torch.zeros(channels, channels, dtype=torch.bool)
    for rows, columns in blocks:
        mask[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    with torch.no_grad():
        layer.weight *= mask[:, :, None, None].cuda()
    return layer.requires_grad_(False)


def _check(actual: torch.Tensor, expected: torch.Tensor, channels: int) -> None:
    error = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= 2 * torch.finfo(torch.float16).eps:
        raise EngineError(
            f"the kernel is off by {error:.1e} of the largest output at {channels} channels",
            expected="the masked dense layer's output up to rounding",
            fix="run pytest -m gpu tests/unit/engine/test_block_kernel_gpu.py",
        )


def _graph(forward: Callable[[torch.Tensor], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], None]:
    """A call that makes all passes and returns when they are done."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # searches, compiles and warms up outside the capture
        for x in inputs[:3]:
            forward(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(PASSES):
            forward(inputs[number % len(inputs)])

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def text(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    cells = [
        (
            f"{row['channels']}@{row['size']}",
            row["batch"],
            row["form"],
            f"{row['sparsity']:.1%}",
            1000 * row["ms"]["eager"],
            1000 * row["ms"]["compiled"],
            1000 * row["ms"]["kernel"],
            f"{row['speedup']:.2f}",
            f"{row['ideal']:.2f}",
            None if row["goal"] is None else f"{row['goal']:.1f} at {row['sparsity_asked']:.0%}",
            row["device"],
        )
        for row in rows
    ]
    columns = (
        *("layer", "batch", "channels", "sparsity", "dense eager, µs", "dense compiled, µs", "kernel, µs"),
        *("speed-up over the best dense", "ideal", "goal", "device"),
    )
    note = (
        "3×3, fp16, channels-last, four blocks of interleaved rows; sparsity as reached by whole steps of 32 channels."
    )
    return markdown(Table("The block kernel against dense convolutions", columns, tuple(cells), note))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--channels", type=int, nargs="+", default=tuple(SIZES), choices=tuple(SIZES))
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each subject")
    options = parser.parse_args()
    if local_gpu() is None:
        parser.exit(2, "no NVIDIA GPU here: this benchmark times a GPU kernel; nothing was measured or written\n")
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        for channels in options.channels:
            for sparsity in options.sparsities:
                for form in options.forms:
                    row = measure(channels, sparsity, form, options.batch, seconds=options.seconds)
                    before = options.out.read_bytes() if options.out.exists() else b""
                    write_bytes(options.out, before + (json.dumps(row) + "\n").encode())
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    write_bytes(options.out.with_suffix(".md"), text(rows).encode())
    print(text(rows))


if __name__ == "__main__":
    main()
