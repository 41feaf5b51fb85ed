"""Dynamic sparse training for a network and a training loop of the caller's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import get_args

import torch

from .errors import ConfigError, nearest
from .sparsify.channel_schedule import ChannelSchedule
from .sparsify.chase import Chase
from .sparsify.coupling import Coupling, channel_pools
from .sparsify.dst import DynamicMasks, Spread, initial_masks
from .sparsify.exploration import PRESETS, Exploration, Preset
from .sparsify.imp import dense_masks, head_of
from .sparsify.umm import CHANNEL_SCORES
from .surgery.cost import layer_macs
from .surgery.graph import Inputs, as_tuple, channel_groups


def dynamic_sparsity(
    model: torch.nn.Module,
    example_inputs: Inputs,
    *,
    steps: int,
    density: float = 0.1,
    channels: float = 0.0,
    exploration: Preset | Exploration = "chase",
    interval: int | None = None,
    epoch: int | None = None,
    coupling: Coupling = "internal",
    criterion: str = "umm",
    floor: float = 0.2,
    until: float = 0.8,
    distribution: Spread = "erk",
    exclude: str | Sequence[str] = (),
    seed: int = 0,
) -> DynamicMasks:
    """Masks that move while ``model`` is trained; with ``channels`` also Chase's removal of channels (Yin et al. 2023).

    Call ``start_(model)`` once, ``after_backward_(model, step)`` and ``after_step_(model, optimizer, step)`` around
    each optimizer step, counted from 0. At the end ``model.state_dict()`` and ``.masks`` make a ticket; ``.figures()``
    says how sparse it is and what it costs, ``.ready(step)`` whether it is as sparse as asked. For an exact resume save
    ``.state()`` beside weights and optimizer; to continue, call ``start_``, *then* load weights and optimizer, then
    call ``restore_``.

    Args:
        model: any module; for ``channels`` one that ``torch.export`` can trace. It is not changed here.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs, on the model's device.
        steps: optimizer steps of the whole training.
        density: share of the weights of convolutions and Linear layers that may be non-zero at a time.
        channels: S_c, the share of the channels that may go and are gone in the end, in [0, 1).
        exploration: one of :data:`sparsify.exploration.PRESETS` (``"rigl"``, ``"set"``, …), or settings of your own.
        interval: steps between updates, instead of the preset's; channels go as often, half an interval apart.
        epoch: steps of an epoch, which ``"set"`` counts in; ``steps`` by default.
        coupling: ``"internal"``: channels that one layer writes and one reads; ``"prune_skip"``: residual streams too.
        criterion: the channel score, one of :data:`sparsify.umm.CHANNEL_SCORES`.
        floor: β, the least share of its even part that a layer keeps.
        until: share of the training after which no channel goes.
        distribution: how the density is spread over the layers at first.
        exclude: shell patterns of weight names to leave dense.
        seed: of the first masks and of random growth.

    Raises:
        ConfigError: a value out of range, an unknown word, or steps in which nothing would move.
        SurgeryError: the network cannot be traced.
    """
    for name, number, least in (("steps", steps, 2), ("epoch", epoch, 1), ("interval", interval, 1)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            raise ConfigError(
                f"{name} {number!r}", expected=f"a whole number, {least} or more", fix="count optimizer steps"
            )
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed}", expected="0 or more, and below 2^32", fix="choose a smaller one")
    for name, word, known in (
        ("distribution", distribution, get_args(Spread)),
        ("coupling", coupling, get_args(Coupling)),
        ("channel score", criterion, CHANNEL_SCORES),
    ):
        if word not in known:
            raise ConfigError(
                f"unknown {name} {word!r}",
                expected=f"one of {', '.join(known)}",
                fix=f"{nearest(str(word), known)}choose one of them",
            )
    if not 0.0 < until <= 1.0:
        raise ConfigError(
            f"until {until}", expected="a share of the training, in (0, 1]", fix="0.8 leaves a fifth without removals"
        )
    moves = _exploration(exploration, interval, epoch or steps, steps)
    inputs, names = as_tuple(example_inputs), (exclude,) if isinstance(exclude, str) else tuple(exclude)
    prunable = dense_masks(model, exclude=names, head=True)
    first = initial_masks(prunable, density, distribution, seed)
    macs = layer_macs(copy.deepcopy(model).eval(), inputs)  # a pass in training mode would move its norms
    if channels == 0:
        return DynamicMasks(first, moves, distribution=distribution, seed=seed, macs=macs)
    pools = channel_pools(prunable, channel_groups(model, inputs), coupling, head=head_of(model))
    schedule = ChannelSchedule(channels, moves.interval, moves.interval // 2, max(1, round(until * steps)))
    return Chase(
        first,
        moves,
        pools,
        schedule,
        criterion=criterion,
        floor=floor,
        distribution=distribution,
        seed=seed,
        macs=macs,
    )


def _exploration(given: Preset | Exploration, interval: int | None, epoch: int, steps: int) -> Exploration:
    if not isinstance(given, Exploration):
        if given not in PRESETS:
            raise ConfigError(
                f"unknown exploration {given!r}",
                expected=f"one of {', '.join(PRESETS)}, or an Exploration",
                fix=f"{nearest(str(given), list(PRESETS))}mend the name",
            )
        given = PRESETS[given](epoch, steps)
    found = given if interval is None else given.every(interval)
    if found.soft is not None and found.soft.until > steps:
        raise ConfigError(
            f"a soft bound until step {found.soft.until} in a training of {steps}",
            expected="a surplus that is gone before the end",
            fix="SoftBound(…, until=…) within the training",
        )
    if not found.moves(steps):
        raise ConfigError(
            f"updates every {found.interval} steps until step {found.stop}, in a training of {steps}",
            expected="at least one update by which weights grow",
            fix=f"give a shorter interval, for example interval={max(1, min(found.stop, steps) // 20)}",
        )
    return found
