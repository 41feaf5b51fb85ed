"""An ONNX file and what is known of it: read, checked, and described by a sidecar ``<name>.onnx.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import artifact
from ...errors import ArtifactError
from ..tensors import TensorSpec, spec_from_json
from .external import (
    MARK,
    WeightFile,
    all_tensors,
    entries_of,
    is_outside,
    is_plain_name,
    read_small_,
    weight_files,
    without_large,
)

if TYPE_CHECKING:
    import onnx

REMAKE = 'export it again: deploy_sparse.export_onnx(module, example_inputs, "model.onnx")'


@dataclass(frozen=True)
class Parity:
    """How far the graph in ONNX Runtime is from the module, over all outputs and tested batch sizes.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: that difference over the largest magnitude of its output.
        top1: share of samples whose largest entry of the first output is the same one.
        batches: the batch sizes compared.
    """

    max_abs: float
    max_rel: float
    top1: float
    batches: tuple[int, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A verified ONNX file.

    Attributes:
        path: the file.
        sha256: of its bytes.
        opset: version of the default operator set.
        inputs, outputs: names, types and shapes.
        parameters: of the module; for files from elsewhere the number of floating-point initializer entries.
        macs: multiply-accumulates of one sample, or None for files from elsewhere.
        parity: against the module, or None for files from elsewhere.
        weights: files beside it that hold weights, where it does not hold all of them itself.
    """

    path: Path
    sha256: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    macs: int | None
    parity: Parity | None
    weights: tuple[WeightFile, ...] = ()

    @property
    def identity(self) -> str:
        """What tells this network from another one: ``sha256``, or a hash of that and those of ``weights``."""
        return identity_of(self.sha256, self.weights)

    def read(self) -> bytes:
        """The file's bytes, checked against ``sha256``.

        Raises:
            ArtifactError: the file is gone or was altered since.
        """
        data = _read_bytes(self.path)
        if artifact.sha256_bytes(data) != self.sha256:
            raise _damaged(self.path, f"its SHA-256 is not {self.sha256[:12]}…")
        return data

    def read_weights(self) -> dict[str, memoryview]:
        """Verified content of ``weights`` by file name, mapped into memory rather than read at once.

        Raises:
            ArtifactError: a file is gone or was altered since.
        """
        return {file.name: file.read(self.path) for file in self.weights}

    def sidecar(self) -> dict[str, Any]:
        """Everything but the path, as JSON with a digest of its own."""
        body = {
            "kind": "onnx",
            "format_version": artifact.FORMAT_VERSION,
            "sha256": self.sha256,
            "opset": self.opset,
            "inputs": [spec.as_json() for spec in self.inputs],
            "outputs": [spec.as_json() for spec in self.outputs],
            "parameters": self.parameters,
            "macs": self.macs,
            "parity": parity_as_json(self.parity),
            **({"weights": [asdict(file) for file in self.weights]} if self.weights else {}),
        }
        return {**body, "digest": artifact.digest_of(body)}


def identity_of(sha256: str, weights: tuple[WeightFile, ...]) -> str:
    """What tells an ONNX file with this hash and these files of weights from another one."""
    if not weights:
        return sha256
    return artifact.digest_of({"onnx": sha256, "weights": {file.name: file.sha256 for file in weights}})


def parity_as_json(parity: Parity | None) -> dict[str, Any] | None:
    """JSON form of a parity; ``batches`` becomes a list."""
    return None if parity is None else {**asdict(parity), "batches": list(parity.batches)}


