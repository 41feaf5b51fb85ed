"""One training: an optimizer with a schedule, a method's masks kept after every step, exact resume at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import batch_count, train_batches
from ..data.splits import Augmentation, Splits
from ..errors import TicketError
from ..sparsify.method import Method
from .distributed import poll_together, world
from .evaluate import accuracy
from .optimizer import memory_of
from .runtime import CPU, Runtime, explained
from .schedule import FitConfig as FitConfig
from .schedule import check_batch_size as check_batch_size
from .schedule import check_start, learning_rate
from .state import Progress, restore_progress, save_progress
from .step import TrainStep
from .tensors import State, copy_state, cpu_copies, digest, mask_


@dataclass(frozen=True)
class Fitted:
    """What a training leaves, on the CPU. State dicts are of the moving average where there is one.

    Attributes:
        last: state dict after the last epoch.
        last_masks: the method's masks then, by parameter name.
        best: state dict after the epoch with the best validation accuracy (the earliest of equals) among the last one
            and those after whose last step the method was ready.
        best_masks: the method's masks then.
        early: the model's own state dict at the start of the epoch asked for by ``keep_epoch``, or None.
        early_memory: what the optimizer remembered there, by ``"<slot>/<parameter>"``.
        best_epoch: index of the best epoch.
        validation_accuracy: its validation accuracy, 0..1.
    """

    last: State
    last_masks: State
    best: State
    best_masks: State
    early: State | None
    early_memory: State
    best_epoch: int
    validation_accuracy: float


def fit(
    model: nn.Module,
    data: Splits,
    config: FitConfig,
    method: Method,
    *,
    seed: int,
    checkpoints: Path,
    runtime: Runtime = CPU,
    start_epoch: int = 0,
    memory: Mapping[str, torch.Tensor] | None = None,
    keep_epoch: int | None = None,
    poll: Callable[[str], None] = lambda saved: None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda row: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """Train ``model`` in place from the weights it holds, or from the newest checkpoint in ``checkpoints``.

    An interrupted and continued training ends with the same bits as an undisturbed one on the same machine: the
    order of the data is a function of (seed, epoch), random layers of (seed, step, process), and everything else is
    in the checkpoint. Sets torch's global seed at every step. Under torchrun every process calls this alike.

    Args:
        method: keeps its masks after each optimizer step.
        seed: order and augmentation of the data.
        checkpoints: folder for this training's own checkpoints.
        runtime: device and precision.
        start_epoch: position in the schedule and in the order of the data to start at.
        memory: what the optimizer remembers there, by ``"<slot>/<parameter>"``; nothing for a fresh one.
        keep_epoch: also return the weights and the optimizer's memory as they were at the start of this epoch (the
            rewind point).
        poll: called each step with what would be saved; raises to stop.
        on_epoch: receives one row of metrics an epoch.
        warn: receives a line when a damaged checkpoint is passed over.

    Raises:
        Interrupted: from ``poll`` (of any process), after a checkpoint was saved.
        ConfigError: a batch size or start that does not fit, or a step that this device cannot take.
        TicketError: the loss is no longer finite; a memory of another optimizer.
        RunError: masks that differ between processes at the end of an epoch.
    """
    check_batch_size(config, len(data.train))
    check_start(config, start_epoch)
    steps = batch_count(data.train, config.batch_size)
    first = start_epoch * steps
    training = TrainStep(model, config, method, runtime, memory or {})
    progress = Progress(first, torch.zeros((), dtype=torch.float64, device=runtime.device))
    progress = restore_progress(checkpoints, training, progress, warn=warn)
    if world().size > 1:
        training.settle_(data.image_shape)
    while progress.step < config.epochs * steps:
        epoch, index = divmod(progress.step, steps)
        if index == 0 and epoch == keep_epoch:
            progress.early, progress.early_memory = copy_state(model), memory_of(model, training.optimizer)
        model.train()
        for images, labels in runtime.batches(_batches(data, config, runtime, seed, epoch, index)):
            try:
                poll_together(poll, f"the training is saved at step {progress.step}")
            except BaseException:
                if progress.step > first:
                    save_progress(checkpoints, training, progress)
                raise
            # dropout must not depend on where a run was resumed, and must differ between processes
            torch.manual_seed((seed * 1_000_003 + progress.step) * world().size + world().rank)
            try:
                loss = training(images, labels, progress.step, learning_rate(config, progress.step / steps))
            except RuntimeError as problem:
                if (known := explained(problem)) is None:
                    raise
                raise known from problem
            progress.loss += loss
            progress.step += 1
        _end_epoch(epoch, steps, progress, training, data, on_epoch)
        if (epoch + 1) % config.checkpoint_every == 0 and epoch + 1 < config.epochs:
            save_progress(checkpoints, training, progress)
    assert progress.best is not None
    assert progress.best_masks is not None
    return Fitted(
        copy_state(training.evaluated),
        cpu_copies(method.masks),
        progress.best,
        progress.best_masks,
        progress.early,
        progress.early_memory or {},
        progress.best_epoch,
        progress.best_accuracy,
    )


def _batches(data: Splits, config: FitConfig, runtime: Runtime, seed: int, epoch: int, start: int) -> Any:
    return train_batches(
        data.train,
        config.batch_size,
        seed=seed,
        epoch=epoch,
        augmentation=data.augmentation if config.augment else Augmentation(),
        start=start,
        rank=world().rank,
        world=world().size,
        workers=runtime.config.workers,
    )


def _end_epoch(
    epoch: int,
    steps: int,
    progress: Progress,
    training: TrainStep,
    data: Splits,
    on_epoch: Callable[[Mapping[str, Any]], None],
) -> None:
    losses = world().gather(float(progress.loss))
    loss = sum(losses) / len(losses) / steps
    if not math.isfinite(loss):
        raise TicketError(
            f"the training loss is {loss} in epoch {epoch}",
            expected="a finite loss",
            fix="lower fit.lr, or lengthen fit.warmup_epochs, and run again",
        )
    method = training.method
    if world().size > 1:
        world().check_same(digest(method.masks), f"the masks after epoch {epoch}")
    network = training.evaluated
    if network is not training.model:
        mask_(network, method.masks)  # an average of weights under masks that moved is not masked by itself
        world().share_(network.buffers())
    world().share_(training.model.buffers())  # each process has seen other images: the first one's statistics count
    validation = accuracy(network, data.validation, runtime=training.runtime, processes=world())
    allowed = epoch + 1 == training.config.epochs or method.ready(progress.step - 1)
    if allowed and validation > progress.best_accuracy:
        progress.best, progress.best_masks = copy_state(network), cpu_copies(method.masks)
        progress.best_epoch, progress.best_accuracy = epoch, validation
    rate = training.optimizer.param_groups[0]["lr"]
    row = {"epoch": epoch, "loss": loss, "validation_accuracy": validation, "learning_rate": rate}
    on_epoch({**row, **method.figures()})
    progress.loss.zero_()
