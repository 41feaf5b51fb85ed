"""Regroup: the entries of an unstructured ticket gathered into dense blocks (Chen et al. 2022, section 3.3).

Rows of a layer whose non-zeros lie in similar columns form a group, the columns worth it make the group a dense block,
and everything outside blocks goes. A pure function of masks and weights; needs no external program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import TicketError, nearest
from ..structure import ChannelGroup, Masks
from .regrouping.blocks import find_blocks, smallest_block
from .regrouping.report import LayerReport, Outcome, layer_table, report_layer, total
from .regrouping.rule import RegroupRule
from .regrouping.table import Block, table_of
from .silence import silence

__all__ = ["LayerReport", "RegroupRule", "Regrouped", "layer_table", "regroup"]


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
) -> Regrouped:
    """Block masks from unstructured ones.

    Every row of a weight is in one block or empty, and inside a block every entry survives: what the mask had pruned
    there is trainable again, which costs nothing since a block runs dense. A layer with one input channel (a depthwise
    convolution, the first layer of a grey image) has no columns to choose and stays dense, as does one that nothing was
    pruned from, unless the rule says how much goes. No layer is left partly filled: see ``layers``.

    Args:
        masks: unstructured masks; those of one dimension (biases, norms) are made anew where the groups know them, else
            handed on. Leave out convolutions in groups between 1 and the number of channels: a column is not one
            channel there.
        weights: the trained weights by name.
        groups: the network's channel groups. With them, what an empty row leaves without a purpose is masked too, and
            blocks are formed without input channels that no layer writes any more.
        rule: :class:`RegroupRule`, the paper's Algorithm 3 by default.
        silent: whether to do so when ``groups`` are given.

    Raises:
        TicketError: a mask without its weight, or of another shape.
    """
    rule = rule or RegroupRule()
    names = [name for name, mask in masks.items() if mask.dim() > 1]
    for name in names:
        _refuse_misfit(name, masks[name], weights)
    given = {name: masks[name].detach().cpu() for name in names}
    usable = {name: torch.ones(mask.shape[1], dtype=torch.bool) for name, mask in given.items()}  # input channels
    formed = {name: _form_layer(given[name], weights[name], usable[name], rule) for name in names}
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
            formed[name] = _form_layer(given[name], weights[name], usable[name], rule)
    reports = tuple(
        report_layer(
            name, weights[name].cpu(), given[name], result[name].cpu(), formed[name].outcome, formed[name].reason
        )
        for name in names
    )
    return Regrouped(result, reports)


@dataclass(frozen=True)
class _Formed:
    mask: torch.Tensor
    outcome: Outcome
    reason: str = ""


def _form_layer(mask: torch.Tensor, weight: torch.Tensor, usable: torch.Tensor, rule: RegroupRule) -> _Formed:
    whole = torch.ones_like(mask)
    if mask.shape[1] == 1:
        return _Formed(whole, "dense", "it reads one input channel: no columns to choose")
    if bool(mask.all()) and not (rule.density or (rule.blocks == "disjoint" and rule.parts)):
        return _Formed(whole, "dense", "nothing was pruned")
    table, columns = table_of(mask, weight.detach().cpu(), usable, rule)
    if not len(columns):
        return _Formed(whole, "dense", "no layer writes its input channels any more")
    found = find_blocks(table, rule)
    blocks: tuple[Block, ...] = found.blocks
    outcome: Outcome = "blocks"
    if not blocks:
        if rule.empty == "dense":
            return _Formed(whole, "dense", found.reason)
        blocks, outcome = (smallest_block(table, rule),), "pruned"
    cells = torch.zeros(len(mask), table.whole, table.taps, dtype=torch.bool)
    for rows, chosen in blocks:
        cells[rows[:, None], columns[chosen]] = True
    formed = cells.reshape(mask.shape)
    if bool(formed.all()):
        return _Formed(formed, "dense", "its blocks would be the whole layer")
    return _Formed(formed, outcome, found.reason)


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
