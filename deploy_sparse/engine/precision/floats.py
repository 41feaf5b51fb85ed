"""fp16 and bf16: the float32 graph with its tensors in another floating-point format.

Inputs and outputs of the graph stay float32, as those of torch programs do. Which inputs and outputs of an operator may
be in the format is read from ONNX's own definitions of operators, so the result is valid ONNX by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...errors import BuildError
from .graph import opset_of, types_of

CODES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
OPSETS: Mapping[str, int] = {"fp16": 13, "bf16": 22}
"""Versions of ONNX's operators from which on convolutions and what is around them exist in the format."""

_TYPE_STRINGS = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_LARGEST = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
_MASK = float(np.finfo(np.float32).max)


def low_type(precision: str) -> np.dtype:
    """NumPy's type of ``"fp16"`` or ``"bf16"``."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(CODES[precision]))


def in_format(model: onnx.ModelProto, precision: str, kept: Set[str], *, simulated: bool = False) -> onnx.ModelProto:
    """The graph with everything in a lower precision but the nodes in ``kept``, with casts between the two.

    Args:
        model: a prepared float32 graph.
        precision: ``"fp16"`` or ``"bf16"``.
        kept: names of nodes that stay in float32.
        simulated: leave every tensor float32 and round it to the format after each operator instead, which runs where
            no kernels for the format are; sums within an operator are then in float32, as on tensor cores.

    Raises:
        BuildError: a weight is too large for the format.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    types = types_of(found)
    floats = {name for name, code in types.items() if code == TensorProto.FLOAT}
    writer = _Writer(found, precision, simulated, floats)
    for node in model.graph.node:
        writer.add(node, _no_roles() if node.name in kept else _roles(node, opset_of(model), floats, precision))
    return writer.finished()


