"""fp16 and bf16: types of the converted graph, what stays in float32, and what it computes in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from precision_samples import NETWORKS, conv_and_norm, elements, exported_network, images, model_of

from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.engine.precision.graph import opset_of, prepared
from deploy_sparse.engine.precision.names import matching, names_of
from deploy_sparse.engine.precision.reading import layer_formats
from deploy_sparse.engine.precision.stage import lowered
from deploy_sparse.errors import BuildError

NAMES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
STEP = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # relative rounding


def load(data: bytes) -> onnx.ModelProto:
    return onnx.load_model_from_string(data)


def outputs(data: bytes, x: np.ndarray) -> np.ndarray:
    return OrtSession(data).run({"input": x})["output"]


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_lowered_between_float32_borders(name: str, precision: str) -> None:
    source = exported_network(name)
    found = lowered(source.read(), precision)
    model = load(found.data)
    formats = layer_formats(model)
    assert set(formats.values()) == {precision}
    assert found.report["layers"] == {precision: len(formats)}
    assert len(formats) == len(layer_formats(load(source.read())))
    types = elements(model)
    assert {types[value.name] for value in (*model.graph.input, *model.graph.output)} == {"FLOAT"}
    assert set(types.values()) <= {NAMES[precision], "FLOAT", "INT64", "BOOL"}
    large = [t for t in model.graph.initializer if "weight" in t.name and len(t.dims) > 1]
    assert large
    assert {TensorProto.DataType.Name(t.data_type) for t in large} == {NAMES[precision]}
    assert opset_of(model) >= (22 if precision == "bf16" else 20)
    assert lowered(source.read(), precision).data == found.data


@pytest.mark.parametrize("name", NETWORKS)
def test_fp16_computes_the_same_in_onnx_runtime(name: str) -> None:
    source = exported_network(name)
    found = lowered(source.read(), "fp16")
    x = images()
    exact = outputs(source.read(), x)
    assert 0 < gap(exact, outputs(found.data, x)) < 20 * STEP["fp16"]
    assert 0 < gap(exact, outputs(found.compared, x)) < 20 * STEP["fp16"]


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_as_simulated(name: str) -> None:
    """The rounding must be there (fp16's would be smaller) and nothing else may."""
    source = exported_network(name)
    x = images()
    exact, rounded = outputs(source.read(), x), outputs(lowered(source.read(), "bf16").compared, x)
    assert STEP["bf16"] / 8 < gap(exact, rounded) < 20 * STEP["bf16"]
    assert set(elements(load(lowered(source.read(), "bf16").compared)).values()) >= {"BFLOAT16", "FLOAT"}


def test_simulation_rounds_to_the_very_numbers() -> None:
    model = model_of([helper.make_node("Mul", ["input", "w"], ["output"])], {"w": np.float32([1.1, 3.3, 5.5, 1e-3])})
    x = np.float32([[1.2345, -2.3456, 0.1, 7.0]])
    import ml_dtypes

    for precision, kind in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        low = x.astype(kind).astype(np.float32) * np.float32([1.1, 3.3, 5.5, 1e-3]).astype(kind).astype(np.float32)
        expected = low.astype(kind).astype(np.float32)
        simulated = outputs(lowered(model.SerializeToString(), precision).compared, x)
        np.testing.assert_array_equal(simulated, expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_statistics_stay_in_float32(precision: str) -> None:
    found = lowered(exported_network("attention").read(), precision)
    model = load(found.data)
    types = elements(model)
    by_type: dict[str, set[str]] = {}
    for node in model.graph.node:
        by_type.setdefault(node.op_type, set()).update(types[name] for name in node.output)
    for operator in ("Softmax", "LayerNormalization", "Sqrt", "ReduceMean"):
        assert "FLOAT" in by_type[operator], operator
    for operator in ("Softmax", "LayerNormalization", "Sqrt"):
        assert by_type[operator] == {"FLOAT"}
    reasons = found.report["in_fp32"]
    assert reasons["Softmax"] == reasons["LayerNormalization"] == 1
    assert reasons["sum of squares"] >= 2  # the mean, and the addition of an epsilon


def test_rms_norm_of_large_and_of_tiny_numbers_in_fp16() -> None:
    """Squares beyond 65504 and an epsilon below the least fp16: float32 within, as it should be."""
    nodes = [
        helper.make_node("Mul", ["input", "input"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["mean"]),
        helper.make_node("Add", ["mean", "epsilon"], ["safe"]),
        helper.make_node("Sqrt", ["safe"], ["root"]),
        helper.make_node("Div", ["input", "root"], ["normed"]),
        helper.make_node("Mul", ["normed", "gain"], ["output"]),
    ]
    weights = {"axes": np.int64([-1]), "epsilon": np.float32(1e-9), "gain": np.float32([1, 2, 3, 4])}
    model = model_of(nodes, weights)
    found = lowered(model.SerializeToString(), "fp16")
    x = np.float32([[300, -600, 900, 1], [0, 0, 0, 0]])
    for data in (found.data, found.compared):
        assert gap(outputs(model.SerializeToString(), x), outputs(data, x)) < 2 * STEP["fp16"]


def test_excluded_by_node_by_module_and_by_pattern() -> None:
    source = exported_network("resnet").read()
    everything = layer_formats(load(lowered(source, "fp16").data))
    cases = {"layer1": 3, "layer*.conv2": 2, "head": 1, "layer2.shortcut": 1}
    for pattern, count in cases.items():
        found = lowered(source, "fp16", exclude=(pattern,))
        formats = layer_formats(load(found.data))
        assert sorted(formats.values()) == ["fp16"] * (len(everything) - count) + ["fp32"] * count
        assert {name for name, built in formats.items() if built == "fp32"} <= {*found.report["excluded"]}
    node = next(iter(everything))
    found = lowered(source, "bf16", exclude=(node,))
    assert layer_formats(load(found.data))[node] == "fp32"
    assert found.report["excluded"] == [node]
    x = images()
    for pattern in ("layer1", "head"):
        assert gap(outputs(source, x), outputs(lowered(source, "fp16", exclude=(pattern,)).data, x)) < 20 * STEP["fp16"]


def test_linear_layers_of_attention_are_found_by_their_modules() -> None:
    source = exported_network("attention").read()
    for module in ("qkv", "proj", "fc1", "fc2", "head"):
        formats = layer_formats(load(lowered(source, "fp16", exclude=(module,)).data))
        assert [*formats.values()].count("fp32") == 1, module


def test_pattern_that_means_nothing() -> None:
    with pytest.raises(
        BuildError, match=r"exclude has 'layer1\.conv3', which no layer(.|\n)*did you mean 'layer1\.conv[12]'"
    ):
        lowered(exported_network("resnet").read(), "fp16", exclude=("layer1.conv3",))


def test_weight_beyond_fp16_is_named_and_fits_bf16() -> None:
    data = conv_and_norm(1e5).SerializeToString()
    with pytest.raises(
        BuildError, match=r"weight 'conv\.weight' of node 'the_conv' reaches .*e\+05, and fp16 ends at 6\.55e\+04"
    ) as caught:
        lowered(data, "fp16")
    assert "exclude 'the_conv'" in caught.value.fix
    assert "bf16" in caught.value.fix
    lowered(data, "bf16")
    with pytest.raises(BuildError, match="asked for fp16, but of 1 layers none is fp16"):
        lowered(data, "fp16", exclude=("the_conv",))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_masks_of_the_lowest_number_become_the_lowest_of_the_format(precision: str) -> None:
    lowest = float(np.finfo(np.float32).min)
    nodes = [
        helper.make_node("Greater", ["input", "zero"], ["seen"]),
        helper.make_node("Where", ["seen", "input", "none"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["output"]),
    ]
    model = model_of(nodes, {"zero": np.float32(0), "none": np.float32(lowest)})
    x = np.float32([[1, -1, 2, -3]])
    found = lowered(model.SerializeToString(), precision)
    np.testing.assert_allclose(outputs(found.compared, x), outputs(model.SerializeToString(), x), atol=1e-2)
    tensor = next(t for t in load(found.data).graph.initializer if t.name == "none")
    value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    assert np.isfinite(value)
    assert value < -6e4


def test_norms_are_folded_and_the_convolution_keeps_its_name() -> None:
    model = conv_and_norm()
    x = np.random.default_rng(1).standard_normal((2, 2, 8, 8)).astype(np.float32)
    for precision in ("fp16", "bf16"):
        found = lowered(model.SerializeToString(), precision)
        operators = [node.op_type for node in load(found.data).graph.node]
        assert "BatchNormalization" not in operators
        assert layer_formats(load(found.data)) == {"the_conv": precision}
        assert gap(outputs(model.SerializeToString(), x), outputs(found.compared, x)) < 8 * STEP[precision]
    assert matching(names_of(prepared(model).graph), ("conv",)) == {"the_conv"}


def test_constants_as_nodes_and_weights_that_two_formats_read() -> None:
    constant = helper.make_tensor("", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=constant),
        helper.make_node("MatMul", ["input", "w"], ["a"], "low"),
        helper.make_node("MatMul", ["a", "w"], ["output"], "high"),
    ]
    model = model_of(nodes, {})
    found = lowered(model.SerializeToString(), "fp16", exclude=("high",))
    assert layer_formats(load(found.data)) == {"low": "fp16", "high": "fp32"}
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_array_equal(outputs(found.data, x), x)


def test_resizing_keeps_its_scales_and_counting_its_integers() -> None:
    nodes = [
        helper.make_node("Resize", ["input", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Shape", ["large"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("ReduceProd", ["sizes"], ["count"], keepdims=0),
        helper.make_node("Div", ["large", "count"], ["output"]),
    ]
    shapes = {"shape": ("n", 1, 4, 4), "out_shape": ("n", 1, 300, 300)}
    model = model_of(nodes, {"scales": np.float32([1, 1, 75, 75])}, **shapes)
    found = lowered(model.SerializeToString(), "fp16")
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    exact = outputs(model.SerializeToString(), x)  # 90,000 entries: more than fp16 can count
    assert exact.max() > 0
    assert gap(exact, outputs(found.data, x)) < 2 * STEP["fp16"]


def test_graph_without_layers_and_graph_with_branches() -> None:
    model = model_of([helper.make_node("Relu", ["input"], ["output"])], {})
    assert lowered(model.SerializeToString(), "fp16").report["layers"] == {}
    branch = helper.make_graph(
        [helper.make_node("Neg", ["input"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, ["n", 4])]
    )
    nodes = [helper.make_node("If", ["yes"], ["output"], "choice", then_branch=branch, else_branch=branch)]
    with pytest.raises(BuildError, match=r"node 'choice' \(If\) holds a graph of its own"):
        lowered(model_of(nodes, {"yes": np.bool_(True)}).SerializeToString(), "fp16")


UNARY = ("Relu", "Tanh", "Softmax", "Exp", "Identity", "Neg", "Sigmoid")
BINARY = ("Add", "Mul", "Sub", "Max")


@given(
    st.lists(st.tuples(st.sampled_from(UNARY + BINARY), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_graph_stays_valid_and_close(steps: list[tuple[str, int, int]], data: st.DataObject) -> None:
    tensors, nodes = ["input", "w"], []
    for index, (operator, first, second) in enumerate(steps):
        reads = [tensors[first % len(tensors)], tensors[second % len(tensors)]][: 2 if operator in BINARY else 1]
        bounded = f"t{index}" if operator not in ("Exp", "Mul") else f"raw{index}"
        nodes.append(helper.make_node(operator, reads, [bounded], f"node{index}"))
        if operator in ("Exp", "Mul"):  # keep numbers near one
            nodes.append(helper.make_node("Tanh", [bounded], [f"t{index}"], f"bound{index}"))
        tensors.append(f"t{index}")
    nodes.append(helper.make_node("Add", [tensors[-1], "input"], ["output"], "last"))
    model = model_of(nodes, {"w": np.float32([0.5, -1, 2, 0.25])}).SerializeToString()
    kept = data.draw(st.lists(st.sampled_from([node.name for node in nodes[:-1]]), max_size=3, unique=True))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    found = lowered(model, "fp16", exclude=kept)
    exact = outputs(model, x)
    for graph in (found.data, found.compared):
        np.testing.assert_allclose(outputs(graph, x), exact, atol=2.0 ** (len(steps) - 8), rtol=0.05)
