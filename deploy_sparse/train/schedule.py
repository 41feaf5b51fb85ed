"""How one network is trained: the optimizer's numbers, and the learning rate at every moment."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from ..config import Config
from ..errors import ConfigError
from .distributed import world

_Share = Annotated[float, Field(ge=0, lt=1)]


class FitConfig(Config):
    """How one network is trained."""

    epochs: int = Field(20, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=2, description="images a step, over all processes")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="adamw wants a far lower fit.lr than sgd")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    nesterov: bool = Field(True, description="Nesterov's momentum, of SGD")
    betas: tuple[_Share, _Share] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty; AdamW's own decay, which its moments do not see")
    decay_norms: bool = Field(True, description="false: no weight decay on norms' scale and shift and on biases")
    schedule: Literal["cosine", "step"] = Field("cosine", description="cosine to zero, or ×gamma at the milestones")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="epochs at which the step schedule drops; empty for 1/2 and 3/4 of fit.epochs"
    )
    gamma: float = Field(0.1, gt=0, lt=1, description="factor of each drop of the step schedule")
    warmup_epochs: int = Field(1, ge=0, description="epochs of linear warm-up")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then kept; 0: none"
    )
    augment: bool = Field(True, description="change training images at random, as is usual for the data set")
    checkpoint_every: int = Field(5, ge=1, description="epochs between checkpoints")


def learning_rate(config: FitConfig, epoch: float) -> float:
    """The learning rate at a fractional epoch: linear warm-up, then the schedule.

    A milestone counts from the start of training, warm-up included; one past the last epoch has no effect.
    """
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1e-3) / config.warmup_epochs
    if config.schedule == "step":
        milestones = config.milestones or (config.epochs / 2, config.epochs * 3 / 4)
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in milestones)
    done = (epoch - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def check_batch_size(config: FitConfig, train_images: int) -> None:
    """Refuse a batch larger than the training split, or one that this run's processes cannot share equally.

    Raises:
        ConfigError: naming both numbers.
    """
    if config.batch_size > train_images:
        raise ConfigError(
            f"fit.batch_size = {config.batch_size} with {train_images} training images",
            expected=f"at most {train_images}",
            fix="choose a smaller --fit.batch_size",
        )
    processes = world().size
    if config.batch_size % processes:
        raise ConfigError(
            f"fit.batch_size = {config.batch_size} on {processes} processes",
            expected=f"a multiple of {processes}: the batch is split over the processes",
            fix=f"for example --fit.batch_size {-(-config.batch_size // processes) * processes}",
        )


def check_optimizer(config: FitConfig) -> None:
    """Refuse numbers of an optimizer that is not the chosen one.

    Raises:
        ConfigError: naming the key and the optimizer it belongs to.
    """
    for key, optimizer in {"momentum": "sgd", "betas": "adamw"}.items():
        value = getattr(config, key)
        if config.optimizer != optimizer and value != FitConfig.model_fields[key].default:
            raise ConfigError(
                f"fit.{key} = {list(value) if isinstance(value, tuple) else value} "
                f'with fit.optimizer = "{config.optimizer}"',
                expected=f'fit.{key} only with fit.optimizer = "{optimizer}"',
                fix="drop one of the two",
            )


def check_start(config: FitConfig, epoch: int) -> None:
    """Refuse to start, or to take a rewind point, behind the last epoch.

    Raises:
        ConfigError: naming both epochs.
    """
    if not 0 <= epoch < config.epochs:
        raise ConfigError(
            f"a training that starts at epoch {epoch} with fit.epochs = {config.epochs}",
            expected=f"an epoch from 0 to {config.epochs - 1}",
            fix="choose an earlier rewind point, or raise --fit.epochs",
        )
