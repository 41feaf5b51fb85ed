"""Which layer every node of an ONNX graph belongs to, by a name that stays when the network is cut or packed.

Exported weights keep the path of their module (``stages.0.0.conv1.weight``); names of nodes have numbers that differ
between the dense and the packed network. So a layer is called by the path of its weights, nodes that read no weights
belong to the layer that they serve, and the rest are called by what they do behind which layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx

from ..inspection import LayerInfo
from .nodes import nodes_of

Part = Literal["product", "behind", "look-up", "other"]
HEAVY = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul",
})  # fmt: skip
_BEHIND = frozenset({
    "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish",
    "Elu", "Selu", "Celu", "Gelu", "Erf", "Softplus", "Mish", "BatchNormalization", "QuantizeLinear",
    "DequantizeLinear", "Cast", "Identity", "Max", "Min",
})  # fmt: skip
_LOOKED_UP = frozenset({"Gather", "Split"})
_NUMBER = re.compile(r" \(\d+\)$")
_BYTES = {"fp64": 8, "int64": 8, "fp32": 4, "int32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Owned:
    """A node of the graph.

    Attributes:
        node: kind, shapes and multiply-accumulates, of one sample.
        layer: path of its module, or what it does and behind which layer.
        part: ``"product"``: the convolution or matrix product itself. ``"behind"``: additions, norms and activations of
            what a layer writes. ``"look-up"``: gathers, splits and joins the channels of a packed layer. ``"other"``:
            everything else.
        shape: of a product, for people: ``"64→128 3×3"``.
        counts: of a product: channels that one of its outputs is a sum of, and channels that it writes.
        activations: bytes of inputs and outputs for one sample.
        weights: bytes of them.
    """

    node: LayerInfo
    layer: str
    part: Part
    shape: str = ""
    counts: tuple[int, int] | None = None
    activations: int = 0
    weights: int = 0


def owners_of(graph: bytes, extents: Mapping[str, int]) -> tuple[Owned, ...]:
    """Every node with the layer that it belongs to, in order.

    Args:
        graph: bytes of an ONNX file.
        extents: of dynamic axes other than the batch, by name.

    Raises:
        ArtifactError: no ONNX file.
    """
    infos = nodes_of(graph, extents)
    return _Owners(inlined(onnx.load_model_from_string(graph)).graph, infos).found


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own, as runtimes run it."""
    from onnx.inliner import inline_local_functions

    return inline_local_functions(model) if model.functions else model


def named(graph: onnx.GraphProto) -> list[tuple[str, onnx.NodeProto]]:
    """Nodes by name; one without a name is called by its operator and its place."""
    return [(node.name or f"{node.op_type}_{index}", node) for index, node in enumerate(graph.node)]


