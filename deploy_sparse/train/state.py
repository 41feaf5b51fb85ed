"""What a checkpoint of an unfinished training holds, and how a training is continued from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .distributed import world
from .optimizer import memory_of, set_memory_
from .step import TrainStep
from .tensors import State


@dataclass
class Progress:
    """How far a training is, and what it found.

    Attributes:
        step: optimizer steps taken, counted from epoch 0.
        loss: sum of this process's losses in the running epoch, float64 on the device; kept there so that no step
            has to wait for it.
        best: the kept network's state after the epoch with the best validation accuracy, and ``best_masks`` the
            method's masks there.
        early: the model's state at the start of the epoch asked for, and ``early_memory`` the optimizer's.
    """

    step: int
    loss: torch.Tensor
    best_epoch: int = -1
    best_accuracy: float = -1.0
    best: State | None = None
    best_masks: State | None = None
    early: State | None = None
    early_memory: State | None = None


def save_progress(folder: Path, training: TrainStep, progress: Progress) -> None:
    """Save a checkpoint in ``folder``: every process takes part, the first one writes.

    A training whose loss is not finite is not saved: going on from there helps nobody.
    """
    losses = world().gather(float(progress.loss))
    if not all(map(math.isfinite, losses)):
        return
    world().main_only(lambda: save_checkpoint(folder, _snapshot(training, progress, losses)))


def restore_progress(folder: Path, training: TrainStep, progress: Progress, *, warn: Any = None) -> Progress:
    """Continue from the newest checkpoint in ``folder`` that verifies; without one, ``progress`` comes back unchanged.

    Args:
        warn: hears of damaged checkpoints.
    """
    found = world().main_first(lambda: load_checkpoint(folder, warn=warn if world().main else None))
    world().check_same(
        str(found and found.step), f"the newest checkpoints in {folder}", fix="put the run folder on a shared disk"
    )
    if found is None:
        return progress
    _restore_(found, training)
    values = found.values
    losses = values["losses"]
    if len(losses) != world().size:  # the run was started with another number of processes
        losses = [sum(losses) / len(losses)] * world().size
    return Progress(
        found.step,
        progress.loss + losses[world().rank],
        values["best_epoch"],
        values["best_accuracy"],
        best=_part(found, "best/") or None,
        best_masks=_part(found, "best_masks/"),
        early=_part(found, "early/") or None,
        early_memory=_part(found, "early_memory/") if values["early"] else None,
    )


def _snapshot(training: TrainStep, progress: Progress, losses: list[float]) -> Checkpoint:
    parts = {
        "model": training.model.state_dict(),
        "memory": memory_of(training.model, training.optimizer),
        "method": training.method.state(),
        "average": {} if training.average is None else training.average.module.state_dict(),
        "best": progress.best or {},
        "best_masks": progress.best_masks or {},
        "early": progress.early or {},
        "early_memory": progress.early_memory or {},
    }
    values = {
        "losses": losses,
        "best_epoch": progress.best_epoch,
        "best_accuracy": progress.best_accuracy,
        "early": progress.early is not None,
        "averaged": 0 if training.average is None else training.average.updates,
        "scaler": None if training.scaler is None else training.scaler.state_dict(),
    }
    tensors = {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    return Checkpoint(progress.step, tensors, values)


def _restore_(found: Checkpoint, training: TrainStep) -> None:
    training.model.load_state_dict(_part(found, "model/"))
    set_memory_(training.model, training.optimizer, _part(found, "memory/"))
    training.method.restore_(_part(found, "method/"))
    if training.average is not None:
        training.average.module.load_state_dict(_part(found, "average/"))
        training.average.updates = found.values["averaged"]
    if training.scaler is not None:
        training.scaler.load_state_dict(found.values["scaler"])


def _part(found: Checkpoint, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
