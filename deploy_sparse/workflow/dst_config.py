"""The configuration of dynamic sparse training, and how it becomes schedules in steps."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import data, zoo
from ..config import Config
from ..errors import ConfigError
from ..sparsify.channel_schedule import ChannelSchedule, floors
from ..sparsify.coupling import Coupling, channel_pools
from ..sparsify.dst import Spread
from ..sparsify.exploration import PRESETS, Decay, Exploration, Growth, Preset, Scope, SoftBound
from ..sparsify.imp import dense_masks, head_of
from ..sparsify.umm import ChannelScore
from ..structure import ChannelGroup
from ..surgery.graph import channel_groups
from .budgeted import LatencyKeys, check_latency, refuse_with_latency
from .config import StudyConfig, check_study


class SparseConfig(Config):
    """How sparse the weights are."""

    density: float = Field(0.1, gt=0, le=1, description="share of the weights that may be non-zero at a time")
    distribution: Spread = Field("erk", description="how it is spread over the layers at first")
    exclude: tuple[str, ...] = Field((), description="patterns of weights to leave dense, such as a stem")
    baseline: Literal["trained", "untrained"] = Field(
        "trained", description="train the dense network too; untrained: it is timed, and has no accuracy"
    )
    reestimate: bool = Field(
        False, description="re-estimate BatchNorm's statistics over the training split before deployment"
    )


class ExploreConfig(Config):
    """How connectivity moves; what is not given is the preset's."""

    preset: Preset = Field("rigl", description="published settings to start from")
    interval: int | None = Field(None, ge=1, description="optimizer steps between updates")
    stop: float | None = Field(None, gt=0, le=1, description="share of the training after which nothing moves")
    growth: Growth | None = Field(None, description="what grows; gradient: where the dense one is largest, or random")
    scope: Scope | None = Field(None, description="layer: each has its number of weights, or global: all are one pool")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the weights an update drops, at the start")
    final_fraction: float | None = Field(None, ge=0, le=1, description="the same at the end of its decay")
    decay: Decay | None = Field(None, description="how the fraction falls: cosine, or constant: not")
    surplus: float | None = Field(
        None, ge=0, lt=1, description="soft bound: weights held between updates above the density; 0: none"
    )
    final_surplus: float | None = Field(None, ge=0, lt=1, description="what the surplus falls to")
    surplus_until: float | None = Field(None, gt=0, le=1, description="share of the training at which it must be gone")
    gradient_batches: int = Field(1, ge=1, description="batches over which the gradient for growth is averaged")


class SetExplore(ExploreConfig):
    """Random growth, unless said otherwise."""

    preset: Preset = Field("set", description="published settings to start from")


class ChaseExplore(ExploreConfig):
    """Global, under a soft bound, unless said otherwise."""

    preset: Preset = Field("chase", description="published settings to start from")


class ChannelsConfig(LatencyKeys):
    """Chase: which channels go, and when."""

    budget: Literal["share", "latency"] = Field(
        "share", description="how many go; share: channels.sparsity of them; latency: all that channels.latency asks"
    )
    sparsity: float = Field(0.5, ge=0, lt=1, description="S_c: share of the prunable channels that go; 0: none")
    coupling: Coupling = Field(
        "internal", description="internal: channels inside blocks, as published; prune_skip: residual streams too"
    )
    criterion: ChannelScore = Field("umm", description="the channel score")
    floor: float = Field(0.2, ge=0, le=1, description="β: least share of its even part that a layer keeps")
    interval: int = Field(1000, ge=1, description="optimizer steps between removals")
    until: float = Field(0.8, gt=0, le=1, description="share of the training at which the last channels go")


class DstConfig(StudyConfig):
    """What the recipes of dynamic sparse training share."""

    sparse: SparseConfig = SparseConfig()
    explore: ExploreConfig = ExploreConfig()


class SetConfig(DstConfig):
    """Dynamic sparse training that grows at random."""

    explore: SetExplore = SetExplore()


class ChaseConfig(DstConfig):
    """Dynamic sparse training, and channels that go."""

    explore: ChaseExplore = ChaseExplore()
    channels: ChannelsConfig = ChannelsConfig()


