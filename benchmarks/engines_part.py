"""One network of engines.py in one form, in a process of its own: exported once, then one engine for each attempt.

    engines_part.py NETWORK FORM FILE SECONDS TARGET/PRECISION …

Every finding is added to FILE as a line of JSON when it is known, so that what was found before a crash is kept. A line
says under ``of`` which attempt it is about; ``""`` is the network, which all attempts share.

Weights are seeded and untrained. Norms, biases and statistics are made non-trivial (see surgery_subject.py), and the
last layer's bias takes off the mean of each score over the images, so that the same class does not win everywhere and
agreement of the winners means something.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from deploy_sparse import data, zoo
from deploy_sparse.api import oneshot_ticket
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import DeploySparseError
from deploy_sparse.sparsify.regroup import RegroupRule
from deploy_sparse.surgery.compact import Compact, Format, compact
from deploy_sparse.ticket import ModelRef, Ticket
from deploy_sparse.train.batchnorm import reestimate_

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from surgery_subject import enliven_, on_one_line, peak_gib

FORMS = ("dense", "channels", "packed")
SPARSITY = 0.5
RULE = RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, multiple=16, coupling="group")
MULTIPLE = 8  # what TensorRT-RTX likes; ONNX Runtime gets the same network
SEED = 20221104
SAMPLES, LARGE_SAMPLES, LARGE = 256, 32, 128  # images for calibration and comparison; fewer from so many pixels a side
HITS = 3
MEMORY_GIB = 20

Report = Callable[..., None]


@dataclass(frozen=True)
class Made:
    """A network in one form.

    Attributes:
        module: in evaluation mode.
        images: float32 ``[samples, C, H, W]``, for calibration and comparison.
        facts: what the record says of it.
    """

    module: nn.Module
    images: torch.Tensor
    facts: dict[str, Any]


def make(network: str, form: str, report: Report) -> Made:
    """The network, pruned and compacted where the form says so.

    Raises:
        Exception: what the project's own stages raise; the last reported ``stage`` says where.
    """
    report(stage="network")
    name, source = images_of(network)
    images = source()
    model = first_weights(network)
    inputs = images[:2]
    if form == "dense":
        return _centred(Made(model, images, {"data": name}))
    report(stage="ticket")
    format: Format = "channels" if form == "channels" else "packed"
    if format == "channels":
        ticket = oneshot_ticket(model, inputs, "channels", SPARSITY)
    else:
        ticket = oneshot_ticket(model, inputs, "blocks", SPARSITY, rule=RULE)
    ticket = with_statistics(ticket, first_weights(network), images)
    report(stage="surgery")
    ticket = replace(ticket, model=ModelRef("user factory", {}))
    made = compact(ticket, lambda: first_weights(network), inputs, multiple=MULTIPLE, format=format)
    return _centred(Made(made.module, images, {"data": name, **_facts(made)}))


def with_statistics(ticket: Ticket, model: nn.Module, images: torch.Tensor) -> Ticket:
    """The ticket with the BatchNorm statistics that ``model`` has under its masks, as training would leave them.

    With those of the dense network numbers would shrink from layer to layer, until rounding is all that is left.
    """
    model.load_state_dict({**model.state_dict(), **ticket.masked_weights()})
    reestimate_(model, torch.split(images, 32))
    return replace(ticket, weights={**ticket.weights, **dict(model.named_buffers())})


def _facts(made: Compact) -> dict[str, Any]:
    before, after = made.plan.cost_before, made.plan.cost_after
    return {
        "of_dense": {"macs": after.macs / before.macs, "parameters": after.parameters / before.parameters},
        "packed_layers": len(made.plan.shape.packs),
        "float64": made.parity.float64.max_rel,
    }


@torch.no_grad()
def first_weights(network: str) -> nn.Module:
    """The untrained network in evaluation mode; the same numbers every time."""
    torch.manual_seed(SEED)
    model = zoo.build(network).eval()
    generator = torch.Generator().manual_seed(SEED)
    enliven_(model, (torch.randn(2, *zoo.entry(network).input_shape, generator=generator),), generator)
    return model


def images_of(network: str) -> tuple[str, Callable[[], torch.Tensor]]:
    """What the images for this network are called, and how to get them, ``[samples, C, H, W]`` float32, normalised."""
    channels, size, _ = zoo.entry(network).input_shape
    count = LARGE_SAMPLES if size >= LARGE else SAMPLES
    if channels == 1:
        return f"digits, {count} of the training split", lambda: data.load("digits", seed=0).train.head(count)
    sized = "" if size == 32 else f", enlarged to {size}×{size}"
    return f"synthetic, {count} of the training split{sized}", lambda: _synthetic(count, size)


def _synthetic(count: int, size: int) -> torch.Tensor:
    images = data.load("synthetic", seed=0, arguments={"train_images": count}).train.head(count)
    if size == images.shape[-1]:
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)


@torch.no_grad()
def _centred(made: Made) -> Made:
    """Take the mean scores off the last layer's bias; the record says how many classes win for some image."""
    scores = scores_of(made.module, made.images)  # [samples, classes]
    heads = [m for m in made.module.modules() if isinstance(m, nn.Linear) and m.out_features == scores.shape[1]]
    heads[-1].bias.sub_(scores.mean(0))
    centred = scores - scores.mean(0)
    return replace(made, facts={**made.facts, "classes": len(set(centred.argmax(1).tolist()))})


