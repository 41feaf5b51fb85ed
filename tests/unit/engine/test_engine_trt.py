"""TensorRT flavours: RTX compiles for real on any machine; what cannot run here says so before touching the engine."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_samples import write_graph
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.engine.build import build_engine, require_runtime
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.engine.trt.bindings import compile_onnx
from deploy_sparse.errors import ArtifactError, BuildError, EngineError, MissingDependencyError

RTX = ("rtx-portable", "rtx-sm120", "rtx-sm80", "rtx-sm86", "rtx-sm89")


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: None)


def gpu_is(monkeypatch: pytest.MonkeyPatch, name: str, capability: str) -> None:
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu(name, capability))


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *rest):
        if name in ("tensorrt", "tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(trt_bindings.importlib, "import_module", absent)


def test_rtx_entry(built_rtx: Engine, exported: OnnxFile, rtx, no_gpu) -> None:
    manifest = built_rtx.manifest
    assert built_rtx.path.name == "model.engine"
    assert (built_rtx.folder / "model.onnx").read_bytes() == exported.read()
    assert manifest["runtime"] == {"name": "tensorrt-rtx", "version": rtx.__version__}
    assert manifest["compute_capabilities"] == ["SM89"]
    assert manifest["gpu"] is None
    assert manifest["bytes"] == built_rtx.path.stat().st_size > 1000
    assert manifest["precision"]["built"] == "fp32"
    assert "parsed" in manifest["precision"]["read_from"]
    assert built_rtx.runnable() == "compiled, not timed here: no NVIDIA GPU"


def test_rtx_compiles_for_every_shipped_target(exported: OnnxFile, rtx) -> None:
    plans = {}
    for name in RTX:
        target = load_target(name)
        compiled = compile_onnx(exported.read(), target, exported.inputs)
        assert compiled.float_types == {"float32"}
        plans[name] = compiled.plan
    assert len(set(plans.values())) == len(RTX)


def test_turing_takes_convolutions_and_no_fp32_matrix_product(exported: OnnxFile, rtx, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["input", "w"], ["output"])
    path = write_graph(
        tmp_path / "x.onnx", [node], shape=("n", 4, 8, 8), out_shape=("n", 8, 6, 6), initializers=(weight,)
    )
    assert build_engine(path, "rtx-sm75", out=tmp_path).manifest["compute_capabilities"] == ["SM75"]
    with pytest.raises(BuildError, match=r"'rtx-sm75': .*node_linear.*FP32 GEMM is not supported"):
        compile_onnx(exported.read(), load_target("rtx-sm75"), exported.inputs)


def test_tf32_and_batch_range_reach_the_compiler(exported: OnnxFile, rtx) -> None:
    target = load_target("rtx-sm89")
    plain = compile_onnx(exported.read(), target, exported.inputs).plan
    for change in ({"tf32": True}, {"batch": target.batch.model_copy(update={"max": 128})}):
        assert compile_onnx(exported.read(), target.model_copy(update=change), exported.inputs).plan != plain


def test_parse_error_names_node_and_operator(rtx, tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["input"], ["h"], name="fine")
    det = helper.make_node("Det", ["h"], ["output"], name="the_det")
    path = write_graph(tmp_path / "x.onnx", [relu, det], shape=("n", 4, 4), out_shape=("n",))
    with pytest.raises(BuildError, match=r"does not accept the graph for 'rtx-sm80': .*node 'the_det' \(Det\)"):
        build_engine(path, "rtx-sm80", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_precision_is_read_back_from_the_network(rtx, tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["input"], ["h"], to=TensorProto.FLOAT16)]
    nodes.append(helper.make_node("Cast", ["h"], ["output"], to=TensorProto.FLOAT))
    found = read_onnx(write_graph(tmp_path / "x.onnx", nodes))
    assert compile_onnx(found.read(), load_target("rtx-sm80"), found.inputs).float_types == {"float32", "float16"}


def test_compiler_errors_reach_the_message(exported: OnnxFile, rtx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trt_bindings, "_add_profile", lambda *_: None
    )  # a dynamic network without a profile cannot compile
    with pytest.raises(BuildError, match=r"could not compile the network for 'rtx-sm80': .*optimization profile"):
        compile_onnx(exported.read(), load_target("rtx-sm80"), exported.inputs)


def test_compiling_prints_nothing(exported: OnnxFile, rtx, capfd, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compile_onnx(exported.read(), load_target("rtx-sm80"), exported.inputs)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_unknown_compute_capability_of_an_older_library(exported: OnnxFile, rtx, monkeypatch) -> None:
    target = load_target("rtx-sm80").model_copy(update={"compute_capabilities": ("SM999",)})
    with pytest.raises(BuildError, match=r"does not know compute capability SM999(.|\n)*SM80"):
        compile_onnx(exported.read(), target, exported.inputs)


def test_missing_libraries(exported: OnnxFile, tmp_path: Path, uninstalled) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        build_engine(exported, "rtx-sm80", out=tmp_path)
    assert "tensorrt-rtx is not installed" in str(caught.value)
    assert caught.value.fix == "pip install tensorrt-rtx (the extra 'rtx')"
    with pytest.raises(MissingDependencyError) as caught:
        build_engine(exported, "tensorrt", out=tmp_path)
    assert caught.value.fix.startswith("pip install tensorrt (the extra 'tensorrt'; ")
    assert "NVIDIA's own package index" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_runtime_is_checked_without_building(uninstalled) -> None:
    require_runtime(load_target("cpu"))
    for name in ("rtx-sm80", "tensorrt"):
        with pytest.raises(MissingDependencyError, match="is not installed"):
            require_runtime(load_target(name))


def test_runtime_check_knows_that_full_tensorrt_needs_a_gpu(no_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: object())
    require_runtime(load_target("rtx-sm80"))  # compiles ahead of time
    with pytest.raises(BuildError, match=r"'tensorrt' compiles for the GPU of this machine, which has none"):
        require_runtime(load_target("tensorrt"))


def test_missing_runtime_is_found_before_the_export(no_gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: SimpleNamespace(__version__="11.0"))
    with pytest.raises(BuildError, match="which has none"):
        build_engine(tmp_path / "gone.onnx", "tensorrt", out=tmp_path)


def test_broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str):
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(trt_bindings.importlib, "import_module", broken)
    with pytest.raises(MissingDependencyError, match=r"does not load \(libtensorrt_rtx\.so\.1"):
        trt_bindings.library("tensorrt-rtx")


def test_full_tensorrt_needs_a_gpu(exported: OnnxFile, no_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: object())
    with pytest.raises(BuildError, match=r"'tensorrt' compiles for the GPU of this machine, which has none"):
        compile_onnx(exported.read(), load_target("tensorrt"), exported.inputs)


def test_loading_without_a_gpu(built_rtx: Engine, no_gpu) -> None:
    with pytest.raises(EngineError) as caught:
        load_engine(built_rtx)
    text = str(caught.value)
    assert "was compiled for SM89 by tensorrt-rtx" in text
    assert "here: no NVIDIA GPU" in text
    assert f"deploy-sparse build {built_rtx.folder / 'model.onnx'} --target cpu" in text


def test_loading_with_another_version(built_rtx: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "RTX 4090", "SM89")
    other = type("library", (), {"__version__": "1.0.0.1"})
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: other)
    with pytest.raises(EngineError) as caught:
        load_engine(built_rtx)
    assert "here: tensorrt-rtx 1.0.0.1" in str(caught.value)
    assert "not portable across versions" in str(caught.value)
    assert f"build it again here: {built_rtx.build_command()}" in str(caught.value)
    assert "it needs tensorrt-rtx 1." in built_rtx.runnable()


@pytest.mark.parametrize(("capability", "target"), [("SM86", "rtx-sm86"), ("SM90", "rtx-portable")])
def test_loading_on_another_gpu(built_rtx: Engine, rtx, monkeypatch, capability: str, target: str) -> None:
    gpu_is(monkeypatch, "Other GPU", capability)
    with pytest.raises(EngineError, match=rf"here: Other GPU \({capability}\)(.|\n)*--target {target} "):
        load_engine(built_rtx)


def test_loading_without_the_library(built_rtx: Engine, uninstalled, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "RTX 4090", "SM89")
    with pytest.raises(EngineError, match=r"tensorrt-rtx is not installed(.|\n)*pip install tensorrt-rtx \("):
        load_engine(built_rtx)


def test_engine_tuned_on_another_model_of_gpu(built_rtx: Engine, rtx, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "RTX 4060", "SM89")
    manifest = {**built_rtx.manifest, "gpu": {"name": "RTX 4090", "capability": "SM89"}}
    assert "a RTX 4090, which it was tuned on" in replace(built_rtx, manifest=manifest).runnable()
    gpu_is(monkeypatch, "RTX 4090", "SM89")
    assert replace(built_rtx, manifest=manifest).runnable() is None


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_plan_never_reaches_tensorrt(built_rtx: Engine, tmp_path: Path, damage: str, monkeypatch) -> None:
    gpu_is(monkeypatch, "RTX 4090", "SM89")
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in built_rtx.folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "model.engine":
            data[1000] ^= 1
            data = data if damage == "flip" else data[:-1]
        (folder / path.name).write_bytes(data)
    for open_it in (load_engine, open_entry):
        with pytest.raises(ArtifactError, match=r"model\.engine is damaged"):
            open_it(folder)


def test_the_runner_calls_what_the_library_has(rtx) -> None:
    """The GPU runner's calls, by name: a library that renames one is noticed on machines without a GPU too."""
    wanted = {
        rtx.Runtime: ("engine_host_code_allowed", "get_engine_validity", "deserialize_cuda_engine"),
        rtx.ICudaEngine: (
            "create_execution_context",
            "get_tensor_dtype",
            "get_tensor_location",
            "get_tensor_mode",
            "get_tensor_name",
            "num_io_tensors",
        ),
        rtx.IExecutionContext: (
            "execute_async_v3",
            "get_tensor_shape",
            "infer_shapes",
            "set_input_shape",
            "set_tensor_address",
        ),
    }
    assert [
        f"{kind.__name__}.{name}" for kind, names in wanted.items() for name in names if not hasattr(kind, name)
    ] == []
    assert {trt_bindings.data_type_name(t) for t in (rtx.float32, rtx.float16, rtx.bfloat16, rtx.int64, rtx.bool)} == {
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "bool",
    }
