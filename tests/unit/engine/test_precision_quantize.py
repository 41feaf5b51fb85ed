"""int8 and fp8: Q/DQ from ONNX Runtime's quantizer, on data that somebody gave."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_samples import NETWORKS, conv_and_norm, exported_network, images, model_of

from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.engine.precision.calibration import Calibration, read_calibration
from deploy_sparse.engine.precision.quantize import weighted_nodes
from deploy_sparse.engine.precision.reading import layer_formats
from deploy_sparse.engine.precision.stage import Lowered, lowered
from deploy_sparse.engine.tensors import TensorSpec
from deploy_sparse.errors import BuildError, ConfigError

TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def session(graph: bytes) -> onnxruntime.InferenceSession:
    """Runs the graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def load(data: bytes) -> onnx.ModelProto:
    return onnx.load_model_from_string(data)


def data_for(name: str = "resnet") -> Calibration:
    found = read_calibration(images(), exported_network(name).inputs, {})
    assert found is not None
    return found


def quantized(name: str, precision: str, runtime: str = "tensorrt-rtx", exclude: tuple[str, ...] = ()) -> Lowered:
    return lowered(
        exported_network(name).read(), precision, exclude=exclude, calibration=data_for(name), runtime=runtime
    )


def relative_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).mean() / np.abs(ours).mean())


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_with_weights_is_quantized(name: str, precision: str, runtime: str) -> None:
    source = load(exported_network(name).read())
    found = quantized(name, precision, runtime)
    formats = layer_formats(load(found.data))
    weighted = weighted_nodes(source.graph)
    done = {node for node, built in formats.items() if built == precision}
    assert done >= set(weighted)
    assert len(weighted) >= 4
    assert found.report["unquantized"] == sorted(set(formats) - done)
    if name != "attention":
        assert done == set(formats)
    elif runtime != "onnxruntime":  # which takes the product of queries and keys along
        assert found.report["unquantized"] == ["node_matmul", "node_matmul_1"]
    assert found.report["calibration"] == {"source": "the array given", "samples": 32, "sha256": data_for(name).digest}
    x = images(seed=1)
    exact = OrtSession(exported_network(name).read()).run({"input": x})["output"]
    rounded = session(found.data).run(None, {"input": x})[0]
    assert 1e-4 < relative_gap(exact, rounded) < 0.15


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_tensorrt_wants(precision: str) -> None:
    """Symmetric, no quantized biases or results, weights per output channel."""
    model = load(quantized("resnet", precision).data)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero = initializers[node.input[2]]
        assert zero.data_type == TYPES[precision]
        assert not numpy_helper.to_array(zero).astype(np.float32).any()
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            scales = numpy_helper.to_array(initializers[makers[node.input[1]].input[1]])
            channels = next(a.i for a in node.attribute if a.name == "transB") if node.op_type == "Gemm" else 1
            assert channels == 1
            assert scales.ndim == 1
            assert scales.size in (10, 16, 32)
            assert len(set(scales.tolist())) > 1
            assert node.input[2] not in makers  # the bias
    readers = Counter(name for node in model.graph.node for name in node.input)
    assert all(readers[node.output[0]] == 1 for node in pairs)  # a pair for each reader


def test_sums_are_quantized_for_onnx_runtime_only_without_norms() -> None:
    """A transformer's residual sums are not; those of a network of convolutions are."""
    for name, expected in (("resnet", True), ("attention", False)):
        model = load(quantized(name, "int8", "onnxruntime").data)
        makers = {output: node.op_type for node in model.graph.node for output in node.output}
        sums = [node for node in model.graph.node if node.op_type == "Add" and len({*node.input} & {*makers}) == 2]
        assert sums
        read = [all(makers[name] == "DequantizeLinear" for name in node.input) for node in sums]
        assert all(read) if expected else not any(read)


def test_scales_of_fp8_cover_the_range_that_was_seen() -> None:
    eye = np.eye(4, dtype=np.float32)
    model = model_of([helper.make_node("MatMul", ["input", "w"], ["output"], "product")], {"w": 3 * eye})
    x = np.float32([[-7, 1, 2, 3], [0, 0.5, 0.25, 14]])
    calibration = read_calibration([x], [TensorSpec("input", "float32", ("n", 4))], {})
    found = load(lowered(model.SerializeToString(), "fp8", calibration=calibration).data)
    scales = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer if t.name.endswith("_scale")}
    activation = next(value for name, value in scales.items() if name.startswith("input"))
    np.testing.assert_allclose(activation, 14 / 448, rtol=1e-6)
    weight = next(value for name, value in scales.items() if name.startswith("w"))
    np.testing.assert_allclose(weight, np.full(4, 3 / 448), rtol=1e-6)
    np.testing.assert_allclose(session(found.SerializeToString()).run(None, {"input": x})[0], 3 * x, rtol=0.07)


def test_excluded_layers_keep_their_weights() -> None:
    found = quantized("resnet", "int8", exclude=("layer1", "head"))
    formats = layer_formats(load(found.data))
    assert Counter(formats.values()) == {"fp32": 4, "int8": 4}
    assert found.report["layers"] == {"fp32": 4, "int8": 4}
    assert found.report["unquantized"] == sorted(node for node, built in formats.items() if built == "fp32")
    assert set(found.report["unquantized"]) <= set(found.report["excluded"])


@pytest.mark.parametrize(("precision", "opset"), [("int8", 20), ("int8", 11), ("fp8", 17)])
def test_norms_are_folded_before(precision: str, opset: int) -> None:
    calibration = read_calibration(
        np.random.default_rng(0).standard_normal((8, 2, 8, 8)).astype(np.float32),
        [TensorSpec("input", "float32", ("n", 2, 8, 8))],
        {},
    )
    found = lowered(conv_and_norm(opset=opset).SerializeToString(), precision, calibration=calibration)
    assert "BatchNormalization" not in {node.op_type for node in load(found.data).graph.node}
    assert layer_formats(load(found.data)) == {"the_conv": precision}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_missing_calibration_data(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"{precision} without calibration data(.|\n)*--calibration FILE.npz"):
        lowered(exported_network("resnet").read(), precision)


def test_nothing_to_quantize() -> None:
    model = model_of([helper.make_node("MatMul", ["input", "other"], ["output"])], {"zero": np.zeros(1, np.float32)})
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [4, 4]))
    specs = [TensorSpec("input", "float32", ("n", 4)), TensorSpec("other", "float32", (4, 4))]
    calibration = read_calibration([(np.ones((2, 4), np.float32), np.eye(4, dtype=np.float32))], specs, {})
    with pytest.raises(BuildError, match="no layer can be quantized to int8"):
        lowered(model.SerializeToString(), "int8", calibration=calibration)
    with pytest.raises(BuildError, match=r"no layer can be quantized to fp8: all \d+ that exclude names"):
        quantized("resnet", "fp8", exclude=("*",))


def test_quantizing_leaves_logging_as_it_was_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [*logging.getLogger().handlers]
    quantized("packed", "int8")
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


def test_quantized_graph_repeats() -> None:
    for precision in ("int8", "fp8"):
        assert quantized("packed", precision).data == quantized("packed", precision).data
