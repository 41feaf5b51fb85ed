"""Small ONNX networks, engines as a machine with full TensorRT would leave them, and Triton's own schema."""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.artifact import digest_of, sha256_bytes, write_artifact
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.target import load_target

BATCHED = ("batch", 1, 8, 8)


def write_network(
    path: Path, *, shape: tuple[int | str, ...] = BATCHED, output: tuple[int | str, ...] = ("batch", 10)
) -> Path:
    """conv - ReLU - mean - linear on ``[batch, 1, height, width]``, 10 classes, seeded weights."""
    random = np.random.default_rng(0)
    weights = {
        "conv.weight": random.standard_normal((4, 1, 3, 3)),
        "head.weight": random.standard_normal((4, 10)),
        "head.bias": random.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "mean"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["output"], "head"),
    ]
    return write_graph(path, nodes, {"input": shape}, {"output": output}, weights)


def write_graph(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int | str, ...]],
    outputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    kinds: dict[str, int] | None = None,
    opset: int = 20,
) -> Path:
    """An ONNX file; tensors are float32 unless ``kinds`` says otherwise."""

    def values(shapes):
        return [
            helper.make_tensor_value_info(name, (kinds or {}).get(name, TensorProto.FLOAT), shape)
            for name, shape in shapes.items()
        ]

    arrays = {name: w.astype(np.float32) if w.dtype.kind == "f" else w for name, w in (weights or {}).items()}
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "sample", values(inputs), values(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def as_tensorrt(engine: Engine, folder: Path, *, target: str = "tensorrt", **changes: Any) -> Engine:
    """The same engine as full TensorRT leaves it, with a plan that is no plan.

    Args:
        changes: keys of the target other than its own.
    """
    wanted = load_target(target).model_copy(update=changes)
    payload = {name: (engine.folder / name).read_bytes() for name in engine.manifest["files"]}
    body = {key: value for key, value in engine.manifest.items() if key not in ("digest", "files")}
    body |= {
        "engine_file": "model.engine",
        "target": wanted.model_dump(mode="json"),
        "target_digest": wanted.digest,
        "runtime": {"name": wanted.runtime, "version": "11.4.0.106"},
        "compute_capabilities": ["SM90"],
        "gpu": {"name": "NVIDIA H100", "capability": "SM90"} if wanted.runtime == "tensorrt" else None,
    }
    if engine.manifest["batch"]["max"] > 1:
        body["batch"] = wanted.batch.model_dump()
    write_artifact(folder, "engine", {**payload, "model.engine": b"plan"}, body)
    return open_entry(folder)


def model_config() -> type[Any]:
    """The message class of ``model_config.proto``, as the package tritonclient ships it.

    The schema is taken out of the generated module instead of importing that, which needs one version of protobuf.
    """
    file = metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    calls = [node for node in ast.walk(ast.parse(Path(str(file)).read_text())) if isinstance(node, ast.Call)]
    (schema,) = [
        ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "attr", "") == "AddSerializedFile"
    ]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(schema))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def rezip(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The zip file again, with members changed by ``change`` and nothing else made to fit; see :func:`reseal_`."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def reseal_(members: dict[str, bytes]) -> None:
    """Make the description of a bundle fit its members, as somebody would who forges one."""
    body = json.loads(members["bundle.json"])
    del body["digest"]
    body["files"] = {
        name: {"bytes": len(data), "sha256": sha256_bytes(data)}
        for name, data in members.items()
        if name != "bundle.json"
    }
    own = ("target.toml", "sample.npz", "README.md")
    body["engine"]["files"] = {name: entry for name, entry in body["files"].items() if name not in own}
    members["bundle.json"] = json.dumps({**body, "digest": digest_of(body)}).encode()