def path_of(name: str) -> str | None:
    """The module's path in the name of one of its tensors, for example ``a.b`` of ``a.b.weight`` and ``a.b.weights.0``;
    None where the name has none."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1]) or None


class _Owners:
    def __init__(self, graph: onnx.GraphProto, infos: tuple[LayerInfo, ...]) -> None:
        self.nodes = [node for _, node in named(graph)]
        self.infos = infos
        self.weights: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.writer = {value: i for i, node in enumerate(self.nodes) for value in node.output if value}
        self.readers: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for writer in self._writers(node):
                self.readers.setdefault(writer, []).append(i)
        self.written = {value.name for value in graph.output}
        self.owner: dict[int, tuple[str, Part]] = {}
        self.used: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            if node.op_type in HEAVY and (path := self._product_path(i)):
                self.owner[i] = (path, "product")
        for i, node in enumerate(self.nodes):
            if i not in self.owner:
                self.owner[i] = self._unnamed(i) if node.op_type in HEAVY else self._light(i)
        self.found = tuple(self._owned(i) for i in range(len(self.nodes)))

    def _writers(self, node: onnx.NodeProto) -> Iterator[int]:
        return (self.writer[value] for value in node.input if value in self.writer)

    def _product_path(self, i: int) -> str | None:
        """By its weight; a weight that the exporter turned has lost its name, then by the bias that is added next."""
        weight = self._weight(i)
        if weight is not None and (path := path_of(weight.name)):
            return path
        readers = self.readers.get(i, [])
        if weight is not None and len(readers) == 1 and self.nodes[readers[0]].op_type == "Add":
            return self._own_path(readers[0])
        return None

    def _weight(self, i: int) -> onnx.TensorProto | None:
        """What a product multiplies by, where that is constant; behind a node that only scales or turns it, too."""
        for value in self.nodes[i].input[1:2]:
            if value in self.weights:
                return self.weights[value]
            if value in self.writer:
                inputs = self.nodes[self.writer[value]].input
                if inputs and all(other in self.weights for other in inputs if other):
                    return self.weights[inputs[0]]
        return None

    def _unnamed(self, i: int) -> tuple[str, Part]:
        """A product without a path: by its name, if that is not one with a number of the exporter's."""
        node = self.nodes[i]
        if node.name and not node.name.startswith("node_") and self._weight(i) is not None:
            return node.name, "product"
        return self._label(node, self._before(node)), "product"

    def _own_path(self, i: int) -> str | None:
        return next((path for v in self.nodes[i].input if v in self.weights and (path := path_of(v))), None)

    def _before(self, node: onnx.NodeProto) -> list[tuple[str, Part]]:
        return [self.owner[w] for w in sorted(self._writers(node)) if w in self.owner]

    def _light(self, i: int) -> tuple[str, Part]:
        """The layer of a node that is no product; those before it have theirs."""
        node = self.nodes[i]
        before = self._before(node)
        layers = [(layer, part) for layer, part in before if part != "other"]
        own = self._own_path(i)
        if own is not None and not (node.op_type in _BEHIND and layers and layers[-1][0] == own):
            return own, "other"
        if node.op_type in _LOOKED_UP and (reader := self._reading_layer(i)) is not None:
            return reader, "look-up"
        if node.op_type in _LOOKED_UP and len(layers) == 1 and self._looks_up(node):
            return layers[0][0], "look-up"
        if node.op_type == "Concat" and layers and len(layers) == len(before) and len({x for x, _ in layers}) == 1:
            return layers[0][0], "look-up"
        if node.op_type in _BEHIND and layers:
            return layers[-1][0], "behind"
        return self._label(node, before), "other"

    def _looks_up(self, node: onnx.NodeProto) -> bool:
        """Whether it takes channels in an order that is known."""
        if node.op_type != "Gather" or len(node.input) < 2 or node.input[1] not in self.weights:
            return False
        return len(self.weights[node.input[1]].dims) == 1

    def _reading_layer(self, i: int) -> str | None:
        """The one layer whose products read nothing but this look-up, or splits of it."""
        node = self.nodes[i]
        readers = self.readers.get(i, [])
        if not readers or any(value in self.written for value in node.output):
            return None
        if node.op_type == "Gather" and not self._looks_up(node):
            return None
        layers: set[str | None] = set()
        for reader in readers:
            other = self.nodes[reader]
            if other.op_type in HEAVY and other.input[0] in node.output:
                layers.add(self.owner[reader][0] if reader in self.owner else None)
            elif other.op_type == "Split":
                layers.add(self._reading_layer(reader))
            else:
                return None
        return layers.pop() if len(layers) == 1 else None

    def _label(self, node: onnx.NodeProto, before: list[tuple[str, Part]]) -> str:
        behind = before[0][0] if before else "the input"
        label = f"{node.op_type} behind {_NUMBER.sub('', behind).rpartition(' behind ')[2]}"
        self.used[label] = self.used.get(label, 0) + 1
        return label if self.used[label] == 1 else f"{label} ({self.used[label]})"

    def _owned(self, i: int) -> Owned:
        node, info = self.nodes[i], self.infos[i]
        layer, part = self.owner[i]
        activations = sum(
            math.prod(t.shape) * _BYTES.get(t.precision or "", 1)
            for t in (*info.inputs, *info.outputs)
            if t.shape and min(t.shape) >= 0
        )
        weight = self._weight(i) if part == "product" else None
        if weight is None:
            return Owned(info, layer, part, activations=activations)
        size = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        shape, counts = _shape(node, weight)
        return Owned(info, layer, part, shape, counts, activations, math.prod(weight.dims) * size)


def _shape(node: onnx.NodeProto, weight: onnx.TensorProto) -> tuple[str, tuple[int, int] | None]:
    """A product's shape for people, and how many channels each of its outputs reads and how many it writes."""
    dims = list(weight.dims)
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv" and len(dims) > 2:  # [out, in / groups, *kernel]
        groups = flags.get("group", 1)
        kernel = "×".join(map(str, dims[2:]))
        parts = f", {groups} groups" if groups > 1 else ""
        return f"{dims[1] * groups}→{dims[0]} {kernel}{parts}", (dims[1], dims[0])
    if node.op_type in ("Gemm", "MatMul") and len(dims) == 2:
        read, written = reversed(dims) if flags.get("transB") else dims
        return f"{read}→{written}", (read, written)
    return "", None
