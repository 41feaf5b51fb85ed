"""Regroup: the entries of an unstructured ticket gathered into dense blocks (Chen et al. 2022, section 3.3).

Rows of a layer whose non-zeros lie in similar columns form a group, the columns worth it make the group a dense block,
and everything outside blocks goes. A pure function of masks and weights; needs no external program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError, TicketError, nearest
from ..structure import MIN_BLOCK_READS, ChannelGroup, Masks
from .regrouping.blocks import find_blocks, smallest_block
from .regrouping.even import Division, divided
from .regrouping.report import LayerReport, Outcome, layer_table, report_layer, total
from .regrouping.rule import RegroupRule
from .regrouping.table import Block, Table, capped_limits, table_of
from .silence import silence

__all__ = ["LayerReport", "RegroupRule", "Regrouped", "grouped_convolutions", "layer_table", "regroup"]


@dataclass(frozen=True)
class Regrouped:
    """Masks of dense blocks, and what became of every layer.

    Attributes:
        masks: by parameter name.
        layers: one report for every regrouped weight, in the masks' order.
    """

    masks: Mapping[str, torch.Tensor]
    layers: tuple[LayerReport, ...]

    @property
    def total(self) -> LayerReport:
        """All layers together."""
        return total(self.layers)


def regroup(
    masks: Masks,
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[ChannelGroup] = (),
    *,
    rule: RegroupRule | None = None,
    silent: bool = True,
    dense: Collection[str] = (),
) -> Regrouped:
    """Block masks from unstructured ones.

    Every row of a weight is in one block or empty, and inside a block every entry survives: what the mask had pruned
    there is trainable again, which costs nothing since a block runs dense. A layer with one input channel (a depthwise
    convolution, the first layer of a grey image) has no columns to choose and stays dense; so does one with fewer than
    4 (the first layer of a colour image) where columns are channels, since it would not run as blocks, and one that
    nothing was pruned from, unless the rule says how much goes. No layer is left partly filled: see ``layers``.

    Args:
        masks: unstructured masks; those of one dimension (biases, norms) are made anew where the groups know them, else
            handed on.
        weights: the trained weights by name.
        groups: the network's channel groups. With them, what an empty row leaves without a purpose is masked too, and
            blocks are formed without input channels that no layer writes any more.
        rule: :class:`RegroupRule`, the paper's Algorithm 3 by default.
        silent: whether to do so when ``groups`` are given.
        dense: names of weights that stay whole, if they have a mask: :func:`grouped_convolutions` of the network.

    Raises:
        TicketError: a mask without its weight, or of another shape.
        ConfigError: a rule that couples layers, without groups.
    """
    rule = rule or RegroupRule()
    names = [name for name, mask in masks.items() if mask.dim() > 1]
    for name in names:
        _refuse_misfit(name, masks[name], weights)
    given = {name: masks[name].detach().cpu() for name in names}
    usable = {name: torch.ones(mask.shape[1], dtype=torch.bool) for name, mask in given.items()}  # input channels
    layers = {name: (given[name], weights[name].detach().cpu(), usable[name]) for name in names}
    alike = _divided_alike(layers, [name for name in names if name not in dense], groups, rule)
    formed = {
        name: _in_groups(given[name]) if name in dense else _form_layer(*layers[name], rule, alike.get(name))
        for name in names
    }
    known = {part.name for group in groups for part in group.slices()} if silent else set()
    others = {name: torch.ones_like(mask) if name in known else mask for name, mask in masks.items()}
    while True:
        result = others | {name: formed[name].mask.to(masks[name].device) for name in names}
        if not silent:
            break
        result = silence(result, weights, groups)
        lost = {name: _lost_channels(formed[name].mask, result[name].cpu()) for name in names}
        stale = [name for name in names if formed[name].outcome != "dense" and bool(lost[name].any())]
        if not stale:
            break
        for name in stale:
            usable[name] &= ~lost[name]
            formed[name] = _form_layer(*layers[name], rule, alike.get(name))
    reports = tuple(
        report_layer(
            name, weights[name].cpu(), given[name], result[name].cpu(), formed[name].outcome, formed[name].reason
        )
        for name in names
    )
    return Regrouped(result, reports)


def grouped_convolutions(model: nn.Module) -> tuple[str, ...]:
    """The weights of convolutions in groups, for ``regroup(dense=…)``; depthwise ones, which it knows, are left out."""
    return tuple(
        f"{name}.weight" if name else "weight"
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and 1 < part.groups < part.in_channels
    )


_Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Mask, weight, and the input channels that blocks may hold, bool."""


