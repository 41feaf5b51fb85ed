"""SIGTERM and SIGHUP end a build as Ctrl-C does: nothing is left, and the exit code tells which it was."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from deploy_sparse.cli.stopping import ended_cleanly
from deploy_sparse.errors import Interrupted

PROGRAM = """
import os, signal, sys
from deploy_sparse.cli.main import main
from deploy_sparse.engine import backends

for number in (signal.SIGTERM, signal.SIGHUP):  # nohup has SIGHUP ignored
    signal.signal(number, signal.SIG_DFL)
before = signal.getsignal(signal.SIGTERM)

def compiled(*_):
    found = os.listdir(os.environ["TMPDIR"])
    assert any(name.startswith("deploy-sparse-") for name in found), found  # what a signal must not leave
    signal.raise_signal(getattr(signal, sys.argv[1]))
    raise AssertionError("the build went on")

backends._OnnxRuntime._compiled = compiled
code = main(["build", sys.argv[2], "--out", sys.argv[3]])
assert signal.getsignal(signal.SIGTERM) is before
raise SystemExit(code)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path, name: str) -> None:
    tensors = [helper.make_tensor_value_info(word, TensorProto.FLOAT, ("n", 2)) for word in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "g", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, tmp_path / "net.onnx", tmp_path / "out"],
        env={"TMPDIR": str(scratch), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert done.stderr.startswith(f"error: stopped by {name}: what was under way is removed\n")
    assert "next step: start it again" in done.stderr
    assert not list(scratch.glob("deploy-sparse-*"))
    assert not (tmp_path / "out").exists()


def stopped_twice(seen: list[int]) -> None:
    with ended_cleanly():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # while it cleans up: it is not disturbed
            seen.append(-1)


def test_signals_that_somebody_handles_or_ignores_stay_so() -> None:
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ended_cleanly():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(Interrupted) as caught:
            stopped_twice(seen)
        assert (caught.value.exit_code, seen[-1]) == (143, -1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
