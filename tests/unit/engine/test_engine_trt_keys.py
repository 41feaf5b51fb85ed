"""Each key of a target reaches TensorRT: RTX's own builder takes or refuses it; what only full TensorRT does is recorded."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_samples import write_graph
from onnx import helper

from deploy_sparse.config import config_from, keys_of
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.onnx.file import OnnxFile, read_onnx
from deploy_sparse.engine.target import RUNTIMES_OF, Extents, Target, list_targets, load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.engine.trt import session as trt_session
from deploy_sparse.engine.trt import timings
from deploy_sparse.engine.trt.bindings import builder_library, compile_onnx, refitted
from deploy_sparse.engine.trt.config import builder_config
from deploy_sparse.engine.trt.timings import attach_timings, save_timings, timing_file
from deploy_sparse.errors import BuildError, EngineError


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="compiling needs the extra 'rtx'", exc_type=ImportError)


def full(**values: object) -> Target:
    return config_from(Target, {"name": "mine", "runtime": "tensorrt"}, values, source="mine.toml")


def real_config(rtx, target: Target):
    """A builder configuration of the real library, and the builder that must outlive it."""
    builder = rtx.Builder(trt_bindings.process_logger("tensorrt-rtx"))
    return builder_config(rtx, builder, target), builder


def test_defaults_of_the_real_configuration(rtx) -> None:
    config, _builder = real_config(rtx, load_target("tensorrt"))
    on = {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert on == set()
    assert config.avg_timing_iterations == 8
    assert config.builder_optimization_level == 3
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
    assert config.hardware_compatibility_level == rtx.HardwareCompatibilityLevel.NONE
    assert config.num_compute_capabilities == 0


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"tf32": True}, {"TF32"}),
        ({"sparse_weights": True}, {"SPARSE_WEIGHTS"}),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE"}),
        ({"refit": "any"}, {"REFIT"}),
        ({"refit": "identical"}, {"REFIT_IDENTICAL"}),
        ({"refit": "identical", "strip": True}, {"REFIT_IDENTICAL", "STRIP_PLAN"}),
        ({"refit": "any", "strip": True, "sparse_weights": True}, {"REFIT", "STRIP_PLAN", "SPARSE_WEIGHTS"}),
    ],
)
def test_flags_of_the_real_configuration(rtx, values: dict[str, object], flags: set[str]) -> None:
    config, _builder = real_config(rtx, full(**values))
    assert {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)} == flags


def test_numbers_of_the_real_configuration(rtx) -> None:
    target = full(builder_level=5, workspace_mib=64, aux_streams=0)
    config, _builder = real_config(rtx, target)
    assert config.builder_optimization_level == 5
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.max_aux_streams == 0


@pytest.mark.parametrize(
    ("key", "member"), [("ampere-plus", "AMPERE_PLUS"), ("same-capability", "SAME_COMPUTE_CAPABILITY")]
)
def test_hardware_compatibility(rtx, key: str, member: str) -> None:
    """RTX's configuration does not keep it, its enumeration is full TensorRT's."""
    trt = SimpleNamespace(**vars(fake_tensorrt()) | {"HardwareCompatibilityLevel": rtx.HardwareCompatibilityLevel})
    config = Recorder()
    builder_config(trt, SimpleNamespace(create_builder_config=lambda: config), full(hardware_compatibility=key))
    assert ("hardware_compatibility_level", getattr(rtx.HardwareCompatibilityLevel, member)) in config.done


@pytest.mark.parametrize(
    "values",
    [{"builder_level": 0}, {"builder_level": 5}, {"workspace_mib": 16}, {"aux_streams": 0}, {"sparse_weights": True}],
)  # fmt: skip
def test_rtx_compiles_with_the_keys_it_takes(exported: OnnxFile, rtx, values: dict[str, object], caplog) -> None:
    target = config_from(Target, load_target("rtx-sm89").model_dump(mode="json"), values)
    with caplog.at_level(logging.WARNING):
        assert len(compile_onnx(exported.read(), target, exported.inputs).plan) > 1000
    assert not caplog.records


def test_aux_streams_reach_rtxs_compiler(exported: OnnxFile, rtx, caplog) -> None:
    target = load_target("rtx-sm89").model_copy(update={"aux_streams": 2})
    with caplog.at_level(logging.WARNING):
        compile_onnx(exported.read(), target, exported.inputs)
    assert "Multi stream is disabled" in caplog.text  # a chain of layers has nothing to run side by side


def test_ranges_of_axes_reach_rtxs_compiler(rtx, tmp_path: Path) -> None:
    shape = ("n", 3, "height", "width")
    path = write_graph(tmp_path / "x.onnx", [helper.make_node("Relu", ["input"], ["output"])], shape=shape)
    found, target = read_onnx(path), load_target("rtx-sm89")
    plans = set()
    for largest in (64, 128):
        axes = {"height": Extents(min=8, opt=32, max=largest), "width": Extents(min=8, opt=32, max=64)}
        plans.add(compile_onnx(found.read(), target.model_copy(update={"axes": axes}), found.inputs).plan)
    assert len(plans) == 2


def test_every_key_is_of_a_runtime_that_can_take_it() -> None:
    """A key without a rule goes with every runtime; those are what shapes and names an engine."""
    plain = {key.partition(".")[0] for key in keys_of(Target)} - RUNTIMES_OF.keys()
    assert plain == {"name", "runtime", "batch", "width_multiple", "description"}


class Recorder:
    """An object that remembers what was set on it, and which methods were called with what."""

    def __init__(self, answers: dict[str, object] | None = None) -> None:
        object.__setattr__(self, "done", [])
        object.__setattr__(self, "answers", answers or {})

    def __setattr__(self, name: str, value: object) -> None:
        self.done.append((name, value))

    def __getattr__(self, name: str):
        if name == "num_compute_capabilities":
            raise AttributeError(name)  # full TensorRT has none

        def call(*arguments: object, **named: object) -> object:
            self.done.append((name, *arguments, *named.values()))
            return self.answers.get(name)

        return call


def fake_tensorrt(version: str = "11.4.0.106", flags: str = "TF32 SPARSE_WEIGHTS REFIT STRIP_PLAN") -> SimpleNamespace:
    """Names of full TensorRT that the configuration uses; the real ones are in its type stubs."""
    return SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        BuilderFlag=Enum("BuilderFlag", flags),
        ProfilingVerbosity=Enum("ProfilingVerbosity", "DETAILED"),
        MemoryPoolType=Enum("MemoryPoolType", "WORKSPACE"),
        HardwareCompatibilityLevel=Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS"),
    )


def test_full_tensorrt_gets_no_compute_capabilities() -> None:
    trt, config = fake_tensorrt(), Recorder()
    assert (
        builder_config(trt, SimpleNamespace(create_builder_config=lambda: config), load_target("tensorrt-a100"))
        is config
    )
    assert config.done == [
        ("profiling_verbosity", trt.ProfilingVerbosity.DETAILED),
        ("avg_timing_iterations", 8),
        ("builder_optimization_level", 3),
        ("clear_flag", trt.BuilderFlag.TF32),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version_compatible": True}, r"TensorRT 10\.1 does not know BuilderFlag VERSION_COMPATIBLE(.|\n)*TF32"),
        ({"hardware_compatibility": "same-capability"}, r"does not know HardwareCompatibilityLevel SAME_COMPUTE"),
    ],
)
def test_a_library_without_what_is_asked_says_so(values: dict[str, object], message: str) -> None:
    builder = SimpleNamespace(create_builder_config=Recorder)
    with pytest.raises(BuildError, match=message) as caught:
        builder_config(fake_tensorrt("10.1"), builder, full(**values))
    assert "install a newer tensorrt, " in caught.value.fix


@pytest.mark.parametrize(
    ("name", "capability"),
    [("tensorrt-a100", "SM80"), ("tensorrt-h100", "SM90"), ("tensorrt-l4", "SM89"), ("tensorrt-orin", "SM87")],
)
def test_a_target_for_one_gpu_is_built_on_that_gpu(name: str, capability: str, monkeypatch) -> None:
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: "the library")
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("Any", capability))
    assert builder_library(load_target(name)) == "the library"
    assert builder_library(load_target("tensorrt")) == "the library"
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("Tesla T4", "SM75"))
    assert builder_library(load_target("tensorrt")) == "the library"
    with pytest.raises(BuildError, match=rf"'{name}' .* which is a Tesla T4 \(SM75\)(.|\n)*{capability}") as caught:
        builder_library(load_target(name))
    assert "take target tensorrt," in caught.value.fix


def test_an_engine_for_another_gpu_names_a_target_that_fits_this_one(monkeypatch) -> None:
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("H100", "SM90"))
    for name, better in (("tensorrt-a100", "tensorrt"), ("tensorrt", "tensorrt")):
        manifest = {
            "runtime": {"name": "tensorrt", "version": "11.4"},
            "target": load_target(name).model_dump(mode="json"),
            "compute_capabilities": ["SM80"],
            "gpu": {"name": "A100", "capability": "SM80"},
        }
        assert trt_bindings.obstacle(manifest).target == better


# Weights that are filled in, and timings


@pytest.mark.parametrize(("parsed", "done", "answer"), [(True, True, True), (False, True, False), (True, False, False)])
def test_weights_are_filled_in_from_the_graph(parsed: bool, done: bool, answer: bool) -> None:
    parser, refitter = Recorder({"refit_from_bytes": parsed}), Recorder({"refit_cuda_engine": done})
    made: list[object] = []

    def refitter_of(engine: str, logger: str) -> Recorder:
        made.append((engine, logger))
        return refitter

    trt = SimpleNamespace(Refitter=refitter_of, OnnxParserRefitter=lambda given, logger: parser)
    assert refitted(trt, "engine", b"graph", "logger") is answer
    assert made == [("engine", "logger")]
    assert parser.done == [("refit_from_bytes", b"graph")]
    assert refitter.done == ([("refit_cuda_engine",)] if parsed else [])


def test_the_library_has_the_calls_that_fill_in_weights_and_keep_timings(rtx) -> None:
    wanted = {
        rtx.OnnxParserRefitter: ["refit_from_bytes"],
        rtx.Refitter: ["refit_cuda_engine"],
        rtx.IBuilderConfig: ["create_timing_cache", "set_timing_cache", "max_aux_streams"],
        rtx.ITimingCache: ["combine", "serialize"],
    }
    assert [name for kind, names in wanted.items() for name in names if not hasattr(kind, name)] == []


class Cache:
    """A timing cache as the bindings have it, of lines of text; it knows its own machine's."""

    def __init__(self, data: bytes) -> None:
        self.lines = set(data.decode().split())

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.lines)).encode()


