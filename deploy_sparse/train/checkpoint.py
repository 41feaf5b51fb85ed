"""State of an unfinished training, saved whole, verified when read, never pickled."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from .. import artifact
from ..errors import ArtifactError

KEEP = 2  # an older checkpoint to fall back on when the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and JSON values, as they were after ``step`` optimizer steps."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Add a checkpoint to ``folder`` atomically, then remove all but the newest two.

    A checkpoint of the same step that is already there stays: a stop right after an epoch's end finds one.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    if target.exists():
        return
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in checkpoint.tensors.items()}
    body = {"step": checkpoint.step, "values": dict(checkpoint.values)}
    artifact.write_artifact(target, "checkpoint", {"checkpoint.safetensors": bytes_from_tensors(tensors)}, body)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, *, warn: Any = None) -> Checkpoint | None:
    """The newest checkpoint of ``folder`` that verifies, or None; ``warn`` hears of damaged ones, which are removed."""
    for candidate in _newest_first(folder):
        try:
            found = artifact.read_artifact(candidate, "checkpoint", remake="run the recipe again with --resume")
        except ArtifactError as problem:
            if warn is not None:
                warn(f"passing over a damaged checkpoint: {problem.given}")
            shutil.rmtree(candidate)
            continue
        tensors = tensors_from_bytes((candidate / "checkpoint.safetensors").read_bytes())
        return Checkpoint(found.body["step"], tensors, found.body["values"])
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []
