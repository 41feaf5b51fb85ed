"""A model repository that Triton Inference Server loads: ``<model>/config.pbtxt`` and ``<model>/1/`` with the engine.

The configuration follows ``model_config.proto`` of Triton's ``common`` repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.entry import KIND, ONNX_FILE, OWN_FILES, PLAN_FILE, Engine
from ..engine.fit import gpus
from ..engine.tensors import TensorSpec, sample_feeds
from ..errors import ConfigError, EngineError
from .placing import Content, content, place_folder
from .sample import is_plain

CONFIG_FILE = "config.pbtxt"
LABELS_FILE = "labels.txt"
VERSION = "1"
_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class _Shapes:
    """How Triton sees the engine's tensors.

    Attributes:
        max_batch: Triton's ``max_batch_size``; 0: requests bring their whole shape, and Triton joins none of them.
        opt, max: batch sizes that the engine is tuned for, and takes.
        extents: what other dynamic axes are tuned for, by name.
    """

    max_batch: int
    opt: int
    max: int
    extents: Mapping[str, int]

    def dims(self, spec: TensorSpec) -> list[int]:
        """Extents without the batch that Triton adds; dynamic ones are -1."""
        shape = spec.shape[1:] if self.max_batch else spec.shape
        return [extent if isinstance(extent, int) else -1 for extent in shape]


def place_model(engine: Engine, repository: Path, name: str, labels: Sequence[str] | None) -> Path:
    """Write one model into a repository and return its folder, ``repository/name``.

    Args:
        engine: a verified engine.
        repository: created when missing; other models in it stay as they are.
        name: of the model.
        labels: names of the classes, in the order of the last axis of the first output.

    Raises:
        EngineError: no backend of Triton takes the engine. ConfigError: labels that do not fit.
        ArtifactError: the folder exists with other content, or cannot be written.
    """
    file = _served_file(engine)
    _check_labels(engine, labels)
    shapes = _shapes(engine)
    held = engine.manifest["files"]
    files = {
        f"{VERSION}/{'model.plan' if held_name == PLAN_FILE else held_name}": Content(
            engine.folder / held_name, entry["bytes"], entry["sha256"]
        )
        for held_name, entry in held.items()
        if held_name == file or (file == ONNX_FILE and _is_weights(held_name))
    }
    warm = _warmup_files(engine.inputs, shapes)
    files |= {f"warmup/{key}": content(data) for key, data in warm.items()}
    files[CONFIG_FILE] = content(config_text(engine, name, labels=bool(labels)).encode())
    files[f"{KIND}.json"] = content((engine.folder / f"{KIND}.json").read_bytes())
    if labels:
        files[LABELS_FILE] = content(("\n".join(labels) + "\n").encode())
    place_folder(repository / name, files)
    return repository / name


def config_text(engine: Engine, name: str, *, labels: bool = False) -> str:
    """``config.pbtxt`` of an engine.

    The batch axis is Triton's to fill where every tensor has one and the engine takes a single sample; otherwise
    ``max_batch_size`` is 0 and shapes are whole.

    Raises:
        EngineError: a tensor of a type that Triton does not have, or no backend takes the engine.
    """
    on_gpu = _served_file(engine) == PLAN_FILE
    shapes = _shapes(engine)
    lines = [
        f"name: {_quoted(name)}",
        f"platform: {_quoted('tensorrt_plan' if on_gpu else 'onnxruntime_onnx')}",
        f"max_batch_size: {shapes.max_batch}",
    ]
    lines += [_tensor("input", spec, shapes, None) for spec in engine.inputs]
    lines += [
        _tensor("output", spec, shapes, LABELS_FILE if labels and index == 0 else None)
        for index, spec in enumerate(engine.outputs)
    ]
    lines.append(f"instance_group {{ count: 1 kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'} }}")
    if shapes.max_batch > 1:
        preferred = "".join(f" preferred_batch_size: {size}" for size in _sizes(shapes) if size > 1)
        lines.append(f"dynamic_batching {{{preferred} }}")
    lines += [_warmup(engine.inputs, shapes, batch) for batch in _sizes(shapes)]
    if not on_gpu:
        for key, value in (("intra_op_thread_count", engine.target.threads), ("inter_op_thread_count", 1)):
            lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(str(value))} }} }}")
    return "\n".join(lines) + "\n"


def served_by(engine: Engine) -> tuple[str, ...]:
    """What the server has to be like, one line each."""
    runtime = engine.manifest["runtime"]
    if engine.path.name != PLAN_FILE:
        return (f"the server's ONNX Runtime has to know opset {engine.manifest['opset']}",)
    forward = engine.target.version_compatible
    notes = [f"the server needs TensorRT {runtime['version']}{' or later' if forward else ''}, {gpus(engine.manifest)}"]
    if forward:
        notes.append("start it with --backend-config=tensorrt,version-compatible=true: the engine holds host code")
    return tuple(notes)


def _served_file(engine: Engine) -> str:
    """The file that a backend of Triton opens.

    Raises:
        EngineError: none does.
    """
    runtime, file = engine.target.runtime, str(engine.manifest["engine_file"])
    if runtime == "tensorrt" and engine.target.strip:
        raise EngineError(
            f"{engine.folder} is an engine without weights, which Triton does not fill in",
            expected="an engine with its weights",
            fix="build it for a target with strip = false",
        )
    if (runtime, file) in (("tensorrt", PLAN_FILE), ("onnxruntime", ONNX_FILE)):
        return file
    if runtime == "tensorrt-rtx":
        low = {"bf16", "fp8"} & {*engine.manifest["precision"]["built"].split(" + ")}  # ONNX Runtime has none on CPUs
        raise EngineError(
            f"{engine.folder} is an engine of TensorRT-RTX, for which Triton has no backend",
            expected="an engine of full TensorRT or ONNX Runtime",
            fix=f"on the server: {engine.build_command('tensorrt')}"
            + ("" if low else f"; or for its CPU: {engine.build_command('cpu')}"),
        )
    raise EngineError(
        f"{engine.folder} is a program of torch.export, which Triton's PyTorch backend does not take: it runs "
        "TorchScript and packages of AOTInductor",
        expected="an engine of full TensorRT or ONNX Runtime",
        fix="build the network for cpu, or on the server for tensorrt, and bundle that",
    )


def _is_weights(name: str) -> bool:
    """Whether a file of an engine holds weights of ``model.onnx`` that are not in the graph itself."""
    return name not in OWN_FILES


def _shapes(engine: Engine) -> _Shapes:
    batch = engine.manifest["batch"]
    joined = batch["min"] == 1 and all(spec.batched for spec in (*engine.inputs, *engine.outputs))
    extents = {name: extent["opt"] for name, extent in engine.axes.items()}
    return _Shapes(batch["max"] if joined else 0, batch["opt"], batch["max"], extents)


def _sizes(shapes: _Shapes) -> list[int]:
    """The batch that the engine is tuned for, and the largest; each once."""
    return list(dict.fromkeys((shapes.opt, shapes.max)))


def _tensor(field: str, spec: TensorSpec, shapes: _Shapes, labels: str | None) -> str:
    dims = shapes.dims(spec)
    parts = [f"name: {_quoted(spec.name)}", f"data_type: {_type(spec)}"]
    parts.append(f"dims: [ {', '.join(map(str, dims or [1]))} ]")
    if not dims:
        parts.append("reshape { }")  # Triton's shapes have at least one axis
    if labels:
        parts.append(f"label_filename: {_quoted(labels)}")
    return "\n".join([f"{field} {{", *(f"  {part}" for part in parts), "}"])


def _warmup(inputs: Sequence[TensorSpec], shapes: _Shapes, batch: int) -> str:
    """One warm-up request; where Triton fills the batch axis, it repeats the one row that is in the file."""
    lines = ["model_warmup {", f'  name: "batch {batch}"', f"  batch_size: {batch if shapes.max_batch else 1}"]
    for index, spec in enumerate(inputs):
        whole = spec.concrete(batch, shapes.extents)
        dims = (whole[1:] if shapes.max_batch else whole) or (1,)
        data = (
            f"input_data_file: {_quoted(_warmup_name(index, batch, shapes))}" if is_plain(spec) else "zero_data: true"
        )
        value = f"data_type: {_type(spec)} dims: [ {', '.join(map(str, dims))} ] {data}"
        lines.append(f"  inputs {{ key: {_quoted(spec.name)} value {{ {value} }} }}")
    return "\n".join([*lines, "}"])


def _warmup_files(inputs: Sequence[TensorSpec], shapes: _Shapes) -> dict[str, bytes]:
    """Seeded inputs as raw, row-major, little-endian bytes."""
    found = {}
    for batch in _sizes(shapes):
        for index, spec in enumerate(inputs):
            if is_plain(spec):
                array = sample_feeds([spec], 1 if shapes.max_batch else batch, index, shapes.extents)[spec.name]
                found[_warmup_name(index, batch, shapes)] = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return found


def _warmup_name(index: int, batch: int, shapes: _Shapes) -> str:
    return f"input_{index}" if shapes.max_batch else f"input_{index}_batch_{batch}"


def _type(spec: TensorSpec) -> str:
    if spec.dtype not in _TYPES:
        raise EngineError(
            f"{spec} has a type that Triton does not have",
            expected=f"one of {', '.join(_TYPES)}",
            fix="let the network convert it inside: inputs and outputs in float32",
        )
    return _TYPES[spec.dtype]


def _quoted(text: str) -> str:
    """A string of protobuf's text format, which takes the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _check_labels(engine: Engine, labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    classes = engine.outputs[0].shape[-1] if engine.outputs and engine.outputs[0].shape else None
    if classes != len(labels) or any(not label.strip() or "\n" in label for label in labels):
        raise ConfigError(
            f"{len(labels)} labels for the output {engine.outputs[0] if engine.outputs else 'that is not there'}",
            expected=f"{classes} names, one a line" if isinstance(classes, int) else "an output with a fixed last axis",
            fix="give one name for each class, in their order",
        )
