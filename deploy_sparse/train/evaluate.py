"""How good a network is on a split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..data.batches import eval_batches
from ..data.splits import Split
from .distributed import ALONE, World
from .runtime import CPU, Runtime

BATCH = 256


@torch.no_grad()
def accuracy(
    model: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    *,
    batch_size: int = BATCH,
    runtime: Runtime | None = None,
    processes: World = ALONE,
) -> float:
    """Top-1 accuracy 0..1 on a split, in fp32.

    Args:
        model: a network, which is put into evaluation mode, or any function of images ``[n, C, H, W]`` to logits
            ``[n, classes]``.
        runtime: where the images go; by default to the network's own device, and to the CPU for a function.
        processes: share the split between these, which must all call this; each gets the whole answer.
    """
    if isinstance(model, nn.Module):
        model.eval()
    runtime = runtime or Runtime(CPU.config, _device(model))
    correct = torch.zeros((), dtype=torch.int64, device=runtime.device)
    mine = eval_batches(split, batch_size, rank=processes.rank, world=processes.size, workers=runtime.config.workers)
    for images, labels in runtime.batches(mine):
        correct += (model(images).argmax(dim=1) == labels).sum()
    return processes.sum(int(correct)) / len(split)


def _device(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device
