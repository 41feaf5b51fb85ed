"""Compile an engine for a target from a compact network, a ticket (dense-shaped), or an ONNX file."""

from __future__ import annotations

import argparse

from .output import emit, key_values

EXAMPLES = """  deploy-sparse build runs/imp_refill-resnet_digits/compact --target cpu
  deploy-sparse build model.onnx --target rtx-sm89 --out engines/out
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", help="a compact network's folder, a ticket's folder, or a .onnx file")
    parser.add_argument("--target", default="cpu", help="a target's name (deploy-sparse ls) or TOML file")
    parser.add_argument("--out", default="engines/out", help="folder for engines; engines/out by default")
    parser.add_argument("--name", default="model", help="first part of the engine's folder name")


def execute(options: argparse.Namespace) -> int:
    from ..engine.build import build_engine
    from ..engine.target import load_target
    from .subject import module_or_onnx

    target = load_target(options.target)
    subject, example_inputs = module_or_onnx(options.subject)
    engine = build_engine(subject, target, example_inputs, options.out, name=options.name)
    value = {
        "engine": str(engine.path),
        "target": target.name,
        "cached": engine.cached,
        "runs_here": engine.runnable() is None,
        "why_not": engine.runnable(),
        "manifest": engine.manifest,
    }
    shown = {k: v for k, v in value.items() if k != "manifest" and v is not None}
    emit(options, value, lambda: key_values({**shown, "bytes": engine.path.stat().st_size}))
    return 0
