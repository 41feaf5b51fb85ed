"""Masks for random networks: which channels are emptied and how, what must go then, and how results are compared."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from random_graphs import TRACED, RandomNetwork
from random_pieces import Rows
from surgery_nets import masked
from torch import nn

from deploy_sparse.structure import ChannelGroup, Slice
from deploy_sparse.surgery import channel_groups, compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.ties import copied, ties


@dataclass(frozen=True)
class Drops:
    """Channels to empty, by group name, and the rows of every weight that must shrink which survive that."""

    channels: Mapping[str, frozenset[int]]
    survive: Mapping[str, int]


def drops(network: RandomNetwork, groups: Sequence[ChannelGroup], seed: int, least: int = 1) -> Drops:
    """Draw some channels of every group that can be narrowed; at least ``least``, at most two thirds.

    Weights that lie as grids lose whole coordinates, the same ones in all weights of a piece that name the same axes.

    Raises:
        AssertionError: a weight that must shrink belongs to no group, to a pinned one, or its grid does not fit it.
    """
    rng, must, tied = random.Random(seed), network.shrinks(), ties(network.state_dict())
    rows = [(tied.get(part.name, part.name), group, part) for group in groups for part in written(group)]
    found = {name: [(g, part) for first, g, part in rows if first == tied.get(name, name)] for name in must}
    for name, own in found.items():
        assert own, f"{name} belongs to no channel group"
        for group, _ in own:
            assert group.pinned is None, f"{name} is pinned: {group.pinned}"
    channels: dict[str, set[int]] = {}
    for names in _together({name: rows for name, rows in must.items() if rows.axes}).values():
        parts = [(group, part, must[name]) for name in names for group, part in found[name]]
        fitting = [axis for axis in parts[0][2].axes if all(_fits(part, rows, axis) for _, part, rows in parts)]
        assert fitting, f"{names}: the groups' channels are no coordinates of {list(parts[0][2].axes)}"
        axis = rng.choice(sorted(fitting))
        first = parts[0][2]
        gone = _some(rng, range(first.shape[first.axes[axis]]), least)
        for group, part, rows in parts:
            own = {c for c, at in zip(part.channels, _coordinates(rows, axis), strict=True) if c >= 0 and at in gone}
            channels.setdefault(group.name, set()).update(own)
    for group in groups:
        if group.pinned is None and group.name not in channels:
            channels[group.name] = _some(rng, range(group.size), least)
    survive = {name: _surviving(own, channels) for name, own in found.items()}
    return Drops({name: frozenset(gone) for name, gone in channels.items()}, survive)


def written(group: ChannelGroup) -> list[Slice]:
    """The group's rows: of the weights that write its channels, and of depthwise filters."""
    return [*(producer.weight for producer in group.producers), *group.shared]


def _together(gridded: Mapping[str, Rows]) -> dict[tuple[str, ...], list[str]]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, rows in gridded.items():
        alike.setdefault((".".join(name.split(".")[:2]), *sorted(rows.axes)), []).append(name)
    return alike


