"""How single weights are scored. A score is shaped like its weight; larger is kept first.

Every function takes what may survive at most as ``masks``; scores of masked entries mean nothing. The model is left as
it was: weights, gradients, running statistics and modes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import TicketError
from ..structure import Masks
from ._passes import Batches, evaluating, floating, own_batches, run, substitutes, summed_loss

Scores = dict[str, torch.Tensor]


def magnitude(weights: Mapping[str, torch.Tensor], masks: Masks) -> Scores:
    """``|w|``."""
    return {name: weights[name].detach().abs() for name in masks}


def random(masks: Masks, seed: int) -> Scores:
    """Uniform numbers, float64, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
        for name, mask in masks.items()
    }


def snip(model: nn.Module, masks: Masks, batches: Batches) -> Scores:
    """Connection sensitivity ``|g ⊙ w|``: how fast the loss changes as the weight is switched off (Lee et al. 2019).

    g is the gradient of the mean cross-entropy over all samples of the batches. BatchNorm uses each batch's own
    statistics (at initialisation there are no others yet); everything else is in evaluation mode, so nothing is random.

    Raises:
        ConfigError: no batches, or labels that are no classes of the network.
        TicketError: a mask of another network.
    """
    found = own_batches(batches, "snip")
    tensors, weights = substitutes(model, masks)
    with evaluating(model, batch_statistics=True):
        gradient = _mean_gradient(model, tensors, weights, found, temperature=1.0)
    return {name: (weight.detach() * slope).abs() for name, weight, slope in zip(masks, weights, gradient, strict=True)}


def grasp(model: nn.Module, masks: Masks, batches: Batches, *, temperature: float = 200.0) -> Scores:
    """``w ⊙ (H g)``: how much gradient flow the weight carries (Wang et al. 2020).

    Removing the weight changes the squared norm of the gradient g by about twice ``-w (H g)``, the paper's score S(-w);
    it removes the largest, so here the sign is turned. g and the Hessian H are of the mean cross-entropy over all
    samples, of logits divided by ``temperature``, with respect to the masked weights; H g comes from differentiating
    twice. BatchNorm as in :func:`snip`.

    Raises:
        ConfigError: no batches, or labels that are no classes of the network.
        TicketError: a mask of another network.
    """
    found = own_batches(batches, "grasp")
    tensors, weights = substitutes(model, masks)
    product = [torch.zeros_like(weight) for weight in weights]
    samples = sum(len(labels) for _, labels in found)
    with evaluating(model, batch_statistics=True):
        gradient = _mean_gradient(model, tensors, weights, found, temperature)
        for images, labels in found:
            loss = summed_loss(run(model, tensors, (images,)), labels, temperature)
            slopes = torch.autograd.grad(loss / samples, weights, create_graph=True, materialize_grads=True)
            along = sum(((slope * fixed).sum() for slope, fixed in zip(slopes, gradient, strict=True)), torch.zeros(()))
            for total, part in zip(product, torch.autograd.grad(along, weights, materialize_grads=True), strict=True):
                total += part
    return {name: weight.detach() * bent for name, weight, bent in zip(masks, weights, product, strict=True)}


def synflow(model: nn.Module, masks: Masks, example_inputs: tuple[torch.Tensor, ...]) -> Scores:
    """Synaptic flow ``|w| · ∂R/∂|w|``, R the output's sum of the linearised network on all-ones input (Tanaka 2020).

    Linearised: every parameter by its absolute value, biases and BatchNorm's shift zero, BatchNorm in evaluation mode
    with running mean zero, so that it only scales by ``|γ| / √(σ² + ε)``. With rectifiers the network is then linear
    in each layer's weights and conserves flow: layers that carry all of it have equal sums of scores. (The public code
    keeps ``|b|`` of biases, which breaks that.) In float64: R overflows float32 in deep networks.

    Args:
        example_inputs: positional inputs; only shapes and devices matter.

    Returns:
        float64 scores.

    Raises:
        TicketError: layers that normalise by what flows through them, or a mask of another network.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm | nn.modules.instancenorm._InstanceNorm):
            raise TicketError(
                f"SynFlow on a network with {type(part).__name__} ({name!r})",
                expected="a network that normalises with BatchNorm only; other norms hide how much flows",
                fix="choose another source, for example 'magnitude' or 'snip'",
            )
    tensors, _ = substitutes(model, masks)
    shifts = {name for name in tensors if name.endswith(("bias", "running_mean"))}
    linear = {
        name: (torch.zeros_like(t) if name in shifts else t.detach().abs()).double() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    flowing = [linear[name].requires_grad_() for name in masks]
    samples = [x[:1] for x in example_inputs]  # one is enough
    ones = tuple(torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x for x in samples)
    with evaluating(model):
        outputs = floating(run(model, linear, ones))
        total = sum((output.sum() for output in outputs), torch.zeros((), dtype=torch.float64))
        slopes = torch.autograd.grad(total, flowing, materialize_grads=True)
    return {name: weight.detach() * slope for name, weight, slope in zip(masks, flowing, slopes, strict=True)}


def _mean_gradient(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    weights: list[torch.Tensor],
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    temperature: float,
) -> list[torch.Tensor]:
    """Gradient of the mean cross-entropy over all samples of all batches."""
    total = [torch.zeros_like(weight) for weight in weights]
    samples = sum(len(labels) for _, labels in batches)
    for images, labels in batches:
        loss = summed_loss(run(model, tensors, (images,)), labels, temperature)
        slopes = torch.autograd.grad(loss / samples, weights, materialize_grads=True)
        for mean, slope in zip(total, slopes, strict=True):
            mean += slope
    return total
