"""Forward passes for scores: with other tensors than the model's own, and leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..errors import ConfigError, TicketError, nearest
from ..structure import Masks

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Images ``[N, C, H, W]`` and labels int64 ``[N]``, on the model's device."""


def own_batches(batches: Batches, score: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All batches, held: scores may pass over them more than once.

    Raises:
        ConfigError: there are none, or something that is no batch; the message names ``score``.
    """
    found = held_batches(batches)
    if not found:
        raise ConfigError(
            f"score {score!r} without data",
            expected="batches of images and labels: it is computed on the network's activations or gradients",
            fix="pass batches=[(images, labels)], or choose a score of the weights alone",
        )
    return found


def held_batches(batches: Batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All batches, none as well.

    Raises:
        ConfigError: one that is no pair of images and as many labels, or is empty.
    """
    found = list(batches)
    for number, batch in enumerate(found):
        if wrong := _no_batch(batch):
            raise ConfigError(
                f"batch {number} {wrong}",
                expected="pairs of images [N, ...] and labels [N], whole numbers, N of 1 or more",
                fix="pass batches=[(images, labels)]",
            )
    return found


def _no_batch(batch: object) -> str:
    """What keeps it from being a batch, or nothing."""
    if not (
        isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, torch.Tensor) for part in batch)
    ):
        return f"is no pair of tensors but {type(batch).__name__}"
    images, labels = batch
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"has labels of shape {list(labels.shape)} and type {labels.dtype}"
    if images.dim() < 1 or len(images) != len(labels):
        return f"has images of shape {list(images.shape)} and {len(labels)} labels"
    return "" if len(labels) else "is empty"


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Cross-entropy of logits ``[N, classes]`` divided by ``temperature``, summed over the samples.

    Raises:
        ConfigError: labels that are no classes of the network.
    """
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"a network with output {shape} for {len(labels)} labels",
            expected="one row of logits for each sample, [N, classes]",
            fix="choose a score that needs no labels, for example 'l1'",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ConfigError(
            f"labels from {low} to {high} for a network of {logits.shape[1]} classes",
            expected=f"labels from 0 to {logits.shape[1] - 1}",
            fix="number the classes from 0, and take the network for these data",
        )
    return functional.cross_entropy(logits / temperature, labels.long(), reduction="sum")


@contextmanager
def evaluating(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Evaluation mode with gradients enabled; every module's mode is restored on leaving.

    Args:
        batch_statistics: BatchNorm normalises with each batch's own statistics (training mode). Its running
            statistics are not protected here: pass substitutes for them to :func:`run`.
    """
    modes = {part: part.training for part in model.modules()}
    model.eval()
    for part in model.modules():
        part.training = batch_statistics and isinstance(part, _BatchNorm)
    try:
        with torch.enable_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def substitutes(model: nn.Module, masks: Masks) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Stand-ins for everything in the state of ``model``, and those of the masked weights, which want gradients.

    Masked entries are zero. Nothing done to a stand-in, by autograd or in place, reaches the model.

    Raises:
        TicketError: a mask that belongs to no parameter.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, mask in masks.items():
        if name not in tensors:
            raise unknown_mask(name, list(tensors))
        tensors[name] = (tensors[name] * mask.to(tensors[name].device)).requires_grad_()
    return tensors, [tensors[name] for name in masks]


def run(model: nn.Module, tensors: dict[str, torch.Tensor], inputs: tuple[object, ...]) -> torch.Tensor:
    """The output of ``model`` with ``tensors`` in the place of its parameters and buffers."""
    found: torch.Tensor = functional_call(model, tensors, inputs)
    return found


def floating(tree: object) -> list[torch.Tensor]:
    """The floating-point tensors in nested containers."""
    leaves = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def unknown_mask(name: str, known: list[str]) -> TicketError:
    """The error for a mask whose layer the network does not have."""
    return TicketError(
        f"mask {name!r} belongs to no layer of the network that can be scored",
        expected=f"masks of {', '.join(known[:4])} …",
        fix=f"{nearest(name, known)}make the masks from this network",
    )