def _coordinates(rows: Rows, axis: str) -> list[int]:
    """Each row's coordinate along a grid axis."""
    number = rows.axes[axis]
    inner = math.prod(rows.shape[number + 1 :])
    return [row // inner % rows.shape[number] for row in range(math.prod(rows.shape))]


def _fits(part: Slice, rows: Rows, axis: str) -> bool:
    """Is every channel of the group at one coordinate?"""
    at: dict[int, set[int]] = {}
    for channel, coordinate in zip(part.channels, _coordinates(rows, axis), strict=True):
        at.setdefault(channel, set()).add(coordinate)
    return all(len(coordinates) == 1 for channel, coordinates in at.items() if channel >= 0)


def _some(rng: random.Random, population: Sequence[int], least: int) -> set[int]:
    most = len(population) * 2 // 3  # what is left should still compute something
    return set(rng.sample(list(population), rng.randint(min(least, most), most)))


def _surviving(own: Sequence[tuple[ChannelGroup, Slice]], channels: Mapping[str, set[int]]) -> int:
    gone = {row for group, part in own for row, channel in enumerate(part.channels) if channel in channels[group.name]}
    return len(own[0][1].channels) - len(gone)


def masks_for(
    network: nn.Module, groups: Sequence[ChannelGroup], gone: Mapping[str, frozenset[int]], live: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Masks that empty the channels ``gone``; of the groups named in ``live`` only rows of weights, not what follows."""
    state, masks = network.state_dict(), {}
    for group in groups:
        parts = group.slices() if group.name not in live else written(group)
        for part in parts:
            if part in group.statistics or (group.name in live and state[part.name].dim() < 2):
                continue
            mask = masks.setdefault(part.name, torch.ones_like(state[part.name], dtype=torch.bool))
            positions = [i for i, channel in enumerate(part.channels) if channel in gone.get(group.name, ())]
            mask.index_fill_(part.dim, torch.tensor(positions, dtype=torch.int64), False)
    return masks


def scattered(network: nn.Module, density: float, seed: int) -> dict[str, torch.Tensor]:
    """Random single entries of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(p.shape, generator=generator) < density for n, p in network.named_parameters()}
    return {n: mask if mask.any() else ~mask for n, mask in masks.items()}


def both(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What survives both masks; a weight that none would survive of keeps the left ones."""
    masks = {**right, **left}
    for name in left.keys() & right.keys():
        together = left[name] & right[name]
        masks[name] = together if together.any() else left[name]
    return masks


def ticket_of(network: nn.Module, masks: Mapping[str, torch.Tensor]) -> Ticket:
    """A ticket with the network's weights; tied ones stay one tensor, and their masks one mask."""
    weights = copied(network.state_dict())
    tied, shared = ties(weights), {}
    for name, mask in masks.items():
        first = tied.get(name, name)
        shared[first] = shared.get(first, True) & mask
    everywhere = {name: shared[tied.get(name, name)] for name in weights if tied.get(name, name) in shared}
    return Ticket(weights, everywhere, ModelRef("user factory", {}, TRACED[1:]), Provenance("test"))


def difference(left: nn.Module, right: nn.Module, shape: tuple[int, ...] = TRACED) -> float:
    """``max|Δ| / max|y|`` in float64, the largest of any output; on copies, in the modes the modules are in."""
    x = samples(shape)
    with torch.no_grad():
        expected, found = (copy.deepcopy(module).double()(x) for module in (left, right))
    if isinstance(expected, torch.Tensor):
        expected, found = {"": expected}, {"": found}
    assert expected.keys() == found.keys()
    return max(float((found[k] - y).abs().max() / y.abs().max()) for k, y in expected.items())


def samples(shape: tuple[int, ...]) -> torch.Tensor:
    """Noise that differs in its mean from sample to sample, so that something is left of it behind global pooling."""
    generator = torch.Generator().manual_seed(shape[-1])
    means = torch.randn(*shape[:2], 1, 1, generator=generator, dtype=torch.float64)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 4 * means


def stale(module: nn.Module) -> list[str]:
    """Sizes that layers hold as attributes and that are not those of their weights, one line each."""
    lines = []
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        sizes = tuple(weight.shape)
        if isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            wanted = {"in_channels": sizes[0], "out_channels": sizes[1] * part.groups}
        elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            wanted = {"out_channels": sizes[0], "in_channels": sizes[1] * part.groups}
        elif isinstance(part, nn.Linear):
            wanted = {"out_features": sizes[0], "in_features": sizes[1]}
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d):
            wanted = {"num_features": sizes[0]}
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            wanted = {"normalized_shape": sizes}
        elif isinstance(part, nn.GroupNorm):
            wanted = {"num_channels": sizes[0]}
        elif isinstance(part, nn.PReLU):
            wanted = {"num_parameters": sizes[0]}
        else:
            continue
        lines += [f"{name}.{k} {getattr(part, k)}, not {v}" for k, v in wanted.items() if getattr(part, k) != v]
    return lines


X = torch.randn(TRACED, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def factory():
    """A plain network, for what is no matter of its kind."""
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def given(module, masks):
    """A ticket with the very masks given, none made for tied names."""
    weights = ticket_of(module, {}).weights
    return Ticket(weights, masks, ModelRef("user factory", {}, TRACED[1:]), Provenance("test"))


def half(module, x=X):
    """A ticket that empties every second channel of every group that can be narrowed, with all that belongs to it."""
    groups = channel_groups(module, x)
    gone = {group.name: frozenset(range(0, group.size, 2)) for group in groups if group.pinned is None}
    return ticket_of(module, masks_for(module, groups, gone, frozenset()))


def cut(made, make, x=X):
    """The compact network, equal to the masked one and without stale attributes."""
    result = compact(made, make, x)
    assert difference(masked(make, made), result.module, tuple(x.shape)) <= 1e-10
    assert stale(result.module) == []
    return result