@torch.no_grad()
def scores_of(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """``[samples, classes]``, some images at a time."""
    return torch.cat([module(part) for part in torch.split(images, 32)])


def run(network: str, form: str, attempts: Sequence[str], limit_s: float, report: Report) -> None:
    """Make and export the network and build an engine for each attempt; what is raised is the outcome."""
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        file = Path(scratch) / "model.onnx"
        try:
            made = make(network, form, report)
            report(stage="export")
            export_onnx(made.module, made.images[:2], file)
            report(**made.facts, stage=None)
        except Exception as problem:  # the record says what
            report(outcome="failed", **told(problem))
            return
        reference = cache(lambda: scores_of(made.module, made.images).numpy())
        for name in attempts:
            about = partial(report, of=name)
            try:
                attempt(name, file, made.images.numpy(), reference, Path(scratch) / "engines", limit_s, about)
                about(outcome="ok", stage=None)
            except Exception as problem:
                about(outcome="failed", **told(problem))
            about(peak_gib=peak_gib())


def attempt(
    name: str,
    file: Path,
    images: np.ndarray,
    reference: Callable[[], np.ndarray],
    out: Path,
    limit_s: float,
    report: Report,
) -> None:
    """Build one engine, then build it again; of ONNX Runtime also run it.

    Raises:
        Exception: what building and running raise; RuntimeError where the second build was none of the first's.
    """
    target, _, precision = name.partition("/")

    def build() -> Engine:
        return build_engine(file, target, out=out, precision=precision, calibration=images, time_limit_s=limit_s)

    report(stage="build")
    started = time.perf_counter()
    engine = build()
    report(seconds=_since(started), **engine_facts(engine.manifest), stage="second build")
    seconds = []
    for _ in range(HITS + 1):
        started = time.perf_counter()
        again = build()
        seconds.append(_since(started))
        if not (again.cached and again.path == engine.path):
            raise RuntimeError("an identical build was not found in the store")
    report(again_s=median(seconds[1:]), again_runs=seconds[1:])
    if load_target(target).runtime == "onnxruntime":
        report(stage="run")
        report(ran=ran(engine, images, reference()))


def engine_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the record says of an engine."""
    precision, agreed = manifest["precision"], manifest.get("agreement")
    formats = precision.get("layers", {})
    kept = ("against", "computed", "samples", "top1", "max_rel", "mean_rel", "why_not")
    return {
        "built": precision["built"],
        "read_from": precision["read_from"],
        "layers": formats,
        "lowered": formats.get(precision["asked"]),
        "unquantized": len(precision["unquantized"]) if "unquantized" in precision else None,
        "in_fp32": precision.get("in_fp32"),
        "agreement": {key: agreed[key] for key in kept if key in agreed} if agreed else None,
        "parity": manifest["parity"],
        "bytes": manifest["bytes"],
        "build_s": manifest["build_seconds"],
        "parameters": manifest["parameters"],
        "macs": manifest["macs"],
    }


def ran(engine: Engine, images: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """The engine, loaded from the store, against the module in PyTorch: ``top1``, and differences as in agreement."""
    name = engine.manifest["inputs"][0]["name"]
    with load_engine(engine.path) as runner:
        parts = (images[start : start + 32] for start in range(0, len(images), 32))
        found = np.concatenate([next(iter(runner.run({name: part}).values())) for part in parts])
    gap, size = np.abs(found.astype(np.float64) - expected), np.abs(expected.astype(np.float64))
    return {
        "samples": len(images),
        "top1": float((found.argmax(1) == expected.argmax(1)).mean()),
        "max_rel": float(gap.max() / size.max()),
        "mean_rel": float(gap.mean() / size.mean()),
    }


def told(problem: BaseException) -> dict[str, str]:
    """The problem on one line, what was expected instead where that is known, and its type."""
    found = {"reason": on_one_line(str(problem)) or type(problem).__name__, "error": type(problem).__name__}
    if isinstance(problem, DeploySparseError):
        found |= {"reason": on_one_line(problem.given), "expected": on_one_line(problem.expected)}
    return found


def merged(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What was found, by attempt; later values replace earlier ones. A line cut off by a crash is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        found.setdefault(values.pop("of"), {}).update(values)
    return found


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("attempts", nargs="+", metavar="TARGET/PRECISION")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = MEMORY_GIB * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    def report(of: str = "", **values: Any) -> None:
        with options.file.open("a") as file:
            file.write(json.dumps({"of": of, **values}) + "\n")

    run(options.network, options.form, options.attempts, options.seconds, report)


if __name__ == "__main__":
    main()
