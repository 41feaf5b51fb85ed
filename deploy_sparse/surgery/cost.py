"""What a network costs: parameters, and multiply-accumulates of one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and multiply-accumulates of convolutions and matrix products for one sample."""

    parameters: int
    macs: int


@torch.no_grad()
def cost_of(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Cost, list[torch.Size]]:
    """Run ``module`` once; its cost, and the shapes of its outputs.

    Args:
        module: in evaluation mode.
        inputs: positional inputs; axis 0 of the first one is the batch.
    """
    with FlopCounterMode(display=False) as counter:
        outputs = module(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    batch = max(1, inputs[0].shape[0])
    parameters = sum(p.numel() for p in module.parameters())
    shapes = [y.shape for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]
    return Cost(parameters, counter.get_total_flops() // (2 * batch)), shapes
