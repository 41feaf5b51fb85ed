"""TensorRT's profiler on an engine of host code: times by layer, runs told apart, names of fused layers."""

from __future__ import annotations

import json
from enum import Enum

import pytest
from cuda_fakes import FakeGpu
from runtime_fakes import CUDA, FakeContext, FakeEngine, Types, fake_tensorrt, images, scores

from deploy_sparse.engine.layer_times import Floors, NodeTime
from deploy_sparse.engine.trt import session as trt_session
from deploy_sparse.engine.trt.profiling import _recorder, nodes_in, with_nodes
from deploy_sparse.engine.trt.session import TrtSession
from deploy_sparse.errors import EngineError

SHORT = Floors(warmup_ms=0.0, duration_s=0.0)
KNOWN = frozenset({"node_conv", "node_relu", "node_add", "node_norm", "node_linear"})
COPY = "Reformatting CopyNode for Input Tensor 0 to node_conv + node_relu"
LAYERS = ((COPY, 0.125), ("node_conv + node_relu", 0.5), ("__myl_Fc_myl0_1", 0.25))
INSPECTED = [
    {"Name": COPY, "LayerType": "Reformat", "Metadata": ""},
    {"Name": "node_conv + node_relu", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: node_conv]"},
    {"Name": "__myl_Fc_myl0_1", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_linear]\u001e[ONNX Layer: gone]"},
]


class IProfiler:
    """As pybind11 has it: a subclass that does not call it is refused when it is attached."""

    def __init__(self) -> None:
        self.whole = True


class Inspector:
    def get_engine_information(self, format: Enum) -> str:
        assert format.name == "JSON"
        return json.dumps({"Layers": INSPECTED, "Bindings": []})


class ProfiledContext(FakeContext):
    """Reports every layer at each run, once in a slow first one."""

    profiler = None
    enqueue_emits_profile = False

    def execute_async_v3(self, handle: int) -> bool:
        if not super().execute_async_v3(handle):
            return False
        if self.profiler is not None and self.enqueue_emits_profile:
            assert self.profiler.whole
            self.engine.profiled += 1
            for name, ms in self.engine.layers:
                self.profiler.report_layer_time(name, ms * self.engine.slow.get(self.engine.profiled, 1))
        return True


