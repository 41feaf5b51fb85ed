"""What a method may do during training. A method overrides only what differs from dense training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..structure import Masks


class Method:
    """Dense training: nothing happens. The baseline runs through the same code as every other method."""

    masks: Masks

    def __init__(self) -> None:
        self.masks = {}

    def start_(self, model: torch.nn.Module) -> None:
        """Called once, in place, when the weights to start from are loaded."""

    def after_step_(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called, in place, after every optimizer step."""


class StaticMasks(Method):
    """Masks that stay as they are: masked weights, and what the optimizer remembers of them, are zero after each step.

    Args:
        masks: boolean tensors by parameter name.
    """

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = dict(masks)

    @torch.no_grad()
    def start_(self, model: torch.nn.Module) -> None:
        for parameter, mask in self._pairs(model):
            parameter.mul_(mask)

    @torch.no_grad()
    def after_step_(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for parameter, mask in self._pairs(model):
            parameter.mul_(mask)
            for remembered in _per_entry_state(optimizer.state.get(parameter, {}), parameter):
                remembered.mul_(mask)

    def _pairs(self, model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        parameters = dict(model.named_parameters())
        return [(parameters[name], mask) for name, mask in self.masks.items()]


def _per_entry_state(state: Mapping[str, object], parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    return [v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
