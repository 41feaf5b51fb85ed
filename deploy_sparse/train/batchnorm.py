"""BatchNorm statistics measured anew, for weights that changed after the ones in place were collected."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError


@torch.no_grad()
def reestimate_(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace, in place, every BatchNorm's running mean and variance by their plain averages over ``batches``.

    Only BatchNorm is in training mode meanwhile, so dropout and the like play no part; the network is left in
    evaluation mode. No weight changes.

    Args:
        batches: images ``[n, C, H, W]``, n of 2 or more, on the network's device; every batch counts the same.

    Raises:
        ConfigError: a network without BatchNorm statistics, or no batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        raise ConfigError(
            "new BatchNorm statistics for a network without BatchNorm",
            expected="at least one BatchNorm layer that keeps running statistics",
            fix="leave the re-estimation out",
        )
    model.eval()
    momenta = [layer.momentum for layer in layers]
    count = 0
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's word for the average of all batches since the reset
            layer.train()
        for images in batches:
            model(images)
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
    if not count:
        raise ConfigError(
            "new BatchNorm statistics from no batch of images",
            expected="at least one batch, and a training split of fit.batch_size images or more",
            fix="ask for more batches, or choose a smaller --fit.batch_size",
        )
