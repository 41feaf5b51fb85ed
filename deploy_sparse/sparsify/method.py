"""The contract training asks of a method. A method overrides only what differs from dense training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import TicketError, nearest
from ..structure import Masks


class Method:
    """Dense training: nothing happens. The baseline runs through the same code as every other method.

    Every call gets the raw module, never a wrapper of it (distributed, compiled), so names are the state dict's.

    Attributes:
        masks: what survives now, by parameter name; after :meth:`start_` on the parameters' devices.
    """

    masks: dict[str, torch.Tensor]

    def __init__(self) -> None:
        self.masks = {}

    def start_(self, model: torch.nn.Module) -> None:
        """Called once, in place, when the weights to start from are loaded and on the device they train on."""

    def after_backward_(self, model: torch.nn.Module, step: int) -> None:
        """Called when the gradients of optimizer step ``step`` (from 0) are complete: dense, unscaled, averaged."""

    def after_step_(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called, in place, after optimizer step ``step`` (from 0)."""

    def ready(self, step: int) -> bool:
        """Whether the network that optimizer step ``step`` left may be kept; False while it is not sparse enough."""
        return True

    def figures(self) -> dict[str, float]:
        """Numbers for an epoch's row of metrics, by name."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, besides weights and optimizer, for an exact resume."""
        return {}

    def restore_(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what :meth:`state` gave; called after :meth:`start_`.

        Raises:
            TicketError: a state of another method.
        """
        if state:
            raise TicketError(
                f"the checkpoint holds {', '.join(list(state)[:3])} for the method",
                expected=f"nothing: {type(self).__name__} has no state of its own",
                fix="continue with the method the checkpoint was written by, or remove the checkpoint",
            )


class StaticMasks(Method):
    """Masks that stay as they are: masked weights, and what the optimizer remembers of them, are zero after each step.

    Args:
        masks: boolean tensors by parameter name.
    """

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = dict(masks)
        self._parameters: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []  # masks in the parameters' precision and layout, for foreach

    @torch.no_grad()
    def start_(self, model: torch.nn.Module) -> None:
        """Move the masks to the parameters' devices and set masked weights to zero.

        Raises:
            TicketError: a mask without its parameter, or of another shape.
        """
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            _refuse_misfit(name, mask, parameters)
        self.masks = {name: mask.to(parameters[name].device) for name, mask in self.masks.items()}
        self._parameters = [parameters[name] for name in self.masks]
        self._factors = [torch.empty_like(parameters[name]).copy_(mask) for name, mask in self.masks.items()]
        _multiply_(self._parameters, self._factors)

    @torch.no_grad()
    def after_step_(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Masked weights and the optimizer's per-entry state of them (momentum, moments) become zero again."""
        _multiply_(self._parameters, self._factors)
        remembered, factors = [], []
        for parameter, factor in zip(self._parameters, self._factors, strict=True):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    remembered.append(value)
                    factors.append(factor)
        _multiply_(remembered, factors)


def _multiply_(tensors: list[torch.Tensor], factors: list[torch.Tensor]) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factors)


def _refuse_misfit(name: str, mask: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
    if name not in parameters:
        raise TicketError(
            f"mask {name!r} belongs to no parameter of the network",
            expected=f"masks of {', '.join(list(parameters)[:4])} …",
            fix=f"{nearest(name, list(parameters))}make the masks from this network",
        )
    if mask.shape != parameters[name].shape:
        raise TicketError(
            f"mask {name!r} has shape {tuple(mask.shape)}, its parameter {tuple(parameters[name].shape)}",
            expected="a mask shaped like its parameter",
            fix="make the masks from this network",
        )
