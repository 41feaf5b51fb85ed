"""From a narrowed network to one whose layers run as dense blocks.

A layer is packed where its mask is a union of blocks. Its rows then come out block by block, and its blocks may want
input channels side by side; both are arranged by renumbering whole channel groups (:mod:`.order`). A look-up remains
where two layers want different orders of one group, or where the channels are known by number, as a classifier's are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError, nearest
from ..structure import MIN_BLOCK_READS, Blocks, structure_of
from ._nodes import Node
from ._skeleton import with_tensors
from ._substitute import put
from .cost import cost_of
from .graph import channel_groups
from .narrow import pick
from .order import Wish, orders, reordered
from .packed import PackedConv2d, PackedLinear, Packing, packing_of
from .packing import Style, other_style
from .parts import Cut, Order, Pack, Spread
from .plan import Decision
from .spread import spread
from .trace import Traced, layer_of, trace

TILE = 16
Layers = Collection[str] | Mapping[str, Style | None]
"""Paths of layers, and how the blocks of each are computed where that is not left to the packing."""
_LISTED = 8  # layers in a message


@dataclass(frozen=True)
class Candidate:
    """A layer that can be packed.

    Attributes:
        path: of the layer.
        mask: of its weight in the narrowed network, bool, shaped like it.
        read: shape of one sample that it reads.
        written: shape of one sample that it writes.
        style: how its blocks are computed; None: as :func:`packing_of` thinks fastest.
    """

    path: str
    mask: torch.Tensor
    read: tuple[int, ...]
    written: tuple[int, ...]
    style: Style | None = None

    @property
    def weight(self) -> str:
        """The weight's name."""
        return f"{self.path}.weight"

    def packing(self, mask: torch.Tensor) -> Packing:
        """Of its mask, whose channels may have been renumbered."""
        if self.style is None:
            return packing_of(mask, tile=TILE)
        return packing_of(mask, tile=self.style.tile, form=self.style.form)


