"""Norms and activations go before look-ups and concatenations, and nothing else changes."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.engine.onnx.lookups import lookups_last
from deploy_sparse.engine.onnx.runtime import OrtSession


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Draft:
    """A small graph of convolutions, look-ups, norms and activations."""

    def __init__(self, channels: int) -> None:
        self.nodes, self.constants, self.values = [], [], []
        self.widths = {"input": channels}
        self.channels = channels

    def constant(self, numbers) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(numbers), name))
        return name

    def node(self, kind: str, inputs: list[str], wide: int, **attributes) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        self.widths[name] = wide
        self.values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", wide, 5, 5]))
        return name

    def conv(self, source: str, wide: int) -> str:
        weight = self.constant(draw((wide, self.widths[source], 1, 1), len(self.nodes)))
        return self.node("Conv", [source, weight], wide)

    def gather(self, source: str, order, axis: int = 1) -> str:
        wide = len(order) if axis == 1 else self.widths[source]
        return self.node("Gather", [source, self.constant(np.array(order, np.int64))], wide, axis=axis)

    def norm(self, source: str) -> str:
        wide, seed = self.widths[source], len(self.nodes)
        numbers = [draw(wide, seed), draw(wide, seed + 1), draw(wide, seed + 2), np.abs(draw(wide, seed + 3)) + 0.5]
        return self.node("BatchNormalization", [source, *map(self.constant, numbers)], wide)

    def model(self, *results: str) -> onnx.ModelProto:
        shape = lambda name: ["batch", self.widths[name], 5, 5]  # noqa: E731
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape(name)) for name in results]
        entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", self.channels, 5, 5])
        inner = [value for value in self.values if value.name not in results]
        graph = helper.make_graph(self.nodes, "g", [entry], outputs, self.constants, value_info=inner)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


def kinds(model):
    return [node.op_type for node in model.graph.node]


def moved(model):
    """The model after the pass, checked to be valid and to compute the same."""
    after = onnx.ModelProto()
    after.CopyFrom(model)
    after = lookups_last(after)
    onnx.checker.check_model(after, full_check=True)
    x = draw((2, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value, 5, 5), 99)
    first, second = (OrtSession(m.SerializeToString()).run({"input": x}) for m in (model, after))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4, atol=1e-4)
    return after


def test_a_norm_and_an_activation_go_before_a_look_up():
    d = Draft(3)
    y = d.node("Relu", [d.norm(d.gather(d.conv("input", 6), [4, 0, 5, 2]))], 4)
    assert kinds(moved(d.model(y))) == ["Conv", "BatchNormalization", "Relu", "Gather"]


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (0.0,), (None, 0.5)])
def test_a_clip_keeps_its_bounds(bounds):
    """ReLU6, as exporters write it."""
    d = Draft(3)
    limits = ["" if bound is None else d.constant(np.float32(bound)) for bound in bounds]
    y = d.node("Clip", [d.gather(d.conv("input", 6), [4, 0, 5, 2]), *limits], 4)
    z = d.node("Clip", [d.node("Concat", [y, d.conv("input", 3)], 7, axis=1), *limits], 7)
    found = kinds(moved(d.model(z)))
    assert found[-1] == "Concat"
    assert found.count("Clip") == 3
    assert found.index("Gather") > found.index("Clip")
    d = Draft(3)
    looked = d.gather(d.conv("input", 4), [3, 2, 1, 0])
    limit = d.node("ReduceMax", ["input"], 1, keepdims=0)  # no constant
    d.values = [value for value in d.values if value.name != limit]
    before = d.model(d.node("Clip", [looked, "", limit], 4))
    assert moved(before) == before


def test_each_part_of_a_concatenation_gets_its_share():
    d = Draft(3)
    joined = d.node("Concat", [d.conv("input", 2), d.conv("input", 5)], 7, axis=1)
    y = d.node("Relu", [d.norm(d.gather(joined, [6, 5, 4, 3, 2, 1, 0]))], 7)
    found = kinds(moved(d.model(y)))
    assert found[-2:] == ["Concat", "Gather"]
    assert sorted(found[:-2]) == ["BatchNormalization"] * 2 + ["Conv"] * 2 + ["Relu"] * 2


def test_an_activation_goes_before_a_look_up_that_repeats_channels_and_a_norm_does_not():
    d = Draft(3)
    repeated = d.gather(d.conv("input", 4), [1, 1, 3, 0, 2])
    assert kinds(moved(d.model(d.node("Relu", [repeated], 5)))) == ["Conv", "Relu", "Gather"]
    d = Draft(3)
    repeated = d.gather(d.conv("input", 4), [1, 1, 3, 0, 2])
    assert kinds(moved(d.model(d.norm(repeated)))) == ["Conv", "Gather", "BatchNormalization"]


@pytest.mark.parametrize("who", ["source", "look-up", "output"])
def test_nothing_moves_that_others_read_before_it(who):
    d = Draft(3)
    source = d.conv("input", 4)
    looked = d.gather(source, [3, 2, 1, 0])
    y = d.node("Relu", [looked], 4)
    other = {"source": d.conv(source, 2), "look-up": d.conv(looked, 2), "output": looked}[who]
    before = d.model(y, other)
    assert moved(before) == before


def test_look_ups_along_other_axes_and_dense_graphs_stay_to_the_byte():
    d = Draft(3)
    y = d.node("Relu", [d.norm(d.gather(d.conv("input", 4), [4, 0, 1, 3, 2], axis=2))], 4)
    before = d.model(y)
    assert moved(before).SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_parts_of_a_concatenation_that_have_other_readers_are_not_computed_twice():
    d = Draft(3)
    first, second = d.conv("input", 2), d.conv("input", 3)
    y = d.norm(d.node("Concat", [first, second], 5, axis=1))
    before = d.model(y, d.conv(first, 2))
    assert moved(before) == before


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_chains_compute_the_same(data):
    d = Draft(4)
    values = ["input"]
    for _ in range(data.draw(st.integers(2, 9))):
        kind = data.draw(st.sampled_from(["conv", "gather", "norm", "Relu", "Sigmoid", "join"]))
        source = data.draw(st.sampled_from(values[-2:]))
        if kind == "conv":
            values.append(d.conv(source, data.draw(st.integers(1, 6))))
        elif kind == "gather":
            order = data.draw(st.lists(st.integers(0, d.widths[source] - 1), min_size=1, max_size=6))
            values.append(d.gather(source, order))
        elif kind == "norm":
            values.append(d.norm(source))
        elif kind == "join":
            other = data.draw(st.sampled_from(values))
            values.append(d.node("Concat", [source, other], d.widths[source] + d.widths[other], axis=1))
        else:
            values.append(d.node(kind, [source], d.widths[source]))
    moved(d.model(*dict.fromkeys(values[-2:] if values[-2] != "input" else values[-1:])))


@pytest.mark.parametrize("kind", ["Concat", "Gather"])
def test_a_name_that_a_value_had_is_not_given_to_another(kind):
    """Exporters number values as the pass does, so that what moves may be called as what it passes was."""
    d = Draft(3)
    if kind == "Concat":
        inner = d.node("Concat", [d.conv("input", 2), d.conv("input", 3)], 5, axis=1)
        outer = d.node("Concat", [inner, d.conv("input", 4)], 9, axis=1)
    else:
        inner = d.gather(d.conv("input", 6), [5, 3, 0])
        outer = d.gather(inner, [1, 0])
    before = d.model(d.node("Relu", [outer], d.widths[outer]))
    named = {outer: f"{inner}_1"}
    for each in (*before.graph.node, *before.graph.value_info):
        if isinstance(each, onnx.NodeProto):
            each.input[:] = [named.get(name, name) for name in each.input]
            each.output[:] = [named.get(name, name) for name in each.output]
        else:
            each.name = named.get(each.name, each.name)
    found = kinds(moved(before))
    assert found[-1] == kind
    assert found.count("Relu") == found.count("Conv")


def test_a_graph_with_branches_stays_as_it_is():
    """A branch reads the convolution too, which no input of a node says."""
    d = Draft(3)
    conv = d.conv("input", 4)
    y = d.node("Relu", [d.gather(conv, [3, 2, 1, 0])], 4)
    result = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
    bodies = {
        name: helper.make_graph([helper.make_node(kind, [conv], ["inside"])], name, [], [result])
        for name, kind in (("then_branch", "Neg"), ("else_branch", "Identity"))
    }
    z = d.node("If", [d.constant(np.array(True))], 4, **bodies)
    before = d.model(y, z)
    assert moved(before) == before
