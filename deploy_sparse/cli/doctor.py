"""Say what is installed, what hardware is here, and what that enables and disables. Paste its output into an issue."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess

from .output import emit, table

EXAMPLES = """  deploy-sparse doctor
  deploy-sparse doctor --json
"""
REQUIRED = (
    "torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors", "scikit-learn", "pydantic",
    "jinja2", "rich",
)  # fmt: skip
OPTIONAL = {
    "tensorrt-rtx": "rtx-* targets; the extra rtx, or: pip install tensorrt-rtx",
    "tensorrt": "tensorrt targets; the extra tensorrt (its libraries come from NVIDIA's own index)",
    "torch-tensorrt": "nothing in this version yet; the extra torch-tensorrt",
    "pycuda": "nothing in this version yet; the extra pycuda (needs the CUDA toolkit)",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(options: argparse.Namespace) -> int:
    from ..artifact import environment

    gpus = _gpus()
    rows = [(name, _version(name), "needed") for name in REQUIRED]
    rows += [(name, _version(name), f"enables {what}") for name, what in OPTIONAL.items()]
    missing = [name for name, version, _ in rows[: len(REQUIRED)] if version == "missing"]
    facts = environment()
    value = {
        "packages": {name: version for name, version, _ in rows},
        "system": facts["system"],
        "processor": facts["processor"],
        "python": facts["python"],
        "gpus": gpus,
        "missing": missing,
    }

    def text() -> str:
        gpu = (
            ", ".join(gpus)
            if gpus
            else "none: TensorRT-RTX engines are compiled but not run here; full TensorRT cannot build"
        )
        verdict = (
            f"missing: {', '.join(missing)}; install deploy-sparse again to get them"
            if missing
            else "all needed packages are there"
        )
        return "\n".join([
            f"python     {facts['python']} on {facts['system']}",
            f"processor  {facts['processor']}",
            f"GPU        {gpu}",
            "",
            table(("package", "version", "note"), rows),
            "",
            verdict,
        ])  # fmt: skip

    emit(options, value, text)
    return 2 if missing else 0


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
