"""One small network, built for the CPU and bundled once for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_samples import write_network

from deploy_sparse.bundle import bundle_engine
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("bundle-engine")
    return build_engine(write_network(folder / "net.onnx"), "cpu", out=folder / "out", name="net")


@pytest.fixture(scope="session")
def sealed(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_engine(engine, format="zip", out=tmp_path_factory.mktemp("bundle-zip") / "net.zip").path
