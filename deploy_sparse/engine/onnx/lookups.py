"""Norms and activations moved before look-ups and concatenations, where runtimes fuse them with the layer that writes.

A packed layer puts its channels in order, or joins its blocks, behind the convolution (``Gather``, ``Concat``); what
follows would run by itself, and in ONNX Runtime in a slower layout. Both work on each channel alone, so they may come
first.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, count

import numpy as np
import onnx
from onnx import numpy_helper

_ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Clip"})
_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_BLANK = (1.0, 0.0, 0.0, 1.0)  # scale, shift, mean and variance of a norm that changes nothing


def lookups_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function; ``model`` is changed and returned.

    Moved is what alone reads a look-up along axis 1, or a concatenation along it whose parts have no other reader.
    Nothing is in a graph with branches or loops, whose bodies may read any value outside of them.
    """
    if any(attribute.type in _BODIES for node in model.graph.node for attribute in node.attribute):
        return model
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        graph.settle_(node)
    if graph.moved:
        graph.write_()
    return model


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {x.name: x for x in graph.initializer}
        self.widths = {
            value.name: value.type.tensor_type.shape.dim[1].dim_value
            for value in graph.value_info
            if len(value.type.tensor_type.shape.dim) > 1
        }
        self.writer = {name: node for node in graph.node for name in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)
        self.taken = {*self.readers, *self.writer, *self.constants, *(node.name for node in graph.node)}
        self.moved = False

    def settle_(self, node: onnx.NodeProto) -> None:
        """Move a node as far forward as it may be."""
        before = self.writer.get(node.input[0]) if node.input else None
        if before is None or self.readers[node.input[0]] > 1 or not self._on_channels_alone(node):
            return
        parts = self._parts(node, before)
        if parts is None:
            return
        self.moved = True
        del self.writer[before.output[0]]
        before.output[:] = node.output
        self.writer[node.output[0]] = before
        for place, others in enumerate(parts):
            self.settle_(self._early(node, before, place, others))

    def write_(self) -> None:
        """Put the nodes into the model, each behind what it reads."""
        ordered: dict[int, onnx.NodeProto] = {}
        for value in self.graph.output:
            self._order_(self.writer.get(value.name), ordered)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered.values()]
        read = {name for node in nodes for name in node.input}
        written = {name for node in nodes for name in node.output}
        values = [value for value in self.graph.value_info if value.name in written]
        for field, kept in (
            (self.graph.node, nodes),
            (self.graph.value_info, values),
            (self.graph.initializer, [x for name, x in self.constants.items() if name in read]),
        ):
            copies = [type(x).FromString(x.SerializeToString()) for x in kept]
            del field[:]
            field.extend(copies)

    def _order_(self, node: onnx.NodeProto | None, ordered: dict[int, onnx.NodeProto]) -> None:
        waiting = [(node, False)]
        while waiting:
            current, ready = waiting.pop()
            if current is None or id(current) in ordered:
                continue
            if ready:
                ordered[id(current)] = current
                continue
            waiting.append((current, True))
            waiting.extend((self.writer.get(name), False) for name in reversed(current.input))

    def _on_channels_alone(self, node: onnx.NodeProto) -> bool:
        if not all(name in self.constants for name in node.input[1:] if name):
            return False
        if node.op_type == "BatchNormalization":
            training = any(each.name == "training_mode" and each.i for each in node.attribute)
            return not training and len(node.output) == 1
        return node.op_type in _ACTIVATIONS

    def _parts(self, node: onnx.NodeProto, before: onnx.NodeProto) -> list[list[str]] | None:
        """For each input of ``before`` that takes the node, the node's other inputs there; None where it must stay."""
        axis = next((each.i for each in before.attribute if each.name == "axis"), 0)
        bounds = [] if node.op_type == "BatchNormalization" else list(node.input[1:])  # numbers for all channels
        norm = [] if bounds else [numpy_helper.to_array(self.constants[name]) for name in node.input[1:]]
        if before.op_type == "Gather" and axis == 1 and self.readers[before.input[0]] == 1:
            looked = self.constants.get(before.input[1])
            order = None if looked is None else numpy_helper.to_array(looked)
            wide = self.widths.get(before.input[0], 0)
            if order is None or order.ndim != 1 or (norm and len({*order.tolist(), *range(wide)}) > wide):
                return None
            if norm and len(np.unique(order)) < len(order):
                return None  # one channel would need several norms
            spread = [_spread(x, order, wide, blank) for x, blank in zip(norm, _BLANK, strict=False)]
            return [bounds + [self._constant(x) for x in spread]]
        if before.op_type == "Concat" and axis == 1 and all(self.readers[name] == 1 for name in before.input):
            widths = [self.widths.get(name, 0) for name in before.input]
            if not norm:
                return [bounds for _ in widths]
            if not all(widths):
                return None
            ends = list(accumulate(widths))
            return [[self._constant(x[end - wide : end]) for x in norm] for end, wide in zip(ends, widths, strict=True)]
        return None

    def _early(self, node: onnx.NodeProto, before: onnx.NodeProto, place: int, others: list[str]) -> onnx.NodeProto:
        """The node on one input of ``before``."""
        early, source = onnx.NodeProto(), before.input[place]
        early.CopyFrom(node)
        early.name = self._name(node.name or node.op_type)
        early.input[:] = [source, *others]
        early.output[:] = [self._name(source)]
        before.input[place] = early.output[0]
        self.readers[early.output[0]] += 1
        self.writer[early.output[0]] = early
        self.widths[early.output[0]] = self.widths.get(source, 0)
        return early

    def _constant(self, numbers: np.ndarray) -> str:
        name = self._name("moved")
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(numbers), name)
        return name

    def _name(self, start: str) -> str:
        """A name that nothing has or had: what was known of the old value, as its width, is not true of the new one."""
        name = next(each for number in count(1) if (each := f"{start}_{number}") not in self.taken)
        self.taken.add(name)
        return name


def _spread(numbers: np.ndarray, order: np.ndarray, wide: int, blank: float) -> np.ndarray:
    """``numbers`` ``[len(order)]`` at the places ``order`` of ``wide``, with ``blank`` elsewhere."""
    full = np.full(wide, blank, numbers.dtype)
    full[order] = numbers
    return full
