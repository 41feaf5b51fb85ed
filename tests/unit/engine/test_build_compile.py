"""Compiling with TensorRT-RTX, watched: real progress, real cancelling, and messages that people can read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_samples import write_graph
from onnx import helper, numpy_helper

from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.engine.trt.bindings import compile_onnx
from deploy_sparse.engine.trt.messages import ran_out_of_memory, readable
from deploy_sparse.engine.watch import Progress, Watch
from deploy_sparse.errors import BuildError

TARGET = load_target("rtx-sm89")


@pytest.fixture(autouse=True)
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    """A network that takes a while to compile: convolutions of ever other widths."""
    nodes, weights, channels = [], [], 3
    generator = np.random.default_rng(0)
    for index in range(12):
        width = 16 + 8 * index
        weights.append(numpy_helper.from_array(generator.normal(size=(width, channels, 3, 3)).astype(np.float32), f"w{index}"))  # fmt: skip
        source = f"x{index}" if index else "input"
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}" if index < 11 else "output"]))
        channels = width
    path = tmp_path_factory.mktemp("deep") / "deep.onnx"
    shapes = {"shape": ("n", 3, 32, 32), "out_shape": ("n", channels, 32, 32)}
    return read_onnx(write_graph(path, nodes, initializers=tuple(weights), **shapes))


def compiled(file: OnnxFile, watch: Watch | None = None) -> bytes:
    return compile_onnx(file.read(), TARGET, file.inputs, watch=watch).plan


def test_progress_begins_and_ends_and_never_falls(deep: OnnxFile) -> None:
    seen: list[Progress] = []
    assert len(compiled(deep, Watch(seen.append))) > 1000
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert all(fraction < 1 for fraction in fractions[:-1])
    assert fractions[-1] == 1
    assert len({*fractions}) > 20  # RTX 1.7 reports some 100 steps for any network, in phases within phases
    assert {"Building engine", "Optimizing graph", "compiled"} <= {p.what for p in seen}
    assert [p.elapsed_s for p in seen] == sorted(p.elapsed_s for p in seen)
    assert seen[-1].left_s == 0


def test_cancelling_stops_at_the_next_step_and_the_next_build_is_not_hurt(deep: OnnxFile) -> None:
    began, stop, after = time.perf_counter(), threading.Event(), []
    compiled(deep)
    whole = time.perf_counter() - began

    def progress(found: Progress) -> None:
        if stop.is_set():
            after.append(found)
        if found.what == "Optimizing graph":
            stop.set()

    began = time.perf_counter()
    with pytest.raises(BuildError, match="the build was cancelled"):
        compiled(deep, Watch(progress, cancel=stop))
    assert time.perf_counter() - began < whole / 2
    assert len(after) < 10  # phases that end; no step of another one
    assert len(compiled(deep)) > 1000


def test_a_build_that_is_cancelled_before_it_begins(deep: OnnxFile) -> None:
    seen: list[Progress] = []
    with pytest.raises(BuildError, match="the build was cancelled"):
        compiled(deep, Watch(seen.append, cancel=lambda: True))
    assert not seen


def test_time_limit_stops_a_compilation(deep: OnnxFile) -> None:
    watch = Watch(lambda found: found.what == "Optimizing graph" and time.sleep(0.02), time_limit_s=0.5)
    with pytest.raises(BuildError, match=r"took longer than its limit of 0\.5 s"):
        compiled(deep, watch)


def test_what_progress_raises_reaches_the_caller(deep: OnnxFile, capfd) -> None:
    def fails(found: Progress) -> None:
        if found.fraction > 0.3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled(deep, Watch(fails))
    assert capfd.readouterr() == ("", "")


INTERRUPTED = """
import os, signal, sys
from deploy_sparse.engine.trt.bindings import compile_onnx
from deploy_sparse.engine.onnx.file import read_onnx
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.watch import Watch
file = read_onnx(sys.argv[1])
once = []
def progress(found):
    if found.what == "Optimizing graph" and not once:
        once.append(None)
        os.kill(os.getpid(), signal.SIGINT)
try:
    compile_onnx(file.read(), load_target("rtx-sm89"), file.inputs, watch=Watch(progress))
except KeyboardInterrupt:
    print("interrupted")
