"""Reading ONNX files: with a sidecar verified to the bit, without one checked as far as ONNX can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_samples import write_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy_sparse.engine.onnx.file import OnnxFile, float_types, read_onnx, sidecar_path
from deploy_sparse.errors import ArtifactError


@pytest.fixture
def copy(exported: OnnxFile, tmp_path: Path) -> Path:
    path = tmp_path / "copy.onnx"
    shutil.copy(exported.path, path)
    shutil.copy(sidecar_path(exported.path), sidecar_path(path))
    return path


def test_round_trip(exported: OnnxFile, copy: Path) -> None:
    found = read_onnx(exported.path)
    assert found == exported
    assert read_onnx(str(copy)).sha256 == exported.sha256


def test_foreign_file(exported: OnnxFile, copy: Path) -> None:
    sidecar_path(copy).unlink()
    found = read_onnx(copy)
    assert (found.sha256, found.opset, found.inputs) == (exported.sha256, exported.opset, exported.inputs)
    assert found.macs is None
    assert found.parity is None
    assert found.parameters == 4 * 9 + 4 + 8 * 4 * 9 + 8 + 80 + 10  # BatchNorm became the first bias


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0), bit=st.integers(0, 7), cut=st.integers(1))
def test_any_flip_or_cut_is_found(copy: Path, position: int, bit: int, cut: int) -> None:
    intact = read_onnx(copy)
    for path in (copy, sidecar_path(copy)):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[position % len(good)] ^= 1 << bit
        for bad in (bytes(flipped), good[: len(good) - 1 - cut % (len(good) - 1)]):
            path.write_bytes(bad)
            try:
                found = read_onnx(copy)
            except ArtifactError:
                continue
            assert path != copy  # JSON may change without changing its content: 1e-7 and 1E-7
            assert found == intact
        path.write_bytes(good)
    read_onnx(copy)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n rest", b'{"kind": "ticket"}', b"\x00" * 64])
def test_no_onnx_at_all(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is not a valid ONNX file"):
        read_onnx(path)


def test_truncated_foreign_file(exported: OnnxFile, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    for share in (0.2, 0.5, 0.95):
        path.write_bytes(exported.read()[: int(exported.path.stat().st_size * share)])
        with pytest.raises(ArtifactError, match="is not a valid ONNX file"):
            read_onnx(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.onnx does not exist"):
        read_onnx(tmp_path / "gone.onnx")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_onnx(tmp_path)


def test_sidecar_of_something_else(copy: Path) -> None:
    sidecar_path(copy).write_text(json.dumps({"kind": "ticket"}))
    with pytest.raises(ArtifactError, match="does not describe an ONNX file"):
        read_onnx(copy)


def test_weights_in_another_folder_are_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4,), np.float32), "w")
    path = write_graph(
        tmp_path / "x.onnx", [helper.make_node("Add", ["input", "w"], ["output"])], initializers=(weight,)
    )
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"keeps weight 'w' in '\.\./\.\./secret'"):
        read_onnx(path)


def test_nan_weight_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.array([1, np.nan, 1, 1], np.float32), "w")
    path = write_graph(
        tmp_path / "x.onnx", [helper.make_node("Add", ["input", "w"], ["output"])], initializers=(weight,)
    )
    with pytest.raises(ArtifactError, match="has NaN in weight 'w'"):
        read_onnx(path)


def test_float_types(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["input"], ["h"], to=TensorProto.FLOAT16)]
    nodes.append(helper.make_node("Cast", ["h"], ["output"], to=TensorProto.FLOAT))
    assert float_types(onnx.load(write_graph(tmp_path / "x.onnx", nodes))) == {"float32", "float16"}
