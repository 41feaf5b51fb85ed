"""Convolutions over blocks of channels in a torch program: found in its graph, and run by the block kernel if asked.

Three forms are found, as surgery's packed layers export them: one grouped convolution, one on channels that are looked
up, and one convolution for each block behind its own look-up, joined at the end. A look-up of the rows behind them and
a ReLU go into the kernel too.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..blocks.layout import DTYPES, TILE, BlockLayout, Pair, prepare
from .graph import arguments, constant, mutates, pruned

_ATEN = torch.ops.aten
_LEAST = 8  # rows and columns of a block, below which the kernel would mostly compute padding
_NARROW = 16  # the least that a block's columns can be padded to


@dataclass(frozen=True)
class Site:
    """A convolution over blocks.

    Attributes:
        source: the activations ``[batch, in, height, width]``.
        nodes: what computes it now, in order; the last one is the result.
        weight: dense, ``[rows, in, kernel height, kernel width]``, zero outside of the blocks.
        bias: one a row, or None.
        blocks: rows and input channels of each.
        geometry: stride, padding and dilation, each height and width.
        order: the row of each output channel, or None for all in order.
        relu: whether a ReLU is part of it.
    """

    source: Node
    nodes: tuple[Node, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    blocks: tuple[tuple[list[int], list[int]], ...]
    geometry: tuple[Pair, Pair, Pair]
    order: list[int] | None = None
    relu: bool = False

    @property
    def name(self) -> str:
        """Of the result in the graph."""
        return self.nodes[-1].name

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Of the source, at a batch size."""
        return batch, *(int(size) for size in self.source.meta["val"].shape[1:])

    def layout(self) -> BlockLayout:
        """For the kernel."""
        stride, padding, dilation = self.geometry
        tile = TILE if min(len(columns) for _, columns in self.blocks) >= TILE else _NARROW
        return prepare(
            self.weight,
            self.blocks,
            self.bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            order=self.order,
            tile=tile,
        )

    def native(self, module: GraphModule) -> GraphModule:
        """What computes it now, from its source to its result."""
        graph = Graph()
        known = {self.source: graph.placeholder("x")}

        def copied(node: Node) -> Node:
            if node not in known:
                for each in node.all_input_nodes:  # constants, and what is computed of them, come along
                    copied(each)
                known[node] = graph.node_copy(node, known.__getitem__)
            return known[node]

        graph.output(copied(self.nodes[-1]))
        return GraphModule(module, graph)


