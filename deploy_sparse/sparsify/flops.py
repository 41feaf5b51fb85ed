"""What a sparse network costs by the conventions of the DST papers: at inference, and over a training run.

All figures are multiply-accumulates of one sample. *Theoretical* counts the surviving weights, *supported* what is left
when emptied channels are cut out and everything else runs dense, as a GPU does; norms and activations are not counted.
Training follows RigL (Evci et al. 2020): the backward pass of a layer costs twice its forward pass, once for the
gradient of its inputs and once for that of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ConfigError, TicketError, nearest
from ..structure import Masks


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of one sample's forward pass: all, those of surviving weights, those a GPU has to do."""

    dense: float
    theoretical: float
    supported: float

    @property
    def theoretical_share(self) -> float:
        """Of the dense network's."""
        return self.theoretical / self.dense

    @property
    def supported_share(self) -> float:
        """Of the dense network's."""
        return self.supported / self.dense


def flops(macs: Mapping[str, int], masks: Masks, left: Masks | None = None) -> Flops:
    """What the network with these masks costs at inference.

    A layer's theoretical cost is its density's share of its dense cost; its supported cost is the share of its rows
    (output channels) with a survivor times that of its columns (input channels) with one. Layers without a mask stay
    dense, and what has a mask but no cost of its own (norms, biases) is left out.

    Args:
        macs: dense multiply-accumulates by weight name, as :func:`~deploy_sparse.surgery.cost.layer_macs` counts them.
        masks: by parameter name, on any device; ``[c_out, c_in, ...]``.
        left: what was not removed with channels, like ``masks``, where that is known: then a row that is merely empty
            still costs a GPU its work.

    Raises:
        ConfigError: no multiply-accumulate at all.
        TicketError: masks of which not one is of a weight that ``macs`` names.
    """
    dense = sum(macs.values())
    if dense <= 0:
        raise ConfigError(
            "the network does no multiply-accumulate that belongs to a weight",
            expected="a network with convolutions or Linear layers",
            fix="count again with layer_macs(module, inputs)",
        )
    layers = {name: mask for name, mask in masks.items() if name in macs}
    unknown = next((name for name, mask in masks.items() if mask.dim() > 1), None)
    if not layers and unknown is not None:
        raise TicketError(
            f"no mask is of a layer whose multiply-accumulates are known; for example {unknown!r}",
            expected=f"masks of {', '.join(list(macs)[:4])} …",
            fix=f"{nearest(unknown, list(macs))}count them with the network the masks are of",
        )
    theoretical = supported = float(dense)
    shares = _shares(layers)
    for name, (density, _, _) in shares.items():
        theoretical -= macs[name] * (1 - density)
    there = shares if left is None else _shares({name: mask for name, mask in left.items() if name in macs})
    for name, (_, rows, columns) in there.items():
        supported -= macs[name] * (1 - rows * columns)
    return Flops(float(dense), theoretical, supported)


@dataclass(frozen=True)
class TrainingFlops:
    """Multiply-accumulates of a training run so far, of one sample a step: sums over the steps taken.

    Times the batch size they are the run's; the shares need no batch size.
    """

    theoretical: float = 0.0
    supported: float = 0.0
    dense: float = 0.0

    def after(self, steps: int, found: Flops, dense_gradients: int = 0) -> TrainingFlops:
        """This and ``steps`` steps more with the masks that ``found`` is of.

        With f the forward pass and f_D the dense network's, a step costs 3 f; one whose weight gradient is dense, as
        growing by gradient asks for, costs 2 f + f_D, as RigL reckons.

        Args:
            steps: optimizer steps, those with a dense gradient included.
            found: what the network costs at inference during these steps.
            dense_gradients: how many of the steps need the gradient of every weight.

        Raises:
            ConfigError: fewer steps than dense gradients, or fewer than none.
        """
        if not 0 <= dense_gradients <= steps:
            raise ConfigError(
                f"{dense_gradients} dense gradients in {steps} steps",
                expected="from none to as many as steps",
                fix="count the steps with a dense gradient among the steps",
            )
        sparse = 3 * steps - dense_gradients  # forward passes, or as much work
        return TrainingFlops(
            self.theoretical + sparse * found.theoretical + dense_gradients * found.dense,
            self.supported + sparse * found.supported + dense_gradients * found.dense,
            self.dense + 3 * steps * found.dense,
        )

    @property
    def theoretical_share(self) -> float:
        """Of a dense training of as many steps; 1 before the first."""
        return self.theoretical / self.dense if self.dense else 1.0

    @property
    def supported_share(self) -> float:
        """Of a dense training of as many steps; 1 before the first."""
        return self.supported / self.dense if self.dense else 1.0

    def to_tensor(self) -> torch.Tensor:
        """``[theoretical, supported, dense]`` in float64, for a checkpoint."""
        return torch.tensor([self.theoretical, self.supported, self.dense], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> TrainingFlops:
        """What :meth:`to_tensor` gave.

        Raises:
            TicketError: a tensor of another shape.
        """
        if tensor.shape != (3,):
            raise TicketError(
                f"the training FLOPs have shape {tuple(tensor.shape)}",
                expected="three numbers: theoretical, supported, dense",
                fix="continue with the method the checkpoint was written by, or remove the checkpoint",
            )
        theoretical, supported, dense = tensor.tolist()
        return cls(theoretical, supported, dense)


def _shares(layers: Masks) -> dict[str, tuple[float, float, float]]:
    """By layer: the share of weights that survive, of rows and of columns with a survivor. One transfer from a GPU."""
    if not layers:
        return {}
    found = []
    for mask in layers.values():
        cells = mask.flatten(2).any(dim=2) if mask.dim() > 2 else mask  # [c_out, c_in]
        found.append(torch.stack([mask.count_nonzero(), cells.any(dim=1).sum(), cells.any(dim=0).sum()]))
    counts: list[list[int]] = torch.stack(found).tolist()
    return {
        name: (survivors / mask.numel(), rows / mask.shape[0], columns / mask.shape[1])
        for (name, mask), (survivors, rows, columns) in zip(layers.items(), counts, strict=True)
    }