@dataclass(frozen=True)
class _Formed:
    mask: torch.Tensor
    outcome: Outcome
    reason: str = ""


def _in_groups(mask: torch.Tensor) -> _Formed:
    reason = "a convolution in groups: its columns are other channels for each group"
    return _Formed(torch.ones_like(mask), "dense", reason)


def _divided_alike(
    layers: Mapping[str, _Layer], names: Collection[str], groups: Sequence[ChannelGroup], rule: RegroupRule
) -> dict[str, Division]:
    """Divisions of rows by weight, where several layers write the same channels.

    Layers of too few input channels to run as blocks, and those that stay whole, are left out: they would only limit
    how the others are divided.

    Raises:
        ConfigError: the rule asks for them, and there are no groups.
    """
    if rule.coupling == "layer":
        return {}
    if not groups:
        raise ConfigError(
            "coupling = 'group' without channel groups",
            expected="the groups of the network, which know what layers write into one residual stream",
            fix="pass groups=channel_groups(network, inputs), or choose coupling = 'layer'",
        )
    found: dict[str, Division] = {}
    for group in groups:
        every = tuple(range(group.size))
        writers = [producer.weight for producer in group.producers]
        own = [w.name for w in writers if w.name in names and w.dim == 0 and w.channels == every]
        own = [n for n in own if layers[n][0].shape[1] >= MIN_BLOCK_READS and not _stays_whole(layers[n][0], rule)]
        if len(own) > 1 and (division := divided([table_of(*layers[name], rule)[0] for name in own], rule)):
            found |= dict.fromkeys(own, division)
    return found


def _stays_whole(mask: torch.Tensor, rule: RegroupRule) -> bool:
    """Whether nothing was pruned and the rule does not say how much goes."""
    return bool(mask.all()) and not (rule.density or (rule.blocks == "disjoint" and rule.parts))


def _form_layer(
    mask: torch.Tensor, weight: torch.Tensor, usable: torch.Tensor, rule: RegroupRule, division: Division | None
) -> _Formed:
    whole = torch.ones_like(mask)
    if mask.shape[1] == 1:
        return _Formed(whole, "dense", "it reads one input channel: no columns to choose")
    if rule.columns == "channel" and mask.shape[1] < MIN_BLOCK_READS:
        return _Formed(whole, "dense", f"it reads {mask.shape[1]} input channels: too few to run as blocks")
    if _stays_whole(mask, rule):
        return _Formed(whole, "dense", "nothing was pruned")
    table, columns = table_of(mask, weight, usable, rule)
    if not len(columns):
        return _Formed(whole, "dense", "no layer writes its input channels any more")
    found, capped = find_blocks(table, rule, division), capped_limits(table, rule)
    reason, prune = found.reason and found.reason + capped, rule.empty == "prune"
    if found.blocks:
        formed = _mask_of(found.blocks, table, columns, mask)
        if not bool(formed.all()):
            return _Formed(formed, "blocks", reason)
        reason, prune = f"its blocks would be the whole layer{capped}", prune and not bool(mask.all())
    if prune:
        formed = _mask_of((smallest_block(table, rule),), table, columns, mask)
        if not bool(formed.all()):
            return _Formed(formed, "pruned", reason)
        reason += ", as would the smallest block allowed"
    return _Formed(whole, "dense", reason)


def _mask_of(blocks: Sequence[Block], table: Table, columns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Bool, shaped like ``mask``: True inside the blocks, whose columns ``columns`` numbers in the layer."""
    cells = torch.zeros(len(mask), table.whole, table.taps, dtype=torch.bool)
    for rows, chosen in blocks:
        cells[rows[:, None], columns[chosen]] = True
    return cells.reshape(mask.shape)


def _lost_channels(formed: torch.Tensor, silenced: torch.Tensor) -> torch.Tensor:
    """Input channels that blocks hold and silence took away, bool ``[c_in]``."""
    had, has = (mask.reshape(*mask.shape[:2], -1).any(dim=2).any(dim=0) for mask in (formed, silenced))
    return had & ~has


def _refuse_misfit(name: str, mask: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
    if name not in weights:
        raise TicketError(
            f"mask {name!r} belongs to no weight",
            expected="masks named like the parameters they mask",
            fix=f"{nearest(name, list(weights))}pass the weights the masks were made for",
        )
    if mask.shape != weights[name].shape:
        raise TicketError(
            f"mask {name!r} has shape {tuple(mask.shape)}, its weight {tuple(weights[name].shape)}",
            expected="a mask shaped like its weight",
            fix="pass the weights the masks were made for",
        )