@dataclass(frozen=True)
class LayerForm:
    """A layer dense and packed, by themselves.

    Attributes:
        path: of the layer.
        dense: as in the narrowed network.
        packed: with the look-ups that the network would leave to it, or to the norm behind it.
        packing: its blocks.
        input_shape: of one sample.
    """

    path: str
    dense: nn.Module
    packed: nn.Module
    packing: Packing
    input_shape: tuple[int, ...]

    @property
    def share(self) -> float:
        """Numbers in blocks over numbers of the dense weight."""
        blocks = sum(len(block.rows) * len(block.columns) for block in self.packing.blocks)
        return blocks / sum(p.numel() for name, p in self.dense.named_parameters() if name == "weight")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, and so of the input."""
        return self.dense.get_parameter("weight").dtype

    def __str__(self) -> str:
        places = [
            place for place, there in (("before", self.packing.gathers), ("after", self.packing.restores)) if there
        ]
        looked = f", look-up {' and '.join(places)}" if places else ", no look-up"
        return f"{len(self.packing.blocks)} {self.packing.form} blocks{looked}"

    @property
    def style(self) -> Style:
        """How its blocks are computed."""
        return Style(self.packing.form, self.packing.tile)

    @property
    def other_style(self) -> Style | None:
        """How else they could be."""
        return other_style(self.packing, tile=TILE)

    def description(self) -> dict[str, Any]:
        """What its time depends on, as JSON values: not the weights, and not which channels are where."""
        sizes = [[len(block.rows), len(block.columns)] for block in self.packing.blocks]
        return {
            "dense": repr(self.dense),
            "packed": repr(self.packed),
            "dtype": str(self.dtype),
            "form": [self.packing.form, self.packing.tile],
            "blocks": sizes,
            "input": list(self.input_shape),
            "lookups": [self.packing.gathers, self.packing.restores],
        }


def layer_forms(
    network: nn.Module,
    masks: Mapping[str, torch.Tensor],
    cuts: Sequence[Cut],
    inputs: tuple[Any, ...],
    only: Layers | None = None,
) -> tuple[LayerForm, ...]:
    """Each layer that can be packed, or of those in ``only``, dense and packed; see :func:`candidates`."""
    found = _chosen(candidates(network, masks, cuts, inputs), only)
    how = arranged(network, inputs, found)
    # What a norm looks up for a layer costs as much as if the layer did.
    packs = tuple(replace(pack, packing=replace(pack.packing, restore=True)) for pack in how.packs)
    whole = packed(network, replace(how, packs=packs, spreads=()))
    return tuple(
        LayerForm(
            each.path,
            network.get_submodule(each.path),
            whole.get_submodule(each.path),
            pack.packing,
            each.read,
        )
        for each, pack in zip(found, packs, strict=True)
    )


def candidates(
    network: nn.Module, masks: Mapping[str, torch.Tensor], cuts: Sequence[Cut], inputs: tuple[Any, ...]
) -> tuple[Candidate, ...]:
    """The layers of a narrowed network whose masks are blocks, in execution order.

    First layers, which read a few channels, are none: their blocks save nothing once padded.

    Args:
        network: the narrowed network.
        masks: of the dense weights, by name.
        cuts: positions that stayed.
        inputs: positional inputs of the network.
    """
    weights = dict(network.named_parameters())
    found = []
    for path, (read, written) in _sizes(network, trace(network, inputs)).items():
        name = f"{path}.weight"
        if name not in masks:
            continue
        weight = weights[name].detach().cpu()
        mask = pick(masks[name].cpu(), [cut for cut in cuts if cut.name == name]) | (weight != 0)
        if isinstance(structure_of(mask), Blocks) and mask.shape[1] >= MIN_BLOCK_READS:
            found.append(Candidate(path, mask, read, written))
    return tuple(found)


@dataclass(frozen=True)
class Arranged:
    """How layers are packed.

    Attributes:
        orders: channels renumbered, before anything else.
        packs: the layers.
        spreads: norms that put rows back into order for the packed layer before them, so that both stay one node.
    """

    orders: tuple[Order, ...] = ()
    packs: tuple[Pack, ...] = ()
    spreads: tuple[Spread, ...] = ()


def arranged(network: nn.Module, inputs: tuple[Any, ...], chosen: Sequence[Candidate]) -> Arranged:
    """New orders of channels for the chosen layers, and the layers packed in them."""
    if not chosen:
        return Arranged()
    packings = {each.weight: each.packing(each.mask) for each in chosen}
    wishes = [wish for each in chosen for wish in _wishes(each, packings[each.weight])]
    changes = list(orders(channel_groups(network, inputs), wishes)) if wishes else []
    masks = reordered({each.weight: each.mask for each in chosen}, [c for c in changes if c.name in packings])
    norms, packs, spreads = _norms_after(network, trace(network, inputs)), [], []
    for each in chosen:
        packing = in_sequence(each.packing(masks[each.weight]))
        norm = norms.get(each.path)
        if norm is not None and packing.restores and -1 not in packing.rows:
            spreads.append(Spread(norm, packing.places))
            packing = replace(packing, restore=False)
            part = network.get_submodule(norm)
            held = {**part._parameters, **part._buffers}
            names = [f"{norm}.{key}" for key, x in held.items() if x is not None and x.dim() == 1]
            changes += [Order(name, 0, packing.rows) for name in names]
        packs.append(Pack(each.path, packing))
    return Arranged(tuple(changes), tuple(packs), tuple(spreads))


def _norms_after(network: nn.Module, traced: Traced) -> dict[str, str]:
    """By path of a layer the BatchNorm that alone reads what it writes, and reads nothing else."""
    own = _sole_calls(network, traced)
    layers = {node: path for path, node in own.items()}
    readers: dict[Node, list[Node]] = {}
    for node in traced.nodes:
        for source in node.all_input_nodes:
            readers.setdefault(source, []).append(node)
    found = {}
    for norm, node in own.items():
        part, source = network.get_submodule(norm), node.args[0]
        if type(part) is nn.BatchNorm2d and not _extended(part) and source in layers and readers[source] == [node]:
            found[layers[source]] = norm
    return found


def in_sequence(packing: Packing) -> Packing:
    """The packing with its blocks in the sequence that spares most look-ups."""
    by_columns = replace(packing, blocks=tuple(sorted(packing.blocks, key=lambda block: block.columns)))
    return min((packing, by_columns), key=lambda p: p.gathers + p.restores)


def packed(network: nn.Module, how: Arranged) -> nn.Module:
    """A copy of a narrowed network with its channels renumbered and its layers packed."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    moved = {change.name: tensors[change.name].detach() for change in how.orders}
    moved = reordered(moved, how.orders)
    made = with_tensors(network, lambda name, x: moved[name] if name in moved else x.clone())
    for entry in how.spreads:
        put(made, entry.module, spread(made.get_submodule(entry.module), entry.places))
    for pack in how.packs:
        layer: Any = made.get_submodule(pack.module)
        put(made, pack.module, _kind(layer).of(layer, pack.packing))
    return made


def shells_(network: nn.Module, packs: Sequence[Pack]) -> None:
    """Put packed layers without memory in the place of a narrowed network's layers."""
    for pack in packs:
        layer: Any = network.get_submodule(pack.module)
        put(network, pack.module, _kind(layer).shell(layer, pack.packing))


def _kind(layer: nn.Module) -> Any:
    return PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d


