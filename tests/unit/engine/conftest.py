"""One small network, exported and built once for the whole room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engine_samples import TinyNet, make_tiny

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.engine.onnx.file import OnnxFile
from deploy_sparse.engine.trt import bindings as trt_bindings


@pytest.fixture(scope="session")
def tiny() -> TinyNet:
    return make_tiny()


@pytest.fixture(scope="session")
def examples() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def exported(tiny: TinyNet, examples: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(tiny, examples, tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="session")
def built(exported: OnnxFile, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(exported, "cpu", out=tmp_path_factory.mktemp("cpu"), name="tiny")


@pytest.fixture(scope="session")
def built_rtx(exported: OnnxFile, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    return build_engine(exported, "rtx-sm89", out=tmp_path_factory.mktemp("rtx"), name="tiny")


@pytest.fixture
def entry(built: Engine, tmp_path: Path) -> Path:
    """A copy of the CPU engine's folder that a test may damage."""
    return Path(shutil.copytree(built.folder, tmp_path / built.folder.name))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty folder for engines."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


GPU_TARGETS = [("rtx-portable", "tensorrt_rtx"), ("tensorrt", "tensorrt")]


@pytest.fixture(params=GPU_TARGETS, ids=[name for name, _ in GPU_TARGETS])
def engine(request: pytest.FixtureRequest, exported: OnnxFile, tmp_path: Path) -> Engine:
    """One of a TensorRT flavour that runs on this machine's GPU."""
    target, library = request.param
    pytest.importorskip(library, reason=f"needs {library}", exc_type=ImportError)
    if trt_bindings.local_gpu() is None:
        pytest.skip("no NVIDIA GPU here")
    engine = build_engine(exported, target, out=tmp_path)
    if reason := engine.runnable():
        pytest.skip(reason)
    return engine