@dataclass(frozen=True)
class _Roles:
    """Which inputs and outputs of a node are in the lower precision; its other floats are float32."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def _no_roles() -> _Roles:
    return _Roles(frozenset(), frozenset())


def _roles(node: onnx.NodeProto, opset: int, floats: Set[str], precision: str) -> _Roles:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:  # another domain's operator: nothing is known of it
        return _no_roles()
    allowed = {entry.type_param_str: set(entry.allowed_type_strs) for entry in schema.type_constraints}
    inputs = [schema.inputs[min(index, len(schema.inputs) - 1)].type_str for index in range(len(node.input))]
    outputs = [schema.outputs[min(index, len(schema.outputs) - 1)].type_str for index in range(len(node.output))]
    low_in = {
        index
        for index, name in enumerate(node.input)
        if name in floats and _TYPE_STRINGS[precision] in allowed.get(inputs[index], set())
    }
    bound = {inputs[index] for index in low_in}
    low_out = {index for index, name in enumerate(node.output) if name in floats and outputs[index] in bound}
    return _Roles(frozenset(low_in), frozenset(low_out))


@dataclass
class _Writer:
    """Collects the nodes of the converted graph, and the casts between its two formats."""

    model: onnx.ModelProto
    precision: str
    simulated: bool
    floats: Set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    low: set[str] = field(default_factory=set)  # tensors in the lower precision
    casts: dict[tuple[str, bool], str] = field(default_factory=dict)  # (tensor, to low): its other form
    weights: dict[str, TensorProto] = field(default_factory=dict)
    low_weights: dict[str, list[tuple[onnx.NodeProto, int]]] = field(default_factory=dict)  # where they are read
    high_weights: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.high_weights = {value.name for value in graph.output if value.name in self.weights}
        self.taken = {t.name for t in graph.initializer} | {value.name for value in graph.input}
        self.taken |= {name for node in graph.node for name in (*node.input, *node.output, node.name)}

    def add(self, given: onnx.NodeProto, roles: _Roles) -> None:
        """Add a node whose inputs were added before it."""
        node = onnx.NodeProto()
        node.CopyFrom(given)
        as_it_comes = node.op_type in ("Cast", "Shape", "Size")  # take any type, and give the same for each
        roles = _no_roles() if as_it_comes else roles
        for index, name in enumerate(node.input):
            if name in self.weights:
                if index in roles.inputs:
                    self.low_weights.setdefault(name, []).append((node, index))
                else:
                    self.high_weights.add(name)
            elif name in self.floats and not as_it_comes:
                node.input[index] = self._as(name, index in roles.inputs)
        self.nodes.append(node)
        for index in roles.outputs:
            name = node.output[index]
            self.low.add(name)
            if self.simulated:
                node.output[index] = self._fresh(f"{name}_exact")
                self._cast(node.output[index], name, low=True)

    def _as(self, name: str, low: bool) -> str:
        """The tensor in the format asked for; a cast is made once."""
        if (name in self.low) == low or (self.simulated and not low):
            return name
        if (name, low) not in self.casts:
            other = self._fresh(f"{name}_{self.precision if low else 'fp32'}")
            self.casts[name, low] = other
            self._cast(name, other, low=low)
        return self.casts[name, low]

    def _cast(self, source: str, result: str, *, low: bool) -> None:
        to = CODES[self.precision] if low else TensorProto.FLOAT
        middle = self._fresh(f"{result}_rounded") if self.simulated else result
        self._add_cast(source, middle, to)
        if self.simulated:
            self._add_cast(middle, result, TensorProto.FLOAT)

    def _add_cast(self, source: str, result: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [result], self._fresh(f"cast_{result}"), to=to))

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def finished(self) -> onnx.ModelProto:
        """The converted model, with float32 outputs."""
        graph = self.model.graph
        self._narrow_weights(graph)
        for value in graph.output:
            if value.name in self.low and not self.simulated:
                inner = self._fresh(f"{value.name}_{self.precision}")
                _rename(self.nodes, value.name, inner)
                self._add_cast(inner, value.name, TensorProto.FLOAT)
        del graph.node[:]
        graph.node.extend(self.nodes)
        del graph.value_info[:]
        return self.model

    def _narrow_weights(self, graph: onnx.GraphProto) -> None:
        """A weight that is read in one format only keeps its name; one that is read in both gets a copy."""
        for name, places in self.low_weights.items():
            narrow = _narrowed(self.weights[name], self.precision, [node.name for node, _ in places], self.simulated)
            if name in self.high_weights:
                narrow.name = self._fresh(f"{name}_{self.precision}")
                graph.initializer.append(narrow)
                for node, index in places:
                    node.input[index] = narrow.name
            else:
                self.weights[name].CopyFrom(narrow)


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _narrowed(tensor: TensorProto, precision: str, readers: list[str], simulated: bool) -> TensorProto:
    """A weight in the format. The lowest and largest float32, which stand for "none" in masks, become the format's.

    Raises:
        BuildError: another of its entries is beyond the format's range.
    """
    exact = numpy_helper.to_array(tensor)
    kind = low_type(precision)
    with np.errstate(over="ignore"):
        values = np.asarray(exact.astype(kind))
    lost = np.isinf(values.astype(np.float32)) & np.isfinite(exact)
    if (lost & (np.abs(exact) < _MASK)).any():
        worst, reader = float(np.abs(exact[lost]).max()), readers[0]
        others = "; or build in bf16, which has the range of fp32" if precision == "fp16" else ""
        raise BuildError(
            f"weight {tensor.name!r} of node {reader!r} reaches {worst:.4g}, and {precision} ends at "
            f"{_LARGEST[precision]:.4g}",
            expected=f"weights that fit {precision}",
            fix=f"leave its layer in fp32: exclude {reader!r}{others}",
        )
    if lost.any():
        values = np.where(lost, np.copysign(_LARGEST[precision], exact), exact).astype(kind)
    if simulated:
        return numpy_helper.from_array(values.astype(np.float32), tensor.name)
    return helper.make_tensor(tensor.name, CODES[precision], exact.shape, values.tobytes(), raw=True)
