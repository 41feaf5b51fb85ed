"""The configuration tables that recipes share, and what is refused before a run folder exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .. import data, zoo
from ..config import Config
from ..errors import ConfigError
from ..sparsify.imp import dense_masks
from ..train.runtime import RuntimeConfig, check_runtime
from ..train.schedule import FitConfig, check_batch_size, check_optimizer
from ..tune.deliver import DeployConfig, check_deploy


class ModelConfig(Config):
    """The network."""

    name: str = Field("resnet_digits", description="zoo name, or torchvision/<name>")
    arguments: dict[str, Any] = Field({}, description="arguments of the zoo's factory")
    init: Literal["own", "fan_in"] = Field(
        "own",
        description="initial weights: the network's own, or Kaiming normal (fan-in) for convolutions and Linear layers",
    )


class DataConfig(Config):
    """The data."""

    name: str = Field("digits", description="data set name")
    folder: str = Field("data", description="where the files of a data set that is not embedded lie")
    arguments: dict[str, Any] = Field({}, description="arguments of a generated data set, such as its sizes")


class StudyConfig(Config):
    """What every recipe's configuration holds."""

    seed: int = Field(0, ge=0, lt=2**32, description="initialisation, split, data order")
    runtime: RuntimeConfig = RuntimeConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    fit: FitConfig = FitConfig()
    deploy: DeployConfig = DeployConfig()


class ImpConfig(Config):
    """Iterative magnitude pruning, and the other sources of masks that the paper compares it with."""

    rounds: int = Field(4, ge=1, description="pruning rounds")
    rate: float = Field(0.2, gt=0, lt=1, description="share of the surviving weights pruned in a round")
    rewind: Literal["rewind", "lt", "finetune"] = Field(
        "rewind", description="train again from: an early epoch, the initialisation, or the trained weights"
    )
    rewind_epoch: int | None = Field(None, ge=0, description="epoch to rewind to; instead of rewind_fraction")
    rewind_fraction: float = Field(0.05, ge=0, lt=1, description="the same as a share of fit.epochs")
    retrain: Literal["rest", "full"] = Field(
        "rest",
        description="rest: the paper's rule, the optimizer and its schedule are rewound too and t - i epochs follow; "
        "full: the public code's, a fresh optimizer and the whole schedule",
    )
    source: Literal["imp", "random", "magnitude", "snip", "grasp", "synflow"] = Field(
        "imp", description="who makes the masks; all but imp prune at once to the density of the round"
    )
    distribution: Literal["global", "uniform", "erk"] = Field(
        "global", description="how a one-shot source's density is spread over the layers; imp is global"
    )
    score_batches: int = Field(4, ge=1, description="training batches that data-driven scores are computed on")
    group_aware: bool = Field(False, description="structure the masks after every round (Algorithm 4)")
    exclude: tuple[str, ...] = Field((), description="patterns of weights to leave dense")
    linear: bool = Field(
        True, description="also prune Linear layers but the last, the paper's rule; false: convolutions only"
    )


def check_study(config: StudyConfig) -> None:
    """Refuse what no recipe can train or deploy.

    Raises:
        ConfigError: naming the key and what it accepts.
        MissingDependencyError, BuildError: nothing can be built for the targets here.
    """
    check_runtime(config.runtime)
    if config.fit.schedule != "step" and config.fit.milestones:
        raise ConfigError(
            f"fit.milestones = {list(config.fit.milestones)} with fit.schedule = {config.fit.schedule!r}",
            expected='milestones only with fit.schedule = "step"',
            fix="drop one of the two",
        )
    check_optimizer(config.fit)
    images = data.describe(config.data.name, config.data.arguments)
    zoo.check(config.model.name, config.model.arguments, images.image_shape, images.classes)
    data.check_files(config.data.name, Path(config.data.folder))
    check_batch_size(config.fit, images.train_images)
    check_deploy(config.deploy)


def check_imp(config: StudyConfig, imp: ImpConfig, wanted: tuple[int, ...], key: str) -> None:
    """Refuse rounds and rewind points that do not exist.

    Args:
        wanted: the rounds to make structural tickets of; empty for the last one.
        key: what ``wanted`` is called in the configuration.

    Raises:
        ConfigError: naming the key and what it accepts.
    """
    images = data.describe(config.data.name, config.data.arguments)
    network = zoo.check(config.model.name, config.model.arguments, images.image_shape, images.classes)
    dense_masks(network, exclude=imp.exclude, linear=imp.linear)
    if not all(1 <= number <= imp.rounds for number in wanted) or len({*wanted}) < len(wanted):
        raise ConfigError(
            f"{key} = {list(wanted)}",
            expected=f"different rounds between 1 and imp.rounds = {imp.rounds}",
            fix="choose fewer, or raise --imp.rounds",
        )
    if rewind_epoch(config.fit, imp) >= config.fit.epochs:
        raise ConfigError(
            f"imp.rewind_epoch = {imp.rewind_epoch} with fit.epochs = {config.fit.epochs}",
            expected="a rewind point inside the training",
            fix="choose an earlier epoch",
        )
    if imp.rewind != "rewind" and imp.rewind_epoch is not None:
        raise ConfigError(
            f"imp.rewind_epoch = {imp.rewind_epoch} with imp.rewind = {imp.rewind!r}",
            expected='a rewind epoch only with imp.rewind = "rewind"',
            fix="drop one of the two",
        )
    if imp.source == "imp" and imp.distribution != "global":
        raise ConfigError(
            f"imp.distribution = {imp.distribution!r} with imp.source = 'imp'",
            expected='"global": IMP ranks all layers together',
            fix="drop it, or choose a one-shot --imp.source",
        )
    if imp.source != "imp" and (imp.group_aware or imp.rewind == "finetune"):
        what = "imp.group_aware" if imp.group_aware else 'imp.rewind = "finetune"'
        raise ConfigError(
            f"{what} with imp.source = {imp.source!r}",
            expected="a one-shot source without it: its masks do not come from the previous round",
            fix="drop one of the two",
        )


def rewind_epoch(fit: FitConfig, imp: ImpConfig) -> int:
    """The epoch whose starting weights later trainings start from; 0 is the initialisation."""
    if imp.rewind == "lt":
        return 0
    return imp.rewind_epoch if imp.rewind_epoch is not None else round(imp.rewind_fraction * fit.epochs)
