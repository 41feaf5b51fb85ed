"""How output channels are scored: refill's five criteria (Chen et al. 2022, Fig. A8). Larger is kept first.

A score is a float64 vector ``[c_out]`` by weight name. The round's own trained weights are scored, under its masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError, TicketError, nearest
from ..structure import Masks
from ._passes import Batches, evaluating, own_batches, summed_loss, unknown_mask

Criterion = Literal["l1", "survivors", "activation_l1", "activation_l2", "saliency"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
"""The paper's five, its choice first."""

OF_WEIGHTS: tuple[str, ...] = ("l1", "l2", "survivors")
OF_DATA: tuple[str, ...] = ("activation_l1", "activation_l2", "saliency")

_Reduce = Callable[[torch.Tensor], torch.Tensor]


def channel_scores(
    criterion: str,
    masks: Masks,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    model: nn.Module | None = None,
    batches: Batches = (),
) -> dict[str, torch.Tensor]:
    """Scores of every masked layer's output channels, float64 ``[c_out]`` on the scored tensors' device.

    * ``"l1"``, ``"l2"``: norm of the channel's surviving weights.
    * ``"survivors"``: their number.
    * ``"activation_l1"``, ``"activation_l2"``: norm of the channel's feature map, the layer's own output before any
      norm or activation function, averaged over the samples.
    * ``"saliency"``: ``|mean over positions of activation · gradient|`` of each sample's own cross-entropy, averaged
      over the samples (Molchanov et al. 2017).

    Args:
        criterion: one of these.
        masks: by weight name; which layers are scored, and which of their weights survive.
        weights: for the criteria of weights; the model's own by default.
        model: for the criteria of data, with the trained, masked weights; it runs in evaluation mode and is left as
            it was.
        batches: for the criteria of data.

    Raises:
        ConfigError: an unknown criterion, or one that lacks its data, model or weights.
        TicketError: a mask that belongs to no convolution or Linear of the model.
    """
    if criterion not in (*OF_WEIGHTS, *OF_DATA):
        raise ConfigError(
            f"unknown channel score {criterion!r}",
            expected=f"one of {', '.join((*OF_WEIGHTS, *OF_DATA))}",
            fix=f"{nearest(criterion, (*OF_WEIGHTS, *OF_DATA))}mend the name",
        )
    if criterion in OF_WEIGHTS:
        if weights is None:
            weights = dict(_given(model, criterion).named_parameters())
        return {name: _of_weights(criterion, weights[name], mask) for name, mask in masks.items()}
    network = _given(model, criterion)
    if criterion == "saliency":
        return _saliency(network, masks, batches)
    return _feature_maps(network, masks, batches, 1 if criterion == "activation_l1" else 2)


def weight_l1(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ℓ1 norm of the surviving weights of each output channel (Chen et al. 2022, section 3.2).

    Args:
        weight: ``[c_out, ...]``.
        mask: same shape, True survives.

    Returns:
        ``[c_out]`` float64.
    """
    return _of_weights("l1", weight, mask)


def _of_weights(criterion: str, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if criterion == "survivors":
        return mask.reshape(len(mask), -1).sum(dim=1).double()
    survivors = (weight.detach().double() * mask.to(weight.device)).reshape(len(weight), -1)  # [c_out, n]
    return survivors.abs().sum(dim=1) if criterion == "l1" else survivors.square().sum(dim=1).sqrt()


def _feature_maps(model: nn.Module, masks: Masks, batches: Batches, order: int) -> dict[str, torch.Tensor]:
    totals: dict[str, torch.Tensor] = {}
    samples = 0

    def add(name: str, maps: torch.Tensor) -> torch.Tensor:  # maps [N, c_out, positions]
        norms = torch.linalg.vector_norm(maps, order, dim=2, dtype=torch.float64).sum(dim=0)  # [c_out]
        totals[name] = totals[name] + norms if name in totals else norms
        return maps

    with evaluating(model), torch.no_grad(), _watched(model, masks, add):
        for images, _ in own_batches(batches, f"activation_l{order}"):
            model(images)
            samples += len(images)
    return _complete(totals, masks, samples)


def _saliency(model: nn.Module, masks: Masks, batches: Batches) -> dict[str, torch.Tensor]:
    totals: dict[str, torch.Tensor] = {}
    calls: list[tuple[str, torch.Tensor]] = []
    samples = 0

    def keep(name: str, maps: torch.Tensor) -> torch.Tensor:
        if not maps.requires_grad:
            maps = maps.detach().requires_grad_()
        calls.append((name, maps))
        return maps

    with evaluating(model), _watched(model, masks, keep):
        for images, labels in own_batches(batches, "saliency"):
            calls.clear()
            # summed over samples: in evaluation mode each sample's gradient is that of its own loss
            loss = summed_loss(model(images), labels)
            slopes = torch.autograd.grad(loss, [maps for _, maps in calls], materialize_grads=True)
            for (name, maps), slope in zip(calls, slopes, strict=True):
                effect = (maps.detach() * slope).mean(dim=2, dtype=torch.float64)  # [N, c_out]
                score = effect.abs().sum(dim=0)
                totals[name] = totals[name] + score if name in totals else score
            samples += len(images)
    return _complete(totals, masks, samples)


@contextmanager
def _watched(model: nn.Module, masks: Masks, see: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While open, ``see`` is shown every masked layer's output as ``[N, c_out, positions]``, and its result is used."""
    parts = dict(model.named_modules())
    handles = []
    try:
        for name, mask in masks.items():
            path, _, attribute = name.rpartition(".")
            layer = parts.get(path)
            known = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
            if layer is None or not known or attribute != "weight" or len(mask) != layer.weight.shape[0]:
                raise unknown_mask(name, [f"{own}.weight" for own, part in parts.items() if hasattr(part, "weight")])
            handles.append(layer.register_forward_hook(_hook(name, see)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, see: Callable[[str, torch.Tensor], torch.Tensor]
) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    def hook(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Linear):
            output = output.movedim(-1, 1)  # [N, ..., c_out] -> [N, c_out, ...]
        seen = see(name, output.reshape(*output.shape[:2], -1)).reshape(output.shape)
        # a copy, so that an activation function in place does not change what was seen
        return (seen.movedim(1, -1) if isinstance(layer, nn.Linear) else seen).clone()

    return hook


def _complete(totals: Mapping[str, torch.Tensor], masks: Masks, samples: int) -> dict[str, torch.Tensor]:
    for name in masks:
        if name not in totals:
            raise TicketError(
                f"layer {name!r} did not run, so its feature maps cannot be scored",
                expected="a network that uses every masked layer",
                fix="drop that mask, or choose the score 'l1'",
            )
    return {name: totals[name].detach() / samples for name in masks}


def _given(model: nn.Module | None, criterion: str) -> nn.Module:
    if model is None:
        raise ConfigError(
            f"channel score {criterion!r} without a network",
            expected="model=…, the network with its trained, masked weights"
            + (", or weights=…" if criterion in OF_WEIGHTS else ""),
            fix="pass it",
        )
    return model
