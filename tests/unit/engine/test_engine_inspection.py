"""What an engine consists of: TensorRT's inspector in both of its layouts, and ONNX graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from engine_samples import write_graph
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.inspection import LayerInfo, TensorInfo, inspect_engine, parse_inspector
from deploy_sparse.engine.onnx.file import OnnxFile
from deploy_sparse.engine.onnx.nodes import nodes_of
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ArtifactError, EngineError

# Written after NVIDIA's documentation of the engine inspector ("Engine Inspector", and for 11.x "Migrating
# IEngineInspector Usage"), not recorded from a GPU.
DOCUMENTED_10 = """{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
  "LayerType": "Reformat",
  "Inputs": [{"Name": "input", "Location": "Device", "Dimensions": [8,3,32,32],
              "Format/Datatype": "Row major linear FP32"}],
  "Outputs": [{"Name": "reformatted", "Location": "Device", "Dimensions": [8,3,32,32],
               "Format/Datatype": "Channel major FP16 format where channel % 4 == 0"}],
  "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x00000000000003ea", "StreamId": 0, "Metadata": ""
},{
  "Name": "conv1 + relu1",
  "LayerType": "CaskConvolution",
  "Inputs": [{"Name": "reformatted", "Location": "Device", "Dimensions": [8,3,32,32],
              "Format/Datatype": "Channel major FP16 format where channel % 4 == 0"}],
  "Outputs": [{"Name": "r", "Location": "Device", "Dimensions": [8,16,32,32],
               "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
  "ParameterType": "Convolution", "Kernel": [3,3], "Groups": 1, "OutMaps": 16,
  "Weights": {"Type": "Half", "Count": 432}, "Bias": {"Type": "Float", "Count": 16},
  "HasSparseWeights": 0, "Activation": "RELU",
  "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize64x32x64_stage5_warpsize2x1x1",
  "TacticValue": "0x11bde0e1d9f2f35d", "StreamId": 0,
  "Metadata": "[ONNX Layer: conv1]\\u001e[ONNX Layer: relu1]"
},{
  "Name": "__myl_MeanFcAdd_fused", "LayerType": "kgen",
  "Inputs": [{"Name": "r", "Dimensions": [-1,16,32,32], "Format/Datatype": "N/A due to dynamic shapes"}],
  "Outputs": [{"Name": "output", "Dimensions": [-1,10], "Format/Datatype": "Half"}]
}], "Bindings": ["input", "output"]}"""
DOCUMENTED_11 = """{"Layers": [{
  "Name": "conv1 + relu1",
  "LayerType": "CaskConvolution",
  "Inputs": [{"Name": "input", "Location": "Device", "Dimensions": [8,3,32,32],
              "Format": "Channel major format where channel % 4 == 0 (kHWC4)", "Datatype": "BFloat16"}],
  "Outputs": [{"Name": "r", "Location": "Device", "Dimensions": [8,16,32,32],
               "Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"}],
  "TacticName": "sm90_xmma_fprop", "Metadata": "[ONNX Layer: conv1]\\u001f[ONNX Layer: relu1]"
}], "I/O Tensors": [{
  "Name": "input", "IOMode": "Input", "DataType": "Float", "Dimensions": [1,3,224,224], "Location": "Device",
  "IsShapeInferenceIO": false, "ProfileInfo": [{"MinShape": [1,3,224,224], "OptShape": [1,3,224,224],
  "MaxShape": [1,3,224,224], "Format": "Row major linear FP32 format (kLINEAR)"}]
}]}"""
NAMES_ONLY = '{"Layers": ["conv1 + relu1", "head"], "Bindings": ["input"]}'


def test_the_layout_of_10() -> None:
    copy, conv, fused = parse_inspector(DOCUMENTED_10)
    assert (copy.kind, copy.precision, copy.tactic, copy.parameters) == (
        "Reformat",
        "fp32 -> fp16",
        "0x00000000000003ea",
        None,
    )
    assert copy.nodes == ()
    assert copy.inputs == (TensorInfo("input", (8, 3, 32, 32), "fp32", "Row major linear FP32"),)
    assert conv.name == "conv1 + relu1"
    assert conv.nodes == ("conv1", "relu1")
    assert conv.precision == "fp16 -> int8"
    assert conv.parameters == 448
    assert conv.tactic is not None
    assert conv.tactic.startswith("sm80_xmma_fprop")
    assert conv.outputs[0].layout == "Thirty-two wide channel vectorized row major Int8 format."
    assert fused.inputs == (TensorInfo("r", (-1, 16, 32, 32), None, None),)
    assert fused.outputs == (TensorInfo("output", (-1, 10), "fp16", None),)
    assert (fused.precision, fused.tactic) == ("fp16", None)


def test_the_layout_of_11() -> None:
    (conv,) = parse_inspector(DOCUMENTED_11)
    assert conv.inputs == (
        TensorInfo("input", (8, 3, 32, 32), "bf16", "Channel major format where channel % 4 == 0 (kHWC4)"),
    )
    assert conv.outputs[0].precision == "fp32"
    assert conv.nodes == ("conv1", "relu1")
    assert conv.precision == "bf16 -> fp32"


def test_names_only() -> None:
    assert parse_inspector(NAMES_ONLY) == (LayerInfo("conv1 + relu1", "?"), LayerInfo("head", "?"))
    assert parse_inspector(NAMES_ONLY)[0].precision is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [3]}', "[" * 100_000]
)
def test_what_is_no_inspectors_text(text: str) -> None:
    with pytest.raises(EngineError, match=r"^this is no text of TensorRT's engine inspector"):
        parse_inspector(text)


def test_an_engine_of_onnx_runtime_is_its_graph(built: Engine, exported: OnnxFile) -> None:
    found = inspect_engine(built)
    assert (found.source, found.why) == ("ONNX graph", None)
    kinds = [layer.kind for layer in found.layers]
    assert kinds.count("Conv") == 2
    assert kinds.count("Gemm") == 1
    assert sum(layer.macs or 0 for layer in found.layers) == exported.macs
    graph = onnx.load(str(exported.path)).graph
    floats = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]
    assert sum(layer.parameters or 0 for layer in found.layers) == sum(int(np.prod(t.dims)) for t in floats)
    first = next(layer for layer in found.layers if layer.kind == "Conv")
    assert [(tensor.shape, tensor.precision) for tensor in first.outputs] == [((1, 4, 8, 8), "fp32")]
    assert first.inputs[0].name == "input"
    assert found.as_json()["layers"][0]["name"] == found.layers[0].name
    json.dumps(found.as_json())


def test_an_engine_for_another_gpu_is_its_graph_and_says_why(built_rtx: Engine, monkeypatch) -> None:
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: None)
    found = inspect_engine(built_rtx.folder)
    assert found.source == "ONNX graph"
    assert found.why is not None
    assert found.why.startswith("compiled, not timed here: no NVIDIA GPU")
    assert any(layer.kind == "Conv" for layer in found.layers)


def stand_in(shapes: dict, plan: object = True) -> SimpleNamespace:
    """TensorRT as far as inspecting an engine goes."""
    context = SimpleNamespace(set_input_shape=lambda name, shape: shapes.update({name: shape}))
    inspector = SimpleNamespace(execution_context=None)
    inspector.get_engine_information = lambda form: (
        DOCUMENTED_11 if inspector.execution_context and form == "JSON" else ""
    )
    engine = SimpleNamespace(create_execution_context=lambda: context, create_engine_inspector=lambda: inspector)

    class Runtime:
        engine_host_code_allowed = None

        def __init__(self, logger: object) -> None:
            assert logger == "logger"

        def deserialize_cuda_engine(self, data: bytes) -> object:
            assert self.engine_host_code_allowed is False
            assert data
            return engine if plan else None

    return SimpleNamespace(Runtime=Runtime, LayerInformationFormat=SimpleNamespace(JSON="JSON"))


def test_an_engine_that_runs_here_is_what_the_inspector_says(built_rtx: Engine, monkeypatch) -> None:
    shapes: dict = {}
    version = built_rtx.manifest["runtime"]["version"]
    library = stand_in(shapes)
    library.__version__ = version
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("NVIDIA L4", "SM89"))
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: library)
    monkeypatch.setattr(trt_bindings, "process_logger", lambda runtime: "logger")
    found = inspect_engine(built_rtx)
    assert (found.source, found.why) == ("TensorRT's inspector", None)
    assert [layer.name for layer in found.layers] == ["conv1 + relu1"]
    assert shapes == {"input": (8, 1, 8, 8)}  # the batch that it is tuned for
    library.Runtime = stand_in(shapes, plan=None).Runtime
    with pytest.raises(EngineError, match=r"TensorRT rejects the engine in .*\n.*\n.*deploy-sparse build"):
        inspect_engine(built_rtx)


def test_damaged_or_without_a_graph(entry: Path, tmp_path: Path, tiny, examples, monkeypatch) -> None:
    program = build_engine(tiny, "torch-cpu", examples, tmp_path / "out")
    with pytest.raises(EngineError, match="holds no ONNX graph, as its runtime is torch"):
        inspect_engine(program)
    monkeypatch.setattr("deploy_sparse.engine.entry.sha256_bytes", lambda data: "0")
    with pytest.raises(ArtifactError, match=r"model.onnx changed while it was being read"):
        inspect_engine(entry)
    (entry / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model.onnx is damaged"):
        inspect_engine(entry)
    shutil.rmtree(entry)
    with pytest.raises(ArtifactError, match="does not exist"):
        inspect_engine(entry)


def graph_of(tmp_path: Path, nodes: list, weights: dict, *, shape: tuple, out: tuple) -> tuple[LayerInfo, ...]:
    initializers = tuple(numpy_helper.from_array(value, name) for name, value in weights.items())
    path = write_graph(tmp_path / "n.onnx", nodes, shape=shape, out_shape=out, initializers=initializers)
    return nodes_of(path.read_bytes(), {"height": 6})


@pytest.mark.parametrize(
    ("node", "weights", "shape", "out", "macs"),
    [
        (
            helper.make_node("Conv", ["input", "w"], ["output"], group=2, pads=[1, 1, 1, 1]),
            {"w": (4, 1, 3, 3)},
            ("n", 2, "height", 5),
            ("n", 4, "h", 5),
            4 * 6 * 5 * 9,
        ),
        (
            helper.make_node("ConvTranspose", ["input", "w"], ["output"], strides=[2, 2]),
            {"w": (2, 3, 2, 2)},
            ("n", 2, 4, 4),
            ("n", 3, 8, 8),
            2 * 16 * 3 * 4,
        ),
        (helper.make_node("Gemm", ["input", "w"], ["output"], transB=1), {"w": (7, 5)}, ("n", 5), ("n", 7), 35),
        (helper.make_node("MatMul", ["input", "w"], ["output"]), {"w": (5, 7)}, ("n", 3, 5), ("n", 3, 7), 105),
        (
            helper.make_node("Einsum", ["input", "w"], ["output"], equation="ngi,gio->ngo"),
            {"w": (2, 3, 4)},
            ("n", 2, 3),
            ("n", 2, 4),
            24,
        ),
        (helper.make_node("Relu", ["input"], ["output"]), {}, ("n", 5), ("n", 5), None),
    ],
    ids=lambda value: getattr(value, "op_type", None),
)
def test_multiply_accumulates(tmp_path: Path, node, weights, shape, out, macs) -> None:
    arrays = {name: np.ones(extents, np.float32) for name, extents in weights.items()}
    (layer,) = graph_of(tmp_path, [node], arrays, shape=shape, out=out)
    assert layer.macs == macs
    assert layer.parameters == sum(array.size for array in arrays.values())
    assert layer.kind == node.op_type


def test_unknown_extents_are_not_guessed(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["input", "w"], ["output"], "m")
    (layer,) = graph_of(
        tmp_path, [node], {"w": np.ones((5, 7), np.float32)}, shape=("n", "width", 5), out=("n", "width", 7)
    )
    assert layer.outputs[0].shape == (1, -1, 7)
    assert layer.macs is None


def test_shared_and_quantized_weights_count_once(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4), np.int8), "scale": np.float32(0.1), "zero": np.int8(0), "b": np.ones(4, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["real"]),
        helper.make_node("MatMul", ["input", "real"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["output"]),
    ]
    weights = {name: np.asarray(value) for name, value in weights.items()}
    layers = graph_of(tmp_path, nodes, weights, shape=("n", 4), out=("n", 4))
    assert [layer.parameters for layer in layers] == [16, 0, 4, 0]
    assert [layer.name for layer in layers] == ["DequantizeLinear_0", "MatMul_1", "Add_2", "Add_3"]
    assert layers[1].macs == 16


def test_no_graph() -> None:
    with pytest.raises(ArtifactError, match=r"model.onnx is not a valid ONNX file"):
        nodes_of(b"\xff\xff", {})


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "n.onnx", [helper.make_node("Relu", ["input"], ["output"], "relu")])
    data = path.read_bytes()
    assert data.count(b"relu") == 1
    with pytest.raises(ArtifactError, match=r"n.onnx is not a valid ONNX file \(the name .* is not UTF-8\)"):
        nodes_of(data.replace(b"relu", b"\xff\xfflu"), {}, path)
