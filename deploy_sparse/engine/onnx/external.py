"""Weights that an ONNX file keeps in other files beside it ("external data"): found, checked, and written.

Protobuf ends at 2 GiB, so the weights of a larger network have to be kept like this. Only plain files in the very
folder of the ONNX file are taken; paths into other folders and links are refused, and so is a file that is too short.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifact import sha256_bytes, sha256_file
from ...errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import onnx

MARK = b"location"
"""A key that any ONNX file with external data has in its bytes."""
_ALIGNED = 4096  # bytes; runtimes map such weights into memory instead of copying them
_WORTH_MOVING = 1024  # bytes
_LARGE = 1 << 14  # entries; no shape has as many, and whatever has fewer is read with the graph
_AT_ONCE = 1 << 24  # entries
_PACKED = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}  # bits of an entry, several to a byte


@dataclass(frozen=True)
class WeightFile:
    """A file with weights of an ONNX file, beside it; ``name`` is a plain one, ``sha256`` of all its ``bytes``."""

    name: str
    bytes: int
    sha256: str

    def check(self, onnx_path: Path) -> None:
        """Compare the file beside ``onnx_path`` with this, without reading it into memory.

        Raises:
            ArtifactError: it is missing, or another one by now.
        """
        if self != _weight_file(onnx_path, self.name):
            raise _altered(onnx_path, self.name)

    def read(self, onnx_path: Path) -> memoryview:
        """The file's verified content, mapped into memory: pages of it are read when they are touched.

        Raises:
            ArtifactError: as :meth:`check`.
        """
        path = _regular(onnx_path, self.name)
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        except OSError as problem:
            raise _unreadable(path, problem) from None
        if size != self.bytes or sha256_bytes(data) != self.sha256:
            raise _altered(onnx_path, self.name)
        return data


@dataclass(frozen=True)
class _Span:
    """Where a tensor's entries are: ``bytes`` of them from ``offset`` on in the file ``name``."""

    name: str
    offset: int
    bytes: int


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: initializers and constants of its graph, its branches and its functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _of_node(node)


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's entries are in another file."""
    return bool(tensor.data_location == type(tensor).EXTERNAL)


def weight_files(path: Path, data: bytes) -> tuple[WeightFile, ...]:
    """The files that hold weights of the ONNX file at ``path``, whose bytes are ``data``.

    Raises:
        ArtifactError: a file that is missing, too short, no plain file, or not in the folder of ``path``.
    """
    if MARK not in data:
        return ()
    import onnx

    model = onnx.load_model_from_string(data)
    names = {_span(path, tensor).name for tensor in all_tensors(model) if is_outside(tensor)}
    return tuple(_weight_file(path, name) for name in sorted(names))


def read_small_(path: Path, model: onnx.ModelProto) -> None:
    """Read what is small into the model, such as shapes, which inferring others needs. Large weights stay outside.

    Raises:
        ArtifactError: as :func:`weight_files`, for any of them.
    """
    large = {tensor.name for tensor in _large(model)}
    for tensor in all_tensors(model):
        if is_outside(tensor):
            _span(path, tensor)
            if tensor.name not in large:
                tensor.raw_data = b"".join(part.tobytes() for part in entries_of(path, tensor))
                tensor.data_location = type(tensor).DEFAULT
                del tensor.external_data[:]