def with_packed_layers(
    decision: Decision, masks: Mapping[str, torch.Tensor], inputs: tuple[Any, ...], only: Layers | None = None
) -> Decision:
    """A decision with layers packed.

    Args:
        decision: channels cut.
        masks: of the ticket.
        inputs: positional inputs.
        only: paths of the layers to pack, with styles if it is a mapping; all that can be by default.

    Raises:
        SurgeryError: ``only`` names a layer that cannot be packed, or not in that style.
    """
    network = decision.compact
    found = candidates(network, masks, decision.plan.cuts, inputs)
    if only is not None:
        _refuse_others(only, found)
    found = _chosen(found, only)
    if not found:
        why = "no layer that can be packed has a mask of blocks" if only is None else "no layer was asked for"
        said = f"packed: nothing, as {why}"
        return replace(decision, plan=replace(decision.plan, choice=(said,)))
    how = arranged(network, inputs, found)
    compact = packed(network, how)
    before = decision.plan.shape
    shape = replace(before, orders=how.orders, packs=how.packs, spreads=(*before.spreads, *how.spreads))
    plan = replace(decision.plan, shape=shape, cost_after=cost_of(compact, inputs)[0])
    plain = decision.in_float64
    return Decision(plan, decision.dense, compact, None if plain is None else lambda: packed(plain(), how))


def _chosen(found: Sequence[Candidate], only: Layers | None) -> tuple[Candidate, ...]:
    styles: Mapping[str, Style | None] = only if isinstance(only, Mapping) else {}
    wanted = [each for each in found if only is None or each.path in only]
    return tuple(replace(each, style=styles.get(each.path)) for each in wanted)


def _wishes(candidate: Candidate, packing: Packing) -> Iterator[Wish]:
    rows = tuple(block.rows for block in packing.blocks)
    if sum(map(len, rows)) == packing.out_channels:
        yield Wish(candidate.weight, 0, rows, math.prod(candidate.written))
    if packing.form == "disjoint":
        taps = candidate.mask[0, 0].numel()
        columns = tuple(tuple(dict.fromkeys(column // taps for column in b.columns)) for b in packing.blocks)
        if sum(map(len, columns)) == packing.in_channels:
            yield Wish(candidate.weight, 1, columns, math.prod(candidate.read))


def _sizes(network: nn.Module, traced: Traced) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of one sample that each layer that can be packed reads and writes, by path, in execution order."""
    fused = {
        f"{path}.{name}".lstrip(".")
        for path, part in network.named_modules()
        if isinstance(part, nn.TransformerEncoderLayer)  # whose own fast code takes the weights out of them
        for name in ("linear1", "linear2")
    }
    calls = {node: path for path, node in _sole_calls(network, traced).items()}
    found = {}
    for node in traced.calls:
        path = calls.get(node, "")  # a network that is one layer has no place to put another in
        if path and path not in fused and _packable(network.get_submodule(path)):
            source = node.args[0]
            while layer_of(source) == path:  # what it pads by itself
                source = source.args[0]
            read, written = source.meta["val"].shape, node.meta["val"].shape
            if len(read) >= (4 if isinstance(network.get_submodule(path), nn.Conv2d) else 2):  # with a batch axis
                found[path] = tuple(read[1:]), tuple(written[1:])
    return found


def _sole_calls(network: nn.Module, traced: Traced) -> dict[str, Node]:
    """By path of a layer the only operation that takes any of its tensors, where the layer itself does it.

    Layers that share a tensor, or that are called several times, have none.
    """
    users: dict[str, list[Node]] = {}
    for node in traced.calls:
        for source in node.all_input_nodes:
            if source.name in traced.state:
                users.setdefault(traced.state[source.name], []).append(node)
    shared, found = _shared(network), {}
    for path, part in network.named_modules():
        names = [f"{path}.{name}".lstrip(".") for name in (*part._parameters, *part._buffers)]
        calls = {node for name in names for node in users.get(name, ())}
        if len(calls) == 1 and path not in shared:
            (node,) = calls
            if layer_of(node) == path:
                found[path] = node
    return found


def _packable(part: nn.Module) -> bool:
    if _extended(part):
        return False
    return type(part) is nn.Linear or (type(part) is nn.Conv2d and part.groups == 1 and part.in_channels > 1)


def _extended(part: nn.Module) -> bool:
    """Whether its call runs code that is not its class's: hooks, or a forward set on the instance."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _shared(network: nn.Module) -> set[str]:
    """Paths of layers that share a tensor, or are one and the same."""
    owners: dict[int, list[str]] = {}
    for path, part in network.named_modules(remove_duplicate=False):
        for tensor in part._parameters.values():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _refuse_others(only: Collection[str], found: Sequence[Candidate]) -> None:
    known = [each.path for each in found]
    listed = ", ".join(map(repr, known[:_LISTED])) + (f" and {len(known) - _LISTED} more" * (len(known) > _LISTED))
    for path in only:
        if path not in known:
            raise SurgeryError(
                f"layer {path!r} cannot be packed: its mask is no union of blocks, or it is no plain layer",
                expected=f"some of {listed}" if known else "no layer at all",
                fix=f"{nearest(path, known)}leave it out",
            )
