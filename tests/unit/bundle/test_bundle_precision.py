"""Zip bundles in precisions below float32: what travels, what is rebuilt, and to what it is held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundle_samples import write_graph, write_network
from onnx import TensorProto, helper

from deploy_sparse.bundle import bundle_engine, open_bundle
from deploy_sparse.bundle.graph import run_graph
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.onnx.runtime import OrtSession
from deploy_sparse.errors import BuildError, ConfigError

CALIBRATION = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("target", "precision", "tolerance"),
    [("cpu", "int8", 2**-3), ("rtx-sm89", "fp16", 2**-6), ("rtx-sm89", "bf16", 2**-3)],
)
def test_lower_precisions(tmp_path: Path, target: str, precision: str, tolerance: float) -> None:
    if target != "cpu":
        pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)
    file = write_network(tmp_path / "net.onnx")
    engine = build_engine(file, target, out=tmp_path / "out", name="net", precision=precision, calibration=CALIBRATION)
    path = bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path
    proof = open_bundle(path).verify()
    assert (proof.max_rel, proof.tolerance) == (0.0, tolerance)
    rebuilt = open_bundle(path).rebuild(tmp_path / "again").engine  # from the lowered graph: no calibration any more
    assert rebuilt.manifest["precision"]["built"] == precision
    assert (rebuilt.folder / "model.onnx").read_bytes() == (engine.folder / "model.onnx").read_bytes()


def test_an_fp32_bundle_is_rebuilt_in_int8_with_data(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "low.toml").write_text('inherits = "cpu"\nprecision = "int8"\n')
    bundle = open_bundle(sealed)
    with pytest.raises(ConfigError, match="int8 without calibration data"):
        bundle.rebuild(tmp_path / "out", target=tmp_path / "low.toml")
    proof = bundle.rebuild(tmp_path / "out", target=tmp_path / "low.toml", calibration=CALIBRATION).proof
    assert 0.0 < proof.max_rel < proof.tolerance == 2**-3


def test_bf16_graphs_are_computed_in_float32(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["input"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["weight"], ["low_weight"], to=TensorProto.BFLOAT16),
        helper.make_node("Softplus", ["low"], ["soft"]),
        helper.make_node("MatMul", ["soft", "low_weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["output"], to=TensorProto.FLOAT),
    ]
    shapes = {"input": ("batch", 6)}, {"output": ("batch", 5)}
    file = write_graph(tmp_path / "b.onnx", nodes, *shapes, {"weight": weight}, opset=22)
    with pytest.raises(BuildError, match="Could not find an implementation"):
        OrtSession(file.read_bytes())
    feeds = {"input": random.standard_normal((3, 6)).astype(np.float32)}
    expected = np.log1p(np.exp(feeds["input"])) @ weight
    np.testing.assert_allclose(run_graph(file, feeds)["output"], expected, rtol=1e-5, atol=1e-5)
    nodes = [helper.make_node("Softplus", ["input"], ["output"])]
    kinds = {"input": TensorProto.BFLOAT16, "output": TensorProto.BFLOAT16}
    file = write_graph(
        tmp_path / "c.onnx", nodes, {"input": ("batch", 6)}, {"output": ("batch", 6)}, kinds=kinds, opset=22
    )
    with pytest.raises(BuildError, match="Could not find an implementation"):
        run_graph(file, feeds)


def test_a_lower_precision_stays_for_another_target(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx")
    engine = build_engine(file, "cpu", out=tmp_path / "out", precision="int8", calibration=CALIBRATION)
    bundle = open_bundle(bundle_engine(engine, format="zip", out=tmp_path / "net.zip").path)
    (tmp_path / "threads.toml").write_text('inherits = "cpu"\nname = "threads"\nthreads = 2\n')
    done = bundle.rebuild(tmp_path / "again", target=tmp_path / "threads.toml")
    assert (done.engine.target.name, done.engine.manifest["precision"]["built"]) == ("threads-int8", "int8")
    assert done.proof.tolerance == 2**-3
    (tmp_path / "half.toml").write_text('inherits = "cpu"\nname = "half"\nprecision = "fp16"\n')
    with pytest.raises(BuildError, match="asked for fp16, but of 2 layers"):
        bundle.rebuild(tmp_path / "again", target=tmp_path / "half.toml")
