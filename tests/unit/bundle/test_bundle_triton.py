"""Triton repositories: their configurations are read with Triton's own protobuf schema."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_samples import as_tensorrt, model_config, write_graph, write_network
from google.protobuf import text_format
from onnx import TensorProto, helper

from deploy_sparse.artifact import write_artifact
from deploy_sparse.bundle import bundle_engine
from deploy_sparse.bundle.triton import config_text
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.target import Batch, Extents, load_target
from deploy_sparse.engine.tensors import sample_feeds
from deploy_sparse.errors import ArtifactError, ConfigError, EngineError

CONFIG = model_config()
FLOAT, INT64 = 11, 9  # TYPE_FP32, TYPE_INT64 of model_config.proto
GPU, CPU = 1, 2  # KIND_GPU, KIND_CPU


def config(model: Path) -> Any:
    found = text_format.Parse((model / "config.pbtxt").read_text(), CONFIG())
    consistent(found, model)
    return found


def consistent(found: Any, model: Path) -> None:
    """What Triton checks beyond the schema."""
    assert found.name == model.name
    for tensor in (*found.input, *found.output):
        assert tensor.dims
        assert all(extent == -1 or extent > 0 for extent in tensor.dims)
    for warm in found.model_warmup:
        assert 1 <= warm.batch_size <= max(1, found.max_batch_size)
        assert set(warm.inputs) == {tensor.name for tensor in found.input}
        for tensor in found.input:
            one = warm.inputs[tensor.name]
            assert one.data_type == tensor.data_type
            assert len(one.dims) == len(tensor.dims)
            assert all(w > 0 and d in (-1, w) for w, d in zip(one.dims, tensor.dims, strict=True))
            if one.input_data_file:
                kind = {FLOAT: 4, INT64: 8}[one.data_type]
                assert (model / "warmup" / one.input_data_file).stat().st_size == kind * math.prod(one.dims)
    for size in found.dynamic_batching.preferred_batch_size:
        assert 1 < size <= found.max_batch_size


def files(model: Path) -> set[str]:
    return {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}


def built(file: Path, tmp_path: Path, **changes: Any) -> Engine:
    target = load_target("cpu").model_copy(update=changes)
    return build_engine(file, target, out=tmp_path / "engines", name="net")


def test_onnx_runtime(engine: Engine, tmp_path: Path) -> None:
    made = bundle_engine(engine, format="triton", out=tmp_path / "models")
    assert made.path == tmp_path / "models" / "net"
    assert made.notes == ("the server's ONNX Runtime has to know opset 20",)
    assert files(made.path) == {"config.pbtxt", "engine.json", "1/model.onnx", "warmup/input_0"}
    assert (made.path / "1/model.onnx").read_bytes() == (engine.folder / "model.onnx").read_bytes()
    found = config(made.path)
    assert (found.platform, found.max_batch_size) == ("onnxruntime_onnx", 256)
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("input", FLOAT, [1, 8, 8])]
    assert [(t.name, t.data_type, list(t.dims)) for t in found.output] == [("output", FLOAT, [10])]
    assert [(group.kind, group.count) for group in found.instance_group] == [(CPU, 1)]
    assert found.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(found.dynamic_batching.preferred_batch_size) == [256]  # 1, for which it is tuned, would join nothing
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "intra_op_thread_count": "1",
        "inter_op_thread_count": "1",
    }
    assert [(warm.name, warm.batch_size) for warm in found.model_warmup] == [("batch 1", 1), ("batch 256", 256)]
    raw = np.fromfile(made.path / "warmup/input_0", "<f4").reshape(1, 1, 8, 8)
    np.testing.assert_array_equal(raw, sample_feeds(engine.inputs, 1)["input"])


def test_tensorrt(engine: Engine, tmp_path: Path) -> None:
    made = bundle_engine(as_tensorrt(engine, tmp_path / "trt"), format="triton", out=tmp_path / "models", name="resnet")
    assert files(made.path) == {"config.pbtxt", "engine.json", "1/model.plan", "warmup/input_0"}
    assert (made.path / "1/model.plan").read_bytes() == b"plan"
    assert made.notes == ("the server needs TensorRT 11.4.0.106, NVIDIA H100 (SM90)",)
    found = config(made.path)
    assert (found.name, found.platform, found.max_batch_size) == ("resnet", "tensorrt_plan", 64)
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 64]
    assert [(group.kind, group.count) for group in found.instance_group] == [(GPU, 1)]
    assert [warm.batch_size for warm in found.model_warmup] == [8, 64]
    assert not found.parameters


def test_an_engine_with_host_code_names_the_servers_option(engine: Engine, tmp_path: Path) -> None:
    made = as_tensorrt(engine, tmp_path / "trt", version_compatible=True)
    notes = bundle_engine(made, format="triton", out=tmp_path / "models").notes
    assert notes[0].startswith("the server needs TensorRT 11.4.0.106 or later")
    assert "--backend-config=tensorrt,version-compatible=true" in notes[1]


def test_threads_and_a_batch_range(engine: Engine, tmp_path: Path) -> None:
    made = built(engine.folder / "model.onnx", tmp_path, name="four", threads=4, batch=Batch(min=1, opt=8, max=32))
    found = config(bundle_engine(made, format="triton", out=tmp_path / "models").path)
    assert found.parameters["intra_op_thread_count"].string_value == "4"
    assert (found.max_batch_size, list(found.dynamic_batching.preferred_batch_size)) == (32, [8, 32])


@pytest.mark.parametrize(
    ("shape", "output", "batch", "dims", "warm"),
    [
        ((4, 1, 8, 8), (4, 10), None, [4, 1, 8, 8], [4, 1, 8, 8]),
        (("batch", 1, 8, 8), ("batch", 10), Batch(min=2, opt=4, max=8), [-1, 1, 8, 8], [4, 1, 8, 8]),
    ],
    ids=["fixed", "smallest above one"],
)
def test_batches_that_triton_cannot_join(tmp_path: Path, shape, output, batch, dims, warm) -> None:
    changes = {"batch": batch} if batch else {}
    made = built(write_network(tmp_path / "n.onnx", shape=shape, output=output), tmp_path, **changes)
    found = config(bundle_engine(made, format="triton", out=tmp_path / "models").path)
    assert found.max_batch_size == 0
    assert list(found.input[0].dims) == dims
    assert list(found.output[0].dims) == [dims[0], 10]
    assert found.WhichOneof("scheduling_choice") is None
    assert [request.batch_size for request in found.model_warmup] == [1] * len(found.model_warmup)
    assert list(found.model_warmup[0].inputs["input"].dims) == warm


def test_one_sample_at_a_time_is_not_batched_dynamically(engine: Engine, tmp_path: Path) -> None:
    made = built(engine.folder / "model.onnx", tmp_path, batch=Batch(min=1, opt=1, max=1))
    found = config(bundle_engine(made, format="triton", out=tmp_path / "models").path)
    assert (found.max_batch_size, list(found.input[0].dims)) == (1, [1, 8, 8])
    assert found.WhichOneof("scheduling_choice") is None
    assert len(found.model_warmup) == 1


def test_dynamic_axes(tmp_path: Path) -> None:
    file = write_network(tmp_path / "n.onnx", shape=("batch", 1, "height", 8))
    made = built(file, tmp_path, axes={"height": Extents(min=8, opt=12, max=16)})
    found = config(bundle_engine(made, format="triton", out=tmp_path / "models").path)
    assert list(found.input[0].dims) == [1, -1, 8]
    assert list(found.model_warmup[0].inputs["input"].dims) == [1, 12, 8]


def test_several_tensors_whole_numbers_and_odd_names(tmp_path: Path) -> None:
    name = 'a/"odd\\ name'
    nodes = [
        helper.make_node("Gather", ["table", name], ["rows"], axis=0),
        helper.make_node("ReduceSum", ["rows", "axes"], ["one"], keepdims=0),
    ]
    weights = {"table": np.ones((2, 3)), "axes": np.array([1])}
    outputs: dict = {"one": ("batch",), "rows": ("batch", 3)}
    file = write_graph(
        tmp_path / "n.onnx", nodes, {name: ("batch",)}, outputs, weights, kinds={name: TensorProto.INT64}
    )
    made = bundle_engine(built(file, tmp_path), format="triton", out=tmp_path / "models")
    found = config(made.path)
    (given,) = found.input
    assert (given.name, given.data_type, list(given.dims)) == (name, INT64, [1])
    assert given.HasField("reshape")  # a batch of single numbers: Triton's shapes have at least one axis
    assert not given.reshape.shape
    assert [(t.name, list(t.dims), t.HasField("reshape")) for t in found.output] == [
        ("one", [1], True),
        ("rows", [3], False),
    ]
    assert set(np.fromfile(made.path / "warmup/input_0", "<i8")) <= {0, 1}


def test_labels(engine: Engine, tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(10)]
    made = bundle_engine(engine, format="triton", out=tmp_path / "models", labels=names)
    assert config(made.path).output[0].label_filename == "labels.txt"
    assert (made.path / "labels.txt").read_text().splitlines() == names
    with pytest.raises(
        ConfigError, match=r"9 labels for the output output float32 \[batch, 10\]\n  expected: 10 names"
    ):
        bundle_engine(engine, format="triton", out=tmp_path / "other", labels=names[1:])
    with pytest.raises(ConfigError, match="10 labels for"):
        bundle_engine(engine, format="triton", out=tmp_path / "other", labels=[*names[1:], " "])
    assert not (tmp_path / "other").exists()


def test_what_triton_cannot_serve_says_what_to_build(engine: Engine, tmp_path: Path) -> None:
    rtx = as_tensorrt(engine, tmp_path / "rtx", target="rtx-sm89")
    with pytest.raises(EngineError, match="an engine of TensorRT-RTX, for which Triton has no backend") as caught:
        bundle_engine(rtx, format="triton", out=tmp_path / "models")
    assert f"on the server: deploy-sparse build {rtx.folder}/model.onnx --target tensorrt" in str(caught.value)
    assert "--target cpu" in str(caught.value)
    low = replace(rtx, manifest={**rtx.manifest, "precision": {"built": "bf16 + fp32"}})
    with pytest.raises(EngineError, match="--target tensorrt") as caught:
        config_text(low, "net")
    assert "--target cpu" not in str(caught.value)  # ONNX Runtime has no bf16 there
    strip = as_tensorrt(engine, tmp_path / "strip", refit="identical", strip=True)
    with pytest.raises(EngineError, match=r"is an engine without weights.*\n.*\n.*strip = false"):
        bundle_engine(strip, format="triton", out=tmp_path / "models")
    import torch

    program = build_engine(torch.nn.Linear(4, 2), "torch-cpu", torch.randn(2, 4), tmp_path / "engines")
    with pytest.raises(EngineError, match=r"a program of torch\.export, which Triton's PyTorch backend does not take"):
        bundle_engine(program, format="triton", out=tmp_path / "models")
    with pytest.raises(EngineError, match=r"holds no ONNX graph, as its runtime is torch\n"):
        bundle_engine(program, format="zip", out=tmp_path / "net.zip")
    assert not (tmp_path / "models").exists()


def test_a_type_that_triton_lacks(engine: Engine, tmp_path: Path) -> None:
    body = {key: value for key, value in engine.manifest.items() if key not in ("digest", "files")}
    body["outputs"] = [{"name": "output", "dtype": "float8_e4m3fn", "shape": ["batch", 10]}]
    payload = {name: (engine.folder / name).read_bytes() for name in engine.manifest["files"]}
    write_artifact(tmp_path / "odd", "engine", payload, body)
    with pytest.raises(EngineError, match=r"output float8_e4m3fn \[batch, 10\] has a type that Triton does not have"):
        bundle_engine(tmp_path / "odd", format="triton", out=tmp_path / "models")
    with pytest.raises(EngineError, match=r"has a type that NumPy files do not have"):
        bundle_engine(tmp_path / "odd", format="zip", out=tmp_path / "net.zip")


def test_other_models_and_what_exists_stay(engine: Engine, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    (repository / "mine" / "1").mkdir(parents=True)
    first = bundle_engine(engine, format="triton", out=repository)
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    assert bundle_engine(engine, format="triton", out=repository) == first  # the very same is no conflict
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before
    (first.path / "config.pbtxt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"models/net already exists with other content"):
        bundle_engine(engine, format="triton", out=repository)
    assert (first.path / "config.pbtxt").read_text() == "mine"
    bundle_engine(engine, format="triton", out=repository, name="second")
    (repository / "file").write_text("")
    with pytest.raises(ArtifactError, match="models/file already exists"):
        bundle_engine(engine, format="triton", out=repository, name="file")
    assert sorted(path.name for path in repository.iterdir()) == ["file", "mine", "net", "second"]