class ProfiledEngine(FakeEngine):
    layers = LAYERS
    profiled = 0

    def __init__(self, gpu: FakeGpu, **options: object) -> None:
        ends = {"input": (Types.FLOAT, (-1, 1, 8, 8))}, {"output": (Types.FLOAT, (-1, 10), scores)}
        super().__init__(gpu, *ends, **options)
        self.slow: dict[int, int] = {}

    def create_execution_context(self) -> FakeContext | None:
        if len(self.made) >= self.contexts:
            return None
        self.made.append(ProfiledContext(self))
        return self.made[-1]

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def load(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    def load(engine: ProfiledEngine, cuda: str = "cuda-python", **options: object) -> TrtSession:
        library = fake_tensorrt(engine)
        library.IProfiler = IProfiler
        library.LayerInformationFormat = Enum("LayerInformationFormat", "ONELINE JSON")
        monkeypatch.setattr(trt_session, "library", lambda runtime: library)
        monkeypatch.setattr(trt_session, "process_logger", lambda runtime: "logger")
        monkeypatch.setattr(trt_session, "cuda_library", lambda: CUDA[cuda](gpu))
        return TrtSession(b"plan", "tensorrt", "deploy-sparse build …", **options)

    return load


@pytest.mark.parametrize("cuda", CUDA)
def test_layers_are_timed_in_a_context_of_their_own(load, gpu: FakeGpu, cuda: str) -> None:
    engine = ProfiledEngine(gpu)
    engine.slow = {1: 1000, 9: 1000}  # one of the warm-up, one of the others
    session = load(engine, cuda)
    ordinary = engine.made[0]
    pieces, runs, whole = session.layer_times(images(3), SHORT)
    assert {piece.name: piece.ms for piece in pieces} == dict(LAYERS)
    assert [piece.kind for piece in pieces] == ["Reformat", "CaskConvolution", "gemm"]
    assert [piece.role for piece in pieces] == ["conversion", "work", "work"]
    assert (runs, engine.profiled) == (20, 25)
    assert whole > 0
    assert ordinary.profiler is None
    before = engine.profiled
    session.run(images(3))
    session.prepare(images(3))()
    assert engine.profiled == before, "other runs are not watched"
    session.close()
    assert not gpu.live
    assert gpu.streams <= {0}


def test_a_graph_is_no_obstacle_and_other_calls_go_on(load, gpu: FakeGpu) -> None:
    session = load(ProfiledEngine(gpu), cuda_graph=True, contexts=2)
    session.run(images(2))
    assert len(session.layer_times(images(2), SHORT)[0]) == 3
    session.run(images(2))
    session.close()
    assert gpu.is_clean()


@pytest.mark.parametrize("failing", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failure_frees_everything_and_leaves_the_session_usable(load, gpu: FakeGpu, failing: str) -> None:
    from cuda_fakes import CudaError

    session = load(ProfiledEngine(gpu))
    session.run(images(2))
    held, streams = len(gpu.live), len(gpu.streams)
    gpu.failing[failing] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(EngineError):
        session.layer_times(images(2), SHORT)
    gpu.failing.clear()
    assert (len(gpu.live), len(gpu.streams)) == (held, streams)
    session.run(images(2))


def test_no_memory_for_another_context_says_so(load, gpu: FakeGpu) -> None:
    session = load(ProfiledEngine(gpu, contexts=1))
    with pytest.raises(EngineError, match="makes no execution context"):
        session.layer_times(images(2), SHORT)


def test_a_profiler_that_says_nothing_is_an_error(load, gpu: FakeGpu) -> None:
    engine = ProfiledEngine(gpu)
    engine.layers = ()
    with pytest.raises(EngineError, match="TensorRT's profiler reported no layer"):
        load(engine).layer_times(images(2), SHORT)


def test_poll_ends_it(load, gpu: FakeGpu) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    session = load(ProfiledEngine(gpu))
    with pytest.raises(KeyboardInterrupt):
        session.layer_times(images(2), Floors(poll=stop))
    session.close()
    assert gpu.is_clean()


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("node_conv", ("node_conv",)),
        ("node_conv + node_add + node_relu", ("node_conv", "node_add", "node_relu")),
        ("node_conv || node_linear", ("node_conv", "node_linear")),
        ("{ForeignNode[node_norm...node_linear]}", ("node_norm", "node_linear")),
        ("PWN(PWN(node_add), node_relu)", ("node_add", "node_relu")),
        ("__myl_MulAdd_myl0_3", ()),
        ("node_conv_2 + node_relu", ("node_relu",)),
    ],
)
def test_nodes_in_the_names_of_fused_layers(name: str, nodes: tuple[str, ...]) -> None:
    assert tuple(nodes_in(name, KNOWN)) == nodes


def test_the_inspectors_nodes_come_first_and_a_copy_is_for_the_layer_it_names() -> None:
    pieces = [
        NodeTime("__myl_Fc_myl0_1", "gemm", ("node_linear", "gone"), 1.0),
        NodeTime(COPY, "Reformat", (), 1.0, "conversion"),
        NodeTime("Reformatting CopyNode for Output Tensor 0 to node_add", "?", (), 1.0, "conversion"),
        NodeTime("something else", "?", (), 1.0),
    ]
    found = with_nodes(pieces, KNOWN)
    assert [piece.nodes for piece in found] == [("node_linear",), ("node_conv", "node_relu"), ("node_add",), ()]


def test_the_real_base_class_takes_the_recorder() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'", exc_type=ImportError)
    recorder = _recorder(library)
    recorder.report_layer_time("a", 0.5)
    recorder.report_layer_time("a", 0.25)
    recorder.report_layer_time("b", 1)
    assert isinstance(recorder, library.IProfiler)
    assert recorder.taken() == {"a": 0.75, "b": 1.0}
    assert recorder.taken() == {}
