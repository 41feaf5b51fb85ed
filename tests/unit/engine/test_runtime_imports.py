"""Loading and running needs neither torch nor onnx: importing either is an error in these programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy_sparse.engine.entry import Engine

FORBID = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "triton", "torchvision"):
            raise ImportError(f"{name} is forbidden here")

sys.meta_path.insert(0, Forbidden())
"""


def ended(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", FORBID + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)


def program(code: str, *arguments: object) -> str:
    done = ended(code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_the_programs_notice_an_import(name: str) -> None:
    done = ended(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: {name} is forbidden here" in done.stderr


def test_an_engine_of_onnx_runtime(built: Engine) -> None:
    code = """
import numpy as np
import deploy_sparse
with deploy_sparse.load_engine(sys.argv[1]) as engine:
    out = {"output": np.empty((2, 10), np.float32)}
    assert engine.run(engine.sample_inputs(2), out)["output"] is out["output"]
    engine.prepare(engine.sample_inputs(2))()
print(np.abs(out["output"]).sum() > 0, {"torch", "onnx"} & set(sys.modules))
"""
    assert program(code, built.folder) == "True set()\n"


def test_an_engine_of_tensorrt(built_rtx: Engine) -> None:
    """With stand-ins for TensorRT, cuda-python and the driver; everything between is what runs on a GPU."""
    code = """
import numpy as np
from runtime_fakes import FakeGpu, Foreign, image_engine, install, scores
gpu = FakeGpu()
fake = image_engine(gpu)
install(gpu, fake, "tensorrt-rtx", sys.argv[2])
import deploy_sparse
with deploy_sparse.load_engine(sys.argv[1], contexts=2, cuda_graph=True) as engine:
    assert len(fake.made) == 2
    feeds = engine.sample_inputs(3)
    expected = scores(feeds["input"])
    assert np.array_equal(engine.run(feeds)["output"], expected)
    assert np.array_equal(engine.run_on_gpu({"input": Foreign(gpu, feeds["input"])})["output"].numpy(), expected)
    engine.prepare(feeds)()
print(gpu.is_clean(), gpu.launches, {"torch", "onnx"} & set(sys.modules))
"""
    assert program(code, built_rtx.folder, built_rtx.manifest["runtime"]["version"]) == "True 3 set()\n"


def test_a_tensorrt_engine_without_a_gpu_says_so_without_torch(built_rtx: Engine) -> None:
    code = """
from deploy_sparse.engine.cuda import gpu
gpu._driver = lambda: None
import deploy_sparse
from deploy_sparse.errors import EngineError
try:
    deploy_sparse.load_engine(sys.argv[1])
except EngineError as problem:
    print(problem.given.rpartition("here: ")[2])
"""
    assert program(code, built_rtx.folder) == "no NVIDIA GPU\n"


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_reports_nothing_unless_it_is_told_to(tmp_path: Path, own: str | None, expected: str) -> None:
    """Not from an engine that is loaded, and whatever part of the toolkit comes first; where it would, it says so."""
    code = "import os, deploy_sparse.engine.precision.agreement; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    given = {"PATH": "", "TMPDIR": str(tmp_path)} | ({} if own is None else {"ORT_DISABLE_TELEMETRY": own})
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
    assert own == "0" or not list(tmp_path.iterdir())  # its session's file
