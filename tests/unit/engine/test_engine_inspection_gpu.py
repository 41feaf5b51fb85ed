"""TensorRT's own inspector, and bundles that are rebuilt and run on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_sparse.bundle import bundle_engine, open_bundle
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.inspection import inspect_engine

pytestmark = pytest.mark.gpu


def test_the_inspector_tells_layers_and_shapes(engine: Engine) -> None:
    found = inspect_engine(engine)
    assert (found.source, found.why) == ("TensorRT's inspector", None)
    assert found.layers
    tensors = [tensor for layer in found.layers for tensor in (*layer.inputs, *layer.outputs)]
    assert engine.manifest["batch"]["opt"] in {tensor.shape[0] for tensor in tensors if tensor.shape}
    assert {tensor.precision for tensor in tensors} >= {"fp32"}


def test_a_bundle_is_rebuilt_and_run_on_the_gpu(engine: Engine, tmp_path: Path) -> None:
    path = bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path
    proof = open_bundle(path).rebuild(tmp_path / "again").proof
    assert proof.subject == f"the engine for {engine.target.name}"
    assert proof.max_rel <= proof.tolerance == 1e-4