class BlockLayer(torch.nn.Module):
    """A site as one call of the kernel."""

    def __init__(self, layout: BlockLayout, *, relu: bool, tf32: bool) -> None:
        super().__init__()
        self.layout, self.relu, self.tf32 = layout, relu, tf32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, in, height, width]`` to ``[batch, out, out height, out width]``, channels-last."""
        from ..blocks.kernel import block_conv2d

        return block_conv2d(x, self.layout, relu=self.relu, tf32=self.tf32)


def find_sites(module: GraphModule) -> list[Site]:
    """The convolutions over blocks, in the order of the graph; none that shares a node with another."""
    found: list[Site] = []
    taken: set[Node] = set()
    graph = module.graph
    joined = graph.find_nodes(op="call_function", target=_ATEN.cat.default)
    for node in (*joined, *graph.find_nodes(op="call_function", target=_ATEN.conv2d.default)):
        site = _joined(module, node, taken) if node in joined else _convolution(module, node, taken)
        if site is None or taken & set(site.nodes) or not _worth_it(site):
            continue
        site = _with_relu(_with_order(module, site, taken))
        taken |= set(site.nodes)
        found.append(site)
    places = {node: place for place, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda site: places[site.nodes[0]])


def replaced(module: GraphModule, layers: Sequence[tuple[Site, BlockLayer]]) -> GraphModule:
    """The module with these sites as layers, without the weights that nothing reads any more."""
    graph = module.graph
    results: dict[Node, Node] = {}  # one layer may be another's source
    for number, (site, layer) in enumerate(layers):
        name = f"_block_layer_{number}"
        module.add_submodule(name, layer)
        with graph.inserting_before(site.nodes[0]):
            call = graph.call_module(name, (results.get(site.source, site.source),))
        call.meta = dict(site.nodes[-1].meta)
        site.nodes[-1].replace_all_uses_with(call)
        results[site.nodes[-1]] = call
        for node in reversed(site.nodes):
            if not node.users:  # a look-up may have other readers
                graph.erase_node(node)
    return pruned(module)


def _convolution(module: GraphModule, node: Node, taken: Set[Node]) -> Site | None:
    """A convolution with constant weights on activations, or on channels of them that are looked up.

    A look-up that is taken stays where it is: it puts another site's rows in order.
    """
    given = arguments(node)
    weight, bias, source = constant(module, given["weight"]), given["bias"], given["input"]
    if bias is not None:
        bias = constant(module, bias)
    if weight is None or (bias is None) != (given["bias"] is None) or not isinstance(source, Node):
        return None
    groups: int = given["groups"]
    nodes: tuple[Node, ...] = (node,)
    looked_up = None if source in taken else _look_up(module, source)
    if looked_up is not None:
        nodes, source = (source, node), source.args[0]
    value = source.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() != 4
        or any(type(size) is not int for size in value.shape[1:])
    ):
        return None
    rows, columns = len(weight) // groups, weight.shape[1]
    index = list(range(value.shape[1])) if looked_up is None else looked_up
    dense = weight.new_zeros(len(weight), int(value.shape[1]), *weight.shape[2:])
    blocks = []
    for group in range(groups):
        read = index[group * columns : (group + 1) * columns]
        part = slice(group * rows, (group + 1) * rows)
        # Channels read twice, as padding is, add up.
        dense[part].index_add_(1, torch.tensor(read, device=weight.device), weight[part].detach())
        blocks.append((list(range(part.start, part.stop)), sorted(set(read))))
    geometry = tuple(_pair(given[name]) for name in ("stride", "padding", "dilation"))
    return Site(source, nodes, dense, bias, tuple(blocks), (geometry[0], geometry[1], geometry[2]))


def _joined(module: GraphModule, node: Node, taken: Set[Node]) -> Site | None:
    """Convolutions of one source whose channels are joined."""
    given = arguments(node)
    parts = given["tensors"]
    if given["dim"] not in (1, -3) or any(x.target is not _ATEN.conv2d.default or len(x.users) > 1 for x in parts):
        return None
    sites = [_convolution(module, part, taken) for part in parts]
    known = [site for site in sites if site is not None]
    if len(known) < len(sites) or len({(site.source, site.geometry, site.weight.shape[2:]) for site in known}) > 1:
        return None
    source = known[0].source
    if len({site.weight.dtype for site in known}) > 1 or any(mutates(user) for user in source.users):
        return None
    blocks: list[tuple[list[int], list[int]]] = []
    start = 0
    for site in known:
        blocks += [([row + start for row in rows], columns) for rows, columns in site.blocks]
        start += len(site.weight)
    biases = [torch.zeros_like(s.weight[:, 0, 0, 0]) if s.bias is None else s.bias for s in known]
    inside = {each for site in known for each in site.nodes}
    nodes = tuple(each for each in module.graph.nodes if each in inside or each is node)
    bias = None if all(site.bias is None for site in known) else torch.cat(biases)
    weight = torch.cat([site.weight for site in known])
    return Site(source, nodes, weight, bias, tuple(blocks), known[0].geometry)


def _worth_it(site: Site) -> bool:
    """Whether there is something to leave out, in blocks that are no slivers."""
    area = sum(len(rows) * len(columns) for rows, columns in site.blocks)
    large = all(len(rows) >= _LEAST and len(columns) >= _LEAST for rows, columns in site.blocks)
    return large and area < site.weight.shape[0] * site.weight.shape[1] and site.weight.dtype in DTYPES


def _with_order(module: GraphModule, site: Site, taken: Set[Node]) -> Site:
    """With the look-up of rows that alone reads it."""
    follower = _only_reader(site)
    if follower is None or follower in taken or follower.args[0] is not site.nodes[-1]:
        return site
    order = _look_up(module, follower)
    if order is None or len(set(order)) < len(order):
        return site
    return replace(site, nodes=(*site.nodes, follower), order=order)


def _with_relu(site: Site) -> Site:
    follower = _only_reader(site)
    if follower is None or follower.target not in (_ATEN.relu.default, _ATEN.relu_.default):
        return site
    return replace(site, nodes=(*site.nodes, follower), relu=True)


def _only_reader(site: Site) -> Node | None:
    users = list(site.nodes[-1].users)
    return users[0] if len(users) == 1 else None


def _look_up(module: GraphModule, node: Node) -> list[int] | None:
    """The channels that the node picks, or None if it does nothing of the kind."""
    if node.target is not _ATEN.index_select.default or node.args[1] not in (1, -3):
        return None
    index = constant(module, node.args[2])
    return None if index is None or index.dim() != 1 else [int(entry) for entry in index.tolist()]


def _pair(value: Any) -> Pair:
    values = [value] * 2 if isinstance(value, int) else [int(entry) for entry in value]
    return values[0], values[-1]
