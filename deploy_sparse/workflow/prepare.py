"""From a configuration to everything a recipe trains with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .. import data, zoo
from ..data import Splits, train_batches
from ..sparsify.channel_scores import channel_scores
from ..structure import ChannelGroup, Masks
from ..surgery.graph import channel_groups
from ..ticket import ModelRef, Ticket
from ..train.run import Run
from ..train.runtime import NEUTRAL, Runtime, start_runtime
from ..train.tickets import TicketTrainer
from .config import StudyConfig

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """A run that is ready to train.

    Attributes:
        run: the open run folder.
        config: the recipe's configuration.
        runtime: device, precision, processes.
        data: three splits.
        trainer: makes tickets in the run folder.
    """

    run: Run
    config: StudyConfig
    runtime: Runtime
    data: Splits
    trainer: TicketTrainer

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The network's channel groups."""
        return channel_groups(self.trainer.factory(), (torch.zeros(2, *self.data.image_shape),))

    def network(self, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The network with these weights, on the training device."""
        network = self.trainer.factory()
        network.load_state_dict(dict(weights))
        return network.to(self.runtime.device)

    def score_batches(self, count: int) -> list[Batch]:
        """The first ``count`` training batches of epoch 0, not augmented, on the training device."""
        batches = train_batches(self.data.train, self.config.fit.batch_size, seed=self.config.seed, epoch=0)
        return [
            (images.to(self.runtime.device), labels.to(self.runtime.device))
            for images, labels in islice(batches, count)
        ]

    def channel_scores(self, criterion: str, masks: Masks, trained: Ticket, batches: int) -> dict[str, torch.Tensor]:
        """Refill's criterion on a round's own trained weights: ``[c_out]`` float64 on the CPU, by weight name."""
        weights = {name: trained.weights[name] * mask for name, mask in masks.items()}
        if criterion in ("l1", "survivors"):
            return channel_scores(criterion, masks, weights=weights)
        model, found = self.network({**trained.weights, **weights}), self.score_batches(batches)
        scores = channel_scores(criterion, masks, weights=weights, model=model, batches=found)
        return {name: score.cpu() for name, score in scores.items()}


def prepare(config: StudyConfig, run: Run, method: str) -> Work:
    """Set the runtime up, load the data, and make the trainer.

    Args:
        method: the method's name, for the tickets' provenance.

    Raises:
        ConfigError: the data is missing or damaged, or the device is.
    """
    runtime = start_runtime(config.runtime)
    splits = data.load(
        config.data.name, seed=config.seed, folder=Path(config.data.folder), arguments=config.data.arguments
    )
    trainer = TicketTrainer(
        run,
        method=method,
        factory=partial(initial_network, config),
        model=ModelRef(config.model.name, dict(config.model.arguments), splits.image_shape),
        data=splits,
        fit=config.fit,
        runtime=runtime,
        seed=config.seed,
        config=config.model_dump(mode="json", exclude={"deploy": True, "runtime": set(NEUTRAL)}),
    )
    return Work(run, config, runtime, splits, trainer)


def initial_network(config: StudyConfig) -> torch.nn.Module:
    """The dense network with the seed's initial weights, whatever was drawn before.

    With ``model.init = "fan_in"`` the weights of convolutions and Linear layers are Kaiming normal (fan-in, for ReLU),
    as the ImageNet command of Chase (Yin et al. 2023) has them; all other parameters are the network's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = zoo.build(config.model.name, **config.model.arguments)
        if config.model.init == "fan_in":
            for module in network.modules():
                if isinstance(module, _ConvNd | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        return network