class Config:
    """The part of a builder configuration that holds timings."""

    def __init__(self) -> None:
        self.used: Cache | None = None

    def create_timing_cache(self, data: bytes) -> Cache | None:
        return None if data == b"garbage" else Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "elsewhere" in cache.lines:
            return False
        self.used = cache
        return True


def test_timings_are_kept_for_each_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = load_target("tensorrt")
    path = timing_file(target, "11.4.0.106", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "deploy-sparse" / "timings" / "tensorrt-11.4.0.106-NVIDIA-H100-80GB-HBM3.cache"
    assert timing_file(target, "11.4.0.106", "../../etc").parent == path.parent
    assert timing_file(target.model_copy(update={"timing_cache": False}), "11", "H100") is None
    assert [name for name in list_targets() if timing_file(load_target(name), "1", "G")] == [
        name for name in list_targets() if name.startswith("tensorrt")
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(timings.Path, "home", lambda: tmp_path / "home")
    assert timing_file(target, "11", "H100") == tmp_path / "home/.cache/deploy-sparse/timings/tensorrt-11-H100.cache"


@pytest.mark.parametrize(
    ("before", "used"), [(None, set()), (b"a b", {"a", "b"}), (b"garbage", set()), (b"elsewhere", set())]
)
def test_a_build_takes_the_timings_that_are_there(before: bytes | None, used: set[str], tmp_path: Path) -> None:
    path, config = tmp_path / "t.cache", Config()
    if before is not None:
        path.write_bytes(before)
    cache = attach_timings(config, path)
    assert cache is config.used
    assert cache.lines == used
    assert attach_timings(Config(), None) is None


def test_concurrent_builds_lose_no_timings(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.cache"

    def build(index: int) -> None:
        config = Config()
        cache = attach_timings(config, path)
        cache.lines.add(f"layer{index}")
        save_timings(config, cache, path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(build, range(24)))
    assert Cache(path.read_bytes()).lines == {f"layer{index}" for index in range(24)}
    assert sorted(file.name for file in path.parent.iterdir()) == ["t.cache", "t.cache.lock"]


def test_timings_that_cannot_be_kept_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    config = Config()
    save_timings(config, attach_timings(config, tmp_path / "t"), tmp_path / "file" / "t.cache")
    assert "kernel timings are not kept" in caplog.text


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_two_builds_keep_timings_with_the_real_calls(
    exported: OnnxFile, rtx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTX's library in the place of full TensorRT's: it has the same timing cache, though nothing goes into it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: rtx)
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("H100", "SM90"))
    path = timing_file(load_target("tensorrt"), rtx.__version__, "H100")
    for _ in range(2):
        assert len(compile_onnx(exported.read(), load_target("tensorrt"), exported.inputs).plan) > 1000
        assert path.stat().st_size > 100
    path.write_bytes(b"garbage")
    compile_onnx(exported.read(), load_target("tensorrt"), exported.inputs)
    assert path.read_bytes() != b"garbage"


def test_the_session_allows_host_code_and_fills_in_weights_only_when_told(rtx, monkeypatch) -> None:
    seen: list[object] = []

    class Runtime:
        engine_host_code_allowed = None

        def __init__(self, logger: object) -> None: ...

        def deserialize_cuda_engine(self, plan: bytes) -> str:
            seen.append(self.engine_host_code_allowed)
            return "engine"

    monkeypatch.setattr(trt_session, "library", lambda runtime: SimpleNamespace(Runtime=Runtime))
    monkeypatch.setattr(trt_session, "process_logger", lambda runtime: "logger")
    monkeypatch.setattr(trt_session, "refitted", lambda trt, *rest: seen.append(rest))
    for options, host_code in (({}, False), ({"allow_host_code": True}, True)):
        with pytest.raises(EngineError, match="weights could not be filled in"):
            trt_session.TrtSession(b"plan", "tensorrt", "deploy-sparse build …", weights=b"graph", **options)
        assert seen == [host_code, ("engine", b"graph", "logger", None)]
        seen.clear()


def test_compiling_attaches_and_saves_timings(
    exported: OnnxFile, rtx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls, with RTX's library in the place of full TensorRT's."""
    calls: list[object] = []
    monkeypatch.setattr(trt_bindings, "_timing_file", lambda trt, target: tmp_path / "t")
    monkeypatch.setattr(trt_bindings, "attach_timings", lambda config, path: calls.append(("attach", path)) or "cache")
    monkeypatch.setattr(trt_bindings, "save_timings", lambda config, cache, path: calls.append(("save", cache, path)))
    compile_onnx(exported.read(), load_target("rtx-sm89"), exported.inputs)
    assert calls == [("attach", tmp_path / "t"), ("save", "cache", tmp_path / "t")]
    monkeypatch.undo()
    assert trt_bindings._timing_file(rtx, load_target("rtx-sm89")) is None
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("H100", "SM90"))
    assert trt_bindings._timing_file(rtx, load_target("tensorrt")).name.endswith("-H100.cache")