def check_dst(config: DstConfig) -> None:
    """Refuse what cannot be trained, before a run folder exists.

    Raises:
        ConfigError: naming the key and what it accepts.
    """
    check_study(config)
    images = data.describe(config.data.name, config.data.arguments)
    network = zoo.check(config.model.name, config.model.arguments, images.image_shape, images.classes)
    dense_masks(network, exclude=config.sparse.exclude, head=True)
    epoch = images.train_images // config.fit.batch_size
    explored = exploration_of(config, epoch)
    total = config.fit.epochs * epoch
    if not explored.moves(total):
        raise ConfigError(
            f"explore.interval = {explored.interval} in a training of {total} steps"
            + f" that stop to move weights after step {explored.stop}" * (explored.stop < total),
            expected="at least one update by which weights grow",
            fix="train longer, or raise --explore.stop"
            if min(explored.stop, total) < 20
            else f"choose a shorter --explore.interval, for example {min(explored.stop, total) // 20}, "
            "or a config made for this network and data (deploy-sparse ls)",
        )
    if config.sparse.reestimate and not any(isinstance(part, _BatchNorm) for part in network.modules()):
        raise ConfigError(
            f"sparse.reestimate with {config.model.name!r}, which has no BatchNorm",
            expected="a network with statistics to re-estimate",
            fix="leave --sparse.reestimate out",
        )
    if isinstance(config, ChaseConfig):
        within = config.channels.budget == "latency"
        check_latency(config.deploy, config.channels, "channels", within)
        if within:
            none = config.channels.sparsity == 0, "any other: the schedule, not the share, is what counts here"
            refuse_with_latency("channels", {"channels.sparsity = 0": none})
    if isinstance(config, ChaseConfig) and config.channels.sparsity > 0:
        _check_channels(config, network, images.image_shape, epoch)


def _check_channels(config: ChaseConfig, network: nn.Module, image_shape: tuple[int, ...], epoch: int) -> None:
    channels = config.channels
    events = channel_schedule(config, epoch).events()
    if len(events) < 2:
        last = max(events)
        raise ConfigError(
            f"channels.interval = {channels.interval} with all channels gone by step {last}",
            expected="more than one removal, since channels go step by step",
            fix="raise --channels.until, or train longer"
            if last < 20
            else f"choose a shorter --channels.interval, for example {last // 20}",
        )
    prunable = dense_masks(network, exclude=config.sparse.exclude, head=True)
    groups = _traced(config.model.name, json.dumps(config.model.arguments, sort_keys=True), image_shape)
    pools = channel_pools(prunable, groups, channels.coupling, head=head_of(network))
    if not pools:
        raise ConfigError(
            f"no channels of {config.model.name!r} may go with channels.coupling = {channels.coupling!r}"
            + f" and sparse.exclude = {list(config.sparse.exclude)}" * bool(config.sparse.exclude),
            expected="layers whose channels only layers with masks write and read",
            fix=("exclude fewer layers, " if config.sparse.exclude else "")
            + ("choose --channels.coupling prune_skip, " if channels.coupling == "internal" else "")
            + "or choose --channels.sparsity 0",
        )
    if channels.budget == "share":
        floors([pool.size for pool in pools], channels.sparsity, channels.floor)


def exploration_of(config: DstConfig, epoch: int) -> Exploration:
    """The exploration in steps.

    Args:
        epoch: optimizer steps of an epoch.

    Raises:
        ConfigError: values that exclude each other.
    """
    given, total = config.explore, epoch * config.fit.epochs
    try:
        return _explored(given, epoch, total)
    except ConfigError as problem:
        raise ConfigError(f"[explore]: {problem.given}", expected=problem.expected, fix=problem.fix) from None


def _explored(given: ExploreConfig, epoch: int, total: int) -> Exploration:
    found = PRESETS[given.preset](epoch, total)
    if given.interval is not None:
        found = found.every(given.interval)
    plain = ("growth", "scope", "fraction", "final_fraction", "decay")
    changed: dict[str, Any] = {key: getattr(given, key) for key in plain if getattr(given, key) is not None}
    if given.stop is not None:
        changed["stop"] = max(1, round(given.stop * total))
    soft = _soft_bound(given, found.soft, total)
    return replace(found, soft=soft, gradient_batches=given.gradient_batches, **changed)


def _soft_bound(given: ExploreConfig, preset: SoftBound | None, total: int) -> SoftBound | None:
    wanted = {"final": given.final_surplus, "until": given.surplus_until}
    surplus = preset.surplus if given.surplus is None and preset is not None else given.surplus
    if not surplus:
        for name, value in wanted.items():
            if value is not None:
                key = "explore.final_surplus" if name == "final" else "explore.surplus_until"
                raise ConfigError(
                    f"{key} = {value} without a surplus",
                    expected="a soft bound for it to shape",
                    fix="give --explore.surplus, or drop the key",
                )
        return None
    until = preset.until if preset is not None else total
    if given.surplus_until is not None:
        until = max(1, round(given.surplus_until * total))
    return SoftBound(surplus, until, given.final_surplus or 0.0)


def channel_schedule(config: ChaseConfig, epoch: int) -> ChannelSchedule:
    """When channels go, in steps: half an exploration interval away from the updates of the weights."""
    until = max(1, round(config.channels.until * config.fit.epochs * epoch))
    offset = exploration_of(config, epoch).interval // 2
    return ChannelSchedule(config.channels.sparsity, config.channels.interval, offset, until)


@lru_cache(maxsize=4)
def _traced(name: str, arguments: str, image_shape: tuple[int, ...]) -> tuple[ChannelGroup, ...]:
    with torch.random.fork_rng(devices=[]):
        network = zoo.build(name, **json.loads(arguments))
    return channel_groups(network, (torch.zeros(2, *image_shape),))
