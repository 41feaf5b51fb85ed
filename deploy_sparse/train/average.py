"""An exponential moving average of a network in training (EMA)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn


class MovingAverage:
    """Averages weights and BatchNorm statistics; counters are copied.

    The decay is at most (1 + n) / (10 + n) at update n, so that a short training is not averaged with its start. Unlike
    :class:`torch.optim.swa_utils.AveragedModel` an update never waits for the GPU.

    Attributes:
        module: the averaged network.
        updates: updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Take up ``model`` as it is now."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floats = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [new for _, new in floats], 1 - keep)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)
        self.updates += 1


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    return chain(model.parameters(), model.buffers())