print(len(compile_onnx(file.read(), load_target("rtx-sm89"), file.inputs).plan) > 1000)
"""


def test_ctrl_c_ends_a_compilation(deep: OnnxFile) -> None:
    words = [sys.executable, "-c", INTERRUPTED, str(deep.path)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["interrupted", "True"]
    assert found.stderr == ""


def test_ctrl_c_within_the_compiler(deep: OnnxFile) -> None:
    """The signal arrives while C++ runs, at any time; Python sees it when the compiler calls the next time."""

    def compiles_on() -> None:
        while True:
            compiled(deep)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    try:
        for delay in (0.01, 0.05, 0.1):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                compiles_on()
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_compile_one_after_the_other_and_can_be_stopped_while_they_wait(deep: OnnxFile) -> None:
    seen: list[Progress] = []
    with trt_bindings._ONE_AT_A_TIME, pytest.raises(BuildError, match=r"limit of 0\.1 s"):
        compiled(deep, Watch(seen.append, time_limit_s=0.1))
    assert {p.what for p in seen} == {"waiting for another build of this process"}
    assert not trt_bindings._ONE_AT_A_TIME.locked()


# Messages


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile has been defined. In validate at /_src/optimizer/api/network.cpp:4023)",
            "Network has dynamic or shape inputs, but no optimization profile has been defined",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for profile 0 violate shape constraints: IShuffleLayer rs: reshaping failed for tensor: input reshape would change volume 64 to 15 In executeReshape at /_src/runtime/core/shapeMachine.cpp:348 In evaluateShapeChecks at /_src/optimizer/common/shapeCompiler.cpp:1375)",
            "kOPT values for profile 0 violate shape constraints: IShuffleLayer rs: reshaping failed for tensor: input reshape would change volume 64 to 15",
        ),
        (
            "[optimizer.cpp::computeCosts::4048] Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)",
            "Could not find any implementation for node {ForeignNode[a...b]}",
        ),
        (
            "Assertion failed: creator && getPluginCreatorVersion(creator) == CreatorVersion::kV3ONE: NonZero plugin creator version 1 was not found in plugin registry.",
            "NonZero plugin creator version 1 was not found in plugin registry",
        ),
        ("something new", "something new"),
    ],
)  # fmt: skip
def test_messages_are_for_people(said: str, text: str) -> None:
    assert readable([said, "", said]) == text
    driver = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
    assert readable([said, driver]) == text
    assert "CUDA driver version is insufficient" in readable([driver])


def test_each_reason_is_told_once_and_names_the_node(tmp_path: Path) -> None:
    add = helper.make_node("Add", ["input", "s"], ["output"], name="the_sum")
    weight = numpy_helper.from_array(np.ones(7, np.float32), "s")
    path = write_graph(tmp_path / "x.onnx", [add], shape=("n", 8), initializers=(weight,))
    with pytest.raises(BuildError) as caught:
        compile_onnx(path.read_bytes(), TARGET, ())
    reason = caught.value.given.partition("'rtx-sm89': ")[2]
    assert reason == "node 'the_sum' (Add): Invalid Node - the_sum; broadcast dimensions must be conformable"


def test_a_node_without_a_name_goes_by_what_it_writes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["input"], ["h"]), helper.make_node("Det", ["h"], ["output"])]
    found = read_onnx(write_graph(tmp_path / "x.onnx", nodes, shape=("n", 4, 4), out_shape=("n",)))
    with pytest.raises(BuildError, match=r"node 1, which writes 'output' \(Det\): TensorRT has no such operator"):
        compiled(found)


@pytest.mark.parametrize(
    "said",
    [
        "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
    ],
)
def test_too_little_memory_of_the_gpu(deep: OnnxFile, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(trt_bindings, "_add_profile", lambda *_: trt_bindings._errors.append(said))
    with pytest.raises(BuildError, match=r"ran out of memory while it compiled for 'rtx-sm89': (.|\n)*workspace_mib"):
        compiled(deep)


def test_too_little_memory_of_the_machine(deep: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(trt_bindings, "_parse", parse)
    with pytest.raises(BuildError, match="no memory is left on this machine"):
        compiled(deep)
    monkeypatch.undo()
    assert compiled(deep)


def test_other_errors_are_not_about_memory() -> None:
    assert not ran_out_of_memory(["Error Code 4: API Usage Error (Network must have at least one output)"])


@pytest.mark.parametrize(("path", "arguments"), [(None, ()), (Path("/x/net.onnx"), ("/x/net.onnx",))])
def test_weights_beside_the_graph_are_found_when_filled_in(path: Path | None, arguments: tuple[str, ...]) -> None:
    """Full TensorRT's refitter, by a stand-in: it looks for them in the folder of a path."""
    seen: list[tuple[object, ...]] = []
    parser = SimpleNamespace(refit_from_bytes=lambda *given: seen.append(given) or True)
    trt = SimpleNamespace(
        Refitter=lambda *_: SimpleNamespace(refit_cuda_engine=lambda: True), OnnxParserRefitter=lambda *_: parser
    )
    assert trt_bindings.refitted(trt, "engine", b"graph", "logger", path)
    assert seen == [(b"graph", *arguments)]


def test_the_library_has_what_watching_and_weights_beside_the_graph_need(rtx) -> None:
    assert {"phase_start", "step_complete", "phase_finish"} <= {*dir(rtx.IProgressMonitor)}
    assert "progress_monitor" in dir(rtx.IBuilderConfig)
    for method in (rtx.OnnxParser.parse, rtx.OnnxParserRefitter.refit_from_bytes):
        assert "path: " in method.__doc__
