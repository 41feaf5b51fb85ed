"""Masks at a given density without training in between: the sources of Chen et al. 2022, section 5 and Fig. 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError, nearest
from ..structure import Masks
from . import entry_scores
from ._passes import Batches
from .distribution import Distribution, densities
from .patterns import unstructured
from .schedule import SCHEDULES

Source = Literal["random", "magnitude", "snip", "grasp", "synflow"]
SOURCES: tuple[Source, ...] = get_args(Source)
STEPS: Mapping[str, int] = {"synflow": 100}
"""Sources that score again and again while they prune (at once, SynFlow cuts the network in two), and how often."""


def source_masks(
    source: str,
    model: nn.Module,
    masks: Masks,
    density: float | Mapping[str, float],
    *,
    batches: Batches = (),
    example_inputs: tuple[torch.Tensor, ...] = (),
    seed: int = 0,
    distribution: Distribution = "global",
    steps: int | None = None,
    schedule: str = "exponential",
) -> dict[str, torch.Tensor]:
    """Unstructured masks from one source.

    * ``"random"``: by lot.
    * ``"magnitude"``: the smallest weights of ``model`` go; of a trained network, one-shot magnitude pruning (OMP).
    * ``"snip"``, ``"grasp"``, ``"synflow"``: :mod:`entry_scores`, at initialisation.

    Every layer keeps at least its best weight: SynFlow would switch whole branches of residual networks off, which it
    does not count as collapse, and SNIP single layers.

    Args:
        source: one of these.
        model: the network with the weights to score; it is left as it was.
        masks: what may survive at most, all-True from :func:`imp.dense_masks` as a rule.
        density: surviving share of all entries of ``masks``; with ``distribution="layer"`` by weight name.
        batches: data for ``"snip"`` and ``"grasp"``, on the model's device; the authors of GraSP take ten images of
            each class.
        example_inputs: for ``"synflow"``: positional inputs, of which the shapes count.
        seed: for ``"random"``.
        distribution: how the density is spread over the layers, see :func:`distribution.densities`.
        steps: how often to score and prune; by default as the source's paper does: 100 times for SynFlow, once for the
            others.
        schedule: how the density falls over the steps: ``"exponential"``, ``"cubic"`` or ``"one_shot"``, all at the
            first step; see :mod:`schedule`.

    Returns:
        masks on the given masks' devices.

    Raises:
        ConfigError: an unknown source, distribution or schedule, a density out of range, or missing batches or inputs.
        TicketError: fewer weights than layers, weights that are not finite, or another network's masks.
    """
    if source not in SOURCES:
        raise ConfigError(
            f"unknown source of masks {source!r}",
            expected=f"one of {', '.join(SOURCES)}",
            fix=f"{nearest(source, SOURCES)}mend the name",
        )
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"unknown schedule {schedule!r}",
            expected=f"one of {', '.join(SCHEDULES)}",
            fix=f"{nearest(schedule, list(SCHEDULES))}mend the name",
        )
    if source == "synflow" and not example_inputs:
        raise ConfigError(
            "source 'synflow' without example inputs",
            expected="positional inputs of the network, batch first",
            fix="pass example_inputs=(x,)",
        )
    count = STEPS.get(source, 1) if steps is None else steps
    shapes = {name: mask.shape for name, mask in masks.items()}
    shares = [densities(shapes, own, distribution) for own in _falling(density, count, schedule)]
    held = list(batches)
    found = dict(masks)
    for share in shares:
        scores = _scores(source, model, found, held, example_inputs, seed)
        found = unstructured(scores, found, share, spare_best=True)
    return found


def _falling(density: float | Mapping[str, float], steps: int, schedule: str) -> Sequence[float | dict[str, float]]:
    """The density after each step, of the whole or layer by layer."""
    if not isinstance(density, Mapping):
        return SCHEDULES[schedule](density, steps)
    layers = {name: SCHEDULES[schedule](own, steps) for name, own in density.items()}
    return [{name: own[number] for name, own in layers.items()} for number in range(steps)]


def _scores(
    source: str,
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    example_inputs: tuple[torch.Tensor, ...],
    seed: int,
) -> dict[str, torch.Tensor]:
    if source == "random":
        return entry_scores.random(masks, seed)
    if source == "magnitude":
        return entry_scores.magnitude(dict(model.named_parameters()), masks)
    if source == "synflow":
        return entry_scores.synflow(model, masks, example_inputs)
    return (entry_scores.snip if source == "snip" else entry_scores.grasp)(model, masks, batches)