def without_large(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the same types and shapes with large weights as inputs, which ONNX's checker takes from any place.

    ``model`` itself where it holds all its weights.
    """
    large = _large(model)
    if not large:
        return model
    import onnx

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    names = {tensor.name for tensor in large}
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    given = {value.name for value in twin.graph.input}
    for tensor in large:
        if tensor.name not in given:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            twin.graph.input.append(value)
    return twin


def _large(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [x for x in model.graph.initializer if is_outside(x) and math.prod(x.dims) >= _LARGE]


def entries_of(path: Path, tensor: onnx.TensorProto) -> Iterator[np.ndarray]:
    """The entries of a tensor in another file, a part at a time, flat.

    Raises:
        ArtifactError: as :func:`weight_files`.
    """
    import numpy as np

    span, dtype = _span(path, tensor), _dtype(tensor)
    with open(path.parent / span.name, "rb") as stream:
        stream.seek(span.offset)
        left = span.bytes
        while left:
            data = stream.read(min(left, _AT_ONCE * dtype.itemsize))
            if not data:
                raise _altered(path, span.name)  # cut while this reads
            left -= len(data)
            yield np.frombuffer(data, np.uint8 if str(dtype) in _PACKED else dtype)


def move_out_(model: onnx.ModelProto, path: Path) -> None:
    """Write the large initializers of a model to the new file ``path``, in their order, and take them out of it."""
    from onnx.external_data_helper import set_external_data

    with open(path, "xb") as stream:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= _WORTH_MOVING:
                stream.write(b"\0" * (-stream.tell() % _ALIGNED))
                set_external_data(tensor, path.name, stream.tell(), len(tensor.raw_data))
                stream.write(tensor.raw_data)
                tensor.ClearField("raw_data")
        stream.flush()
        os.fsync(stream.fileno())


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from _fields(attribute, "t", "tensors")
        for sparse in _fields(attribute, "sparse_tensor", "sparse_tensors"):
            yield from (sparse.values, sparse.indices)
        for graph in _fields(attribute, "g", "graphs"):
            yield from _of_graph(graph)


def _fields(attribute: onnx.AttributeProto, one: str, many: str) -> Iterator[Any]:
    if attribute.HasField(one):
        yield getattr(attribute, one)
    yield from getattr(attribute, many)


def _span(path: Path, tensor: onnx.TensorProto) -> _Span:
    asked = {entry.key: entry.value for entry in tensor.external_data}
    name = asked.get("location", "")
    if not is_plain_name(name) or name == path.name:
        raise ArtifactError(
            f"{path} keeps weight {tensor.name!r} in {name!r}",
            expected="a file of another name in the same folder",
            fix="where you trust the file, save it anew with its weights in one file beside it: "
            "onnx.save(onnx.load(path), new_path, save_as_external_data=True, location='weights.bin')",
        )
    try:
        wanted = _bytes_of(tensor)
        offset = int(asked.get("offset", 0))
        found = int(asked["length"]) if "length" in asked else _regular(path, name).stat().st_size - offset
    except (KeyError, ValueError, TypeError) as problem:
        raise ArtifactError(
            f"{path} does not say where in {name} weight {tensor.name!r} is ({problem})",
            expected="a known type of number, with an offset and a length in bytes",
            fix="export it again",
        ) from None
    size = _regular(path, name).stat().st_size
    if offset < 0 or offset + wanted > size:
        raise ArtifactError(
            f"{path.parent / name} is too short for weight {tensor.name!r} of {path.name}: that ends at byte "
            f"{offset + wanted}, the file at {size}",
            expected="the whole file that was written with it",
            fix="copy both files again, or export them again",
        )
    if found != wanted:
        raise ArtifactError(
            f"{path} gives weight {tensor.name!r} {found} bytes in {name}",
            expected=f"{wanted} bytes, as its shape and type say",
            fix="export it again",
        )
    return _Span(name, offset, wanted)


def is_plain_name(name: str) -> bool:
    """Whether this names a file in a given folder, on any system, and none outside of it."""
    return bool(name) and name not in (".", "..") and not set(name) & set('/\\:\0\n"')


def _bytes_of(tensor: onnx.TensorProto) -> int:
    dtype = _dtype(tensor)
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"its shape is {tuple(tensor.dims)}")
    bits: int = math.prod(tensor.dims) * _PACKED.get(str(dtype), 8 * dtype.itemsize)
    return (bits + 7) // 8


def _dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        raise ValueError("texts")
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)


def _weight_file(path: Path, name: str) -> WeightFile:
    found = _regular(path, name)
    try:
        return WeightFile(name, found.stat().st_size, sha256_file(found))
    except OSError as problem:
        raise _unreadable(found, problem) from None


def _regular(path: Path, name: str) -> Path:
    """The file ``name`` beside ``path``, which is no link."""
    found = path.parent / name
    try:
        mode = found.lstat().st_mode
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} keeps weights in {name}, which is missing",
            expected=f"that file in {path.parent}",
            fix="copy it there too, or export the network again",
        ) from None
    except OSError as problem:
        raise _unreadable(found, problem) from None
    if not stat.S_ISREG(mode):
        raise ArtifactError(
            f"{path} keeps weights in {name}, which is {'a link' if stat.S_ISLNK(mode) else 'no file'}",
            expected="a file with the weights themselves",
            fix="put the file itself there",
        )
    return found


def _altered(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{path.parent / name} is damaged: its size or its SHA-256 is not the one that {path.name} was read with",
        expected="the file as it was written",
        fix="copy both files again, or export the network again",
    )


def _unreadable(path: Path, problem: OSError) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read ({problem.strerror})", expected="a readable file of weights", fix="check the path"
    )
