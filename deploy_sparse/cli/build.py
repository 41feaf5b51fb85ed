"""Compile an engine for a target from a compact network, a ticket (dense-shaped), or an ONNX file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from .output import emit, key_values

EXAMPLES = """  deploy-sparse build runs/imp_refill-resnet_digits/compact --target cpu
  deploy-sparse build model.onnx --target rtx-sm89 --out engines/out
  deploy-sparse build model.onnx --target rtx-sm89 --precision fp16 --exclude head
  deploy-sparse build model.onnx --target rtx-sm89 --precision int8 --calibration images.npz
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", help="a compact network's folder, a ticket's folder, or a .onnx file")
    parser.add_argument("--target", default="cpu", help="a target's name (deploy-sparse ls) or TOML file")
    parser.add_argument("--out", default="engines/out", help="folder for engines; engines/out by default")
    parser.add_argument("--name", default="model", help="first part of the engine's folder name")
    parser.add_argument("--precision", help="fp32, fp16, bf16, int8 or fp8 instead of the target's own")
    parser.add_argument(
        "--exclude", nargs="+", default=(), metavar="LAYER", help="nodes or modules that stay in fp32, with * and ?"
    )
    parser.add_argument(
        "--calibration", metavar="DATA", help="real inputs for int8 and fp8: an .npz file, or a folder of .npy files"
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop a build that takes longer")


def execute(options: argparse.Namespace) -> int:
    from ..engine.build import build_engine
    from ..engine.target import in_precision, load_target
    from ..engine.watch import progress_line
    from .stopping import ended_cleanly
    from .subject import module_or_onnx

    target = in_precision(load_target(options.target), options.precision, options.exclude)
    subject, example_inputs = module_or_onnx(options.subject)
    with ended_cleanly(), progress_line(sys.stderr) as progress:
        engine = build_engine(
            subject,
            target,
            example_inputs,
            options.out,
            name=options.name,
            calibration=options.calibration,
            progress=progress,
            time_limit_s=options.time_limit,
        )
    value = {
        "engine": str(engine.path),
        "target": engine.target.name,
        "precision": engine.manifest["precision"]["built"],
        "cached": engine.cached,
        "runs_here": engine.runnable() is None,
        "why_not": engine.runnable(),
        "manifest": engine.manifest,
    }
    shown = {k: v for k, v in value.items() if k != "manifest" and v is not None}
    shown |= _agreement(engine.manifest.get("agreement"))
    emit(options, value, lambda: key_values({**shown, "bytes": engine.bytes}))
    return 0


def _agreement(found: Mapping[str, Any] | None) -> dict[str, str]:
    """One line on how far the engine's graph is from fp32; none where that is what it is."""
    if found is None:
        return {}
    if "samples" not in found:
        return {"against fp32": f"not compared: {found.get('why_not', found['computed'])}"}
    same = "" if found["top1"] is None else f"top-1 the same for {found['top1']:.1%}, "
    largest = f"largest difference {found['max_rel']:.2e} of the largest output"
    return {"against fp32": f"{same}{largest}, {found['samples']} samples ({found['data']})"}