def sidecar_path(path: Path) -> Path:
    """``x.onnx`` -> ``x.onnx.json``."""
    return path.with_name(f"{path.name}.json")


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file. With its sidecar it is verified against it; without one it goes through ONNX's checker.

    Weights may be in other files of its folder ("external data"); those are verified too.

    Raises:
        ArtifactError: missing, truncated, altered, not ONNX, weights that are NaN, or in a file that is missing,
            truncated, or in another folder.
    """
    path = Path(path)
    data = _read_bytes(path)
    beside = sidecar_path(path)
    if beside.is_file():
        return _from_sidecar(path, data, beside)
    graph = parse_graph(path, data)
    return describe_graph(path, data, graph)


def is_contradicted(path: Path, sha256: str) -> bool:
    """Whether the file at ``path``, which has this hash, has a sidecar that is damaged or of another file."""
    beside = sidecar_path(path)
    if not beside.is_file():
        return False
    try:
        told = artifact.read_json(beside)
    except ArtifactError:
        return True
    if not isinstance(told, Mapping) or (told.get("kind"), told.get("sha256")) != ("onnx", sha256):
        return True
    return artifact.digest_of({key: value for key, value in told.items() if key != "digest"}) != told.get("digest")


def parse_graph(path: Path, data: bytes) -> onnx.ModelProto:
    """Parse and check the bytes of the ONNX file at ``path``; large weights in other files are not read.

    Raises:
        ArtifactError: not ONNX, invalid, or with weights in files that are missing, truncated, or in another folder.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
        if not model.graph.node and not model.graph.output:
            raise DecodeError("it holds no graph")
        read_small_(path, model)
        twin = without_large(model)
        onnx.checker.check_model(data if MARK not in data else twin.SerializeToString(), full_check=True)
    except (DecodeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as problem:
        reason = str(problem).strip().splitlines()
        raise ArtifactError(
            f"{path} is not a valid ONNX file ({reason[0] if reason else type(problem).__name__})",
            expected="a whole, unaltered .onnx file",
            fix=REMAKE,
        ) from problem
    return model


def describe_graph(path: Path, data: bytes, model: onnx.ModelProto) -> OnnxFile:
    """What the graph itself says: opset, inputs, outputs, parameters. ``macs`` and ``parity`` stay None.

    Raises:
        ArtifactError: a weight with NaN in it, or in a file that cannot be read.
    """
    import onnx

    weights = {tensor.name for tensor in model.graph.initializer}
    parameters = 0
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if "float" in str(dtype):  # bfloat16 and float8 included
            parameters += math.prod(tensor.dims)
            if _has_nan(path, tensor):
                raise ArtifactError(
                    f"{path} has NaN in weight {tensor.name!r}",
                    expected="weights that are numbers",
                    fix="export an earlier checkpoint",
                )
    return OnnxFile(
        path=path,
        sha256=artifact.sha256_bytes(data),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        inputs=tuple(_spec(value) for value in model.graph.input if value.name not in weights),
        outputs=tuple(_spec(value) for value in model.graph.output),
        parameters=parameters,
        macs=None,
        parity=None,
        weights=weight_files(path, data),
    )


def float_types(model: onnx.ModelProto) -> frozenset[str]:
    """NumPy's names of the floating-point types that any tensor of the graph has, for example ``{"float32"}``."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    codes = {tensor.data_type for tensor in all_tensors(model)}
    codes |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    names = {str(onnx.helper.tensor_dtype_to_np_dtype(code)) for code in codes if code}
    return frozenset(name for name in names if "float" in name)


def _has_nan(path: Path, tensor: onnx.TensorProto) -> bool:
    import numpy as np
    import onnx

    parts = entries_of(path, tensor) if is_outside(tensor) else iter([onnx.numpy_helper.to_array(tensor)])
    return any(bool(np.isnan(part).any()) for part in parts)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim_{axis}")
    return TensorSpec(value.name, str(dtype), tuple(shape))


def _from_sidecar(path: Path, data: bytes, beside: Path) -> OnnxFile:
    body = artifact.read_json(beside)
    if not isinstance(body, Mapping) or body.get("kind") != "onnx":
        raise _damaged(beside, "it does not describe an ONNX file")
    content = {key: value for key, value in body.items() if key != "digest"}
    if artifact.digest_of(content) != body.get("digest"):
        raise _damaged(beside, "its digest does not match its content")
    if artifact.sha256_bytes(data) != body.get("sha256"):
        raise _damaged(path, f"its SHA-256 is not the one in {beside.name}")
    try:
        parity, weights = body["parity"], tuple(WeightFile(**entry) for entry in body.get("weights", ()))
        for file in weights:
            if not is_plain_name(file.name):
                raise _damaged(beside, f"it names the file {file.name!r}, which is not in its folder")
            file.check(path)
        return OnnxFile(
            path=path,
            sha256=body["sha256"],
            opset=body["opset"],
            inputs=tuple(spec_from_json(entry) for entry in body["inputs"]),
            outputs=tuple(spec_from_json(entry) for entry in body["outputs"]),
            parameters=body["parameters"],
            macs=body["macs"],
            parity=None if parity is None else Parity(**{**parity, "batches": tuple(parity["batches"])}),
            weights=weights,
        )
    except (KeyError, TypeError) as problem:
        raise _damaged(beside, f"{problem!r} while reading it") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist", expected="an ONNX file", fix="check the path") from None
    except OSError as problem:
        raise ArtifactError(
            f"{path} cannot be read ({problem.strerror})", expected="a readable ONNX file", fix="check the path"
        ) from None
    except MemoryError:
        raise ArtifactError(
            f"{path} does not fit into memory", expected="free memory of its size", fix="close other programs"
        ) from None


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: {what}", expected="the file as it was written", fix=REMAKE)
