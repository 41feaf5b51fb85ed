"""One training: SGD with a schedule, a method's masks kept after every step, exact resume at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from ..config import Config
from ..data.splits import Split, Splits, batch_count, train_batches
from ..errors import ConfigError, TicketError
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint

State = dict[str, torch.Tensor]


class FitConfig(Config):
    """How one network is trained."""

    epochs: int = Field(20, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=2, description="images a step")
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD (Nesterov)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    schedule: Literal["cosine", "step"] = Field("cosine", description="cosine to zero, or ×0.1 at 1/2 and 3/4")
    warmup_epochs: int = Field(1, ge=0, description="epochs of linear warm-up")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    shift: int = Field(1, ge=0, description="augmentation: random shift in pixels")
    checkpoint_every: int = Field(5, ge=1, description="epochs between checkpoints")


class Method(Protocol):
    """What training asks of a sparsification method."""

    def start_(self, model: nn.Module) -> None: ...
    def after_step_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None: ...


@dataclass(frozen=True)
class Fitted:
    """What a training leaves.

    Attributes:
        last: state dict after the last epoch.
        best: state dict after the epoch with the best validation accuracy (the earliest of equals).
        early: state dict at the start of the epoch asked for by ``keep_epoch``, or None.
        best_epoch: index of the best epoch.
        validation_accuracy: its validation accuracy, 0..1.
    """

    last: State
    best: State
    early: State | None
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
    keep_epoch: int | None = None,
    poll: Callable[[str], None] = lambda saved: None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda row: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """Train ``model`` in place from the weights it holds, or from the newest checkpoint in ``checkpoints``.

    An interrupted and continued training ends with the same bits as an undisturbed one on the same machine: the
    order of the data is a function of (seed, epoch), random layers of (seed, step), and everything else is in the
    checkpoint. Sets torch's global seed at every step.

    Args:
        method: keeps its masks after each optimizer step.
        seed: order and augmentation of the data.
        checkpoints: folder for this training's own checkpoints.
        keep_epoch: also return the weights as they were at the start of this epoch (the rewind point).
        poll: called each step with what would be saved; raises to stop.
        on_epoch: receives one row of metrics an epoch.
        warn: receives a line when a damaged checkpoint is passed over.

    Raises:
        Interrupted: from ``poll``, after a checkpoint was saved.
        TicketError: the loss is no longer finite.
    """
    steps = batch_count(data.train, config.batch_size)
    check_batch_size(config, len(data.train))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    method.start_(model)
    progress = _Progress()
    if (found := load_checkpoint(checkpoints, warn=warn)) is not None:
        progress = _restore(found, model, optimizer)
    while progress.step < config.epochs * steps:
        epoch, index = divmod(progress.step, steps)
        if index == 0 and epoch == keep_epoch:
            progress.early = copy_state(model)
        model.train()
        for images, labels in train_batches(
            data.train, config.batch_size, seed=seed, epoch=epoch, shift=config.shift, start=index
        ):
            _stop_if_asked(poll, checkpoints, progress, model, optimizer)
            for options in optimizer.param_groups:
                options["lr"] = learning_rate(config, progress.step / steps)
            torch.manual_seed(seed * 1_000_003 + progress.step)  # dropout must not depend on where a run was resumed
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            method.after_step_(model, optimizer)
            progress.step += 1
            progress.loss += float(loss.detach())
        _end_epoch(epoch, steps, progress, model, data, on_epoch)
        if (epoch + 1) % config.checkpoint_every == 0 and epoch + 1 < config.epochs:
            save_checkpoint(checkpoints, _snapshot(progress, model, optimizer))
    assert progress.best is not None
    return Fitted(copy_state(model), progress.best, progress.early, progress.best_epoch, progress.best_accuracy)


def check_batch_size(config: FitConfig, train_images: int) -> None:
    """Refuse a batch larger than the training split.

    Raises:
        ConfigError: naming both sizes.
    """
    if config.batch_size > train_images:
        raise ConfigError(
            f"fit.batch_size = {config.batch_size} with {train_images} training images",
            expected=f"at most {train_images}",
            fix="choose a smaller --fit.batch_size",
        )


def learning_rate(config: FitConfig, epoch: float) -> float:
    """The learning rate at a fractional epoch: linear warm-up, then the schedule."""
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1e-3) / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    if config.schedule == "step":
        return config.lr * (0.1 ** ((done >= 0.5) + (done >= 0.75)))
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def accuracy(model: Callable[[torch.Tensor], torch.Tensor], split: Split, *, batch_size: int = 512) -> float:
    """Top-1 accuracy 0..1 of a model in evaluation mode on a split."""
    if isinstance(model, nn.Module):
        model.eval()
    correct = 0
    for first in range(0, len(split), batch_size):
        logits = model(split.images[first : first + batch_size])  # [n, classes]
        correct += int((logits.argmax(dim=1) == split.labels[first : first + batch_size]).sum())
    return correct / len(split)


def copy_state(model: nn.Module) -> State:
    """A copy of the state dict: weights and BatchNorm statistics."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class _Progress:
    step: int = 0
    loss: float = 0.0
    best_epoch: int = -1
    best_accuracy: float = -1.0
    best: State | None = None
    early: State | None = None


def _end_epoch(
    epoch: int,
    steps: int,
    progress: _Progress,
    model: nn.Module,
    data: Splits,
    on_epoch: Callable[[Mapping[str, Any]], None],
) -> None:
    if not math.isfinite(progress.loss):
        raise TicketError(
            f"the training loss is {progress.loss} in epoch {epoch}",
            expected="a finite loss",
            fix="lower fit.lr, or lengthen fit.warmup_epochs, and run again",
        )
    validation = accuracy(model, data.validation)
    if validation > progress.best_accuracy:
        progress.best, progress.best_epoch, progress.best_accuracy = copy_state(model), epoch, validation
    on_epoch({"epoch": epoch, "loss": progress.loss / steps, "validation_accuracy": validation})
    progress.loss = 0.0


def _stop_if_asked(
    poll: Callable[[str], None],
    checkpoints: Path,
    progress: _Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    try:
        poll(f"the training is saved at step {progress.step}")
    except BaseException:
        if progress.step and math.isfinite(progress.loss):
            save_checkpoint(checkpoints, _snapshot(progress, model, optimizer))
        raise


def _snapshot(progress: _Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum/{name}"] = momentum
    for part in ("best", "early"):
        tensors |= {f"{part}/{name}": tensor for name, tensor in (getattr(progress, part) or {}).items()}
    values = {"loss": progress.loss, "best_epoch": progress.best_epoch, "best_accuracy": progress.best_accuracy}
    return Checkpoint(progress.step, tensors, values)


def _restore(found: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Progress:
    def part(prefix: str) -> State:
        return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model/"))
    parameters = dict(model.named_parameters())
    for name, momentum in part("momentum/").items():
        optimizer.state[parameters[name]]["momentum_buffer"] = momentum
    return _Progress(found.step, best=part("best/") or None, early=part("early/") or None, **found.values)
