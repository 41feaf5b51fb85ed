"""TensorRT flavours on a real GPU, against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy_sparse.engine import _trt
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine
from deploy_sparse.engine.onnx_file import OnnxFile
from deploy_sparse.errors import EngineError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("target", "library"), [("rtx-portable", "tensorrt_rtx"), ("tensorrt", "tensorrt")])
def test_gpu_engine_computes_what_the_cpu_computes(
    target: str, library: str, exported: OnnxFile, built: Engine, tmp_path: Path
) -> None:
    pytest.importorskip(library, reason=f"needs {library}", exc_type=ImportError)
    if _trt.local_gpu() is None:
        pytest.skip("no NVIDIA GPU here")
    engine = build_engine(exported, target, out=tmp_path)
    if reason := engine.runnable():
        pytest.skip(reason)
    with engine.open() as on_gpu, built.open() as on_cpu:
        for batch in (1, 3, 64):
            feeds = on_gpu.sample_inputs(batch, seed=batch)
            actual, expected = on_gpu.run(feeds)["output"], on_cpu.run(feeds)["output"]
            np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
            run = on_gpu.prepare(feeds)
            run()
            np.testing.assert_array_equal(on_gpu.run(feeds)["output"], actual)
        with pytest.raises(EngineError, match="batch 65 is outside"):
            on_gpu.run({"input": np.zeros((65, 1, 8, 8), np.float32)})
