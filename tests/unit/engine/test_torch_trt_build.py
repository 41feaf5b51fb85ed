"""torch-tensorrt behind build_engine: what is made of what it gives, what goes wrong, and where an engine runs.

The library runs only beside a GPU; a stand-in with its recorded signatures takes its place.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_trt_fake
from engine_samples import make_tiny
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader
from torch_trt_fake import (
    GPU,
    HERE,
    IMAGES,
    WORDS,
    FakeTorchTensorRT,
    Pair,
    Views,
    built,
    install,
    target_of,
)

from deploy_sparse.config import config_from
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.target import Target
from deploy_sparse.engine.torch_trt import bindings as torch_trt_bindings
from deploy_sparse.engine.torch_trt.bindings import obstacle, version_obstacle
from deploy_sparse.engine.torch_trt.build import TorchTrtSource, compile_program, torch_trt_source
from deploy_sparse.engine.torch_trt.program import PART
from deploy_sparse.engine.watch import Watch
from deploy_sparse.errors import ArtifactError, BuildError, ConfigError, EngineError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTorchTensorRT:
    return install(tmp_path / "site", monkeypatch)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one engine."""
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path_factory.mktemp("site"), patch)
        return build_engine(make_tiny(), target_of(), IMAGES, tmp_path_factory.mktemp("shelf"), name="tiny").folder


@pytest.fixture
def engine(fake: FakeTorchTensorRT, shelf: Path, tmp_path: Path) -> Engine:
    return open_entry(shutil.copytree(shelf, tmp_path / "out" / shelf.name))


@pytest.fixture(scope="module")
def source() -> TorchTrtSource:
    return torch_trt_source(make_tiny(), IMAGES, target_of())


def same(engine: Engine, network: nn.Module, *inputs: torch.Tensor, atol: float = 1e-6) -> None:
    """The engine computes what the network computes, at every batch size up to 6."""
    names = [spec.name for spec in engine.inputs]
    with engine.open() as runner, torch.no_grad():
        for batch in (1, 2, 6):
            rows = [x[torch.arange(batch) % len(x)] for x in inputs]
            found = runner.run({name: x.numpy() for name, x in zip(names, rows, strict=True)})
            expected = network.eval()(*rows)
            for ours, theirs in zip(found.values(), [expected] if torch.is_tensor(expected) else expected, strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), atol=atol)


@pytest.mark.parametrize(
    ("batch", "given", "tuned"),
    [
        ({"min": 1, "opt": 1, "max": 6}, {"min_shape": (1, 1, 8, 8), "opt_shape": (2, 1, 8, 8), "max_shape": (6, 1, 8, 8)}, 2),
        ({"min": 5, "opt": 5, "max": 5}, {"shape": (5, 1, 8, 8)}, 5),
    ],
)  # fmt: skip
def test_batch_range(
    fake: FakeTorchTensorRT, source: TorchTrtSource, batch: dict[str, int], given: dict[str, object], tuned: int
) -> None:
    made = compile_program(source, target_of(batch=batch))
    assert fake.inputs == [{**given, "dtype": torch.float32}]
    assert fake.ranges == ([] if batch["min"] == batch["max"] else [(batch["min"], batch["max"])])
    assert made.partition["tuned_for_batch"] == tuned
    assert {*made.parity.batches} == {*batch.values()}


def test_batches_outside_of_the_range_are_refused(engine: Engine) -> None:
    with engine.open() as runner, pytest.raises(EngineError, match="batch 7 is outside"):
        runner.run({"input": np.zeros((7, 1, 8, 8), np.float32)})


# What is built


def test_manifest(engine: Engine, fake: FakeTorchTensorRT) -> None:
    manifest = engine.manifest
    assert {*manifest["files"]} == {"model.pt2"}
    assert engine.path.name == "model.pt2"
    assert manifest["runtime"] == {"name": "torch-tensorrt", "version": f"{HERE}.0, TensorRT 11.1.0.106"}
    assert manifest["gpu"] == {"name": GPU.name, "capability": "SM90"}
    assert manifest["compute_capabilities"] == ["SM90"]
    assert manifest["precision"]["asked"] == manifest["precision"]["built"] == "fp32"
    assert "strongly typed" in manifest["precision"]["read_from"]
    assert manifest["parameters"] == sum(p.numel() for p in make_tiny().parameters())
    assert manifest["macs"] == 4 * 9 * 64 + 8 * 4 * 9 * 16 + 80
    assert manifest["parity"]["max_rel"] < 1e-6
    assert manifest["parity"]["batches"] == [4, 1, 6]
    assert [spec.as_json() for spec in engine.inputs] == [
        {"name": "input", "dtype": "float32", "shape": ["batch", 1, 8, 8]}
    ]
    assert engine.batch_range == (1, 6)


def test_the_second_build_finds_the_first_one(engine: Engine, fake: FakeTorchTensorRT, tmp_path: Path) -> None:
    fake.failing = AssertionError("compiled again")
    again = build_engine(make_tiny(), target_of(), IMAGES, tmp_path / "out", name="tiny")
    assert (again.cached, again.folder) == (True, engine.folder)


def test_the_file_holds_no_pickles_and_the_plan_as_raw_bytes(engine: Engine, fake: FakeTorchTensorRT) -> None:
    with open(engine.path, "rb") as file:
        reader = PT2ArchiveReader(file)
        names = reader.get_file_names()
        assert not [name for name in names if "custom_obj" in name or name.endswith(".pkl")]
        records = [reader.read_bytes(name) for name in names]
    assert any(record.startswith(b"ftrt\x00\xff") for record in records)
    assert b'use_pickle": true' not in b"".join(records)


def test_backend_in_place_of_the_targets_runtime(fake: FakeTorchTensorRT, tmp_path: Path) -> None:
    target = config_from(Target, {"name": "full", "runtime": "tensorrt"}, {"builder_level": 4}, source="full.toml")
    engine = build_engine(make_tiny(), target, IMAGES, tmp_path, backend="torch-tensorrt")
    assert engine.target.name == "full-torch-tensorrt"
    assert engine.manifest["runtime"]["name"] == "torch-tensorrt"
    assert fake.options["optimization_level"] == 4
    with pytest.raises(ConfigError, match="torch-tensorrr"):
        build_engine(make_tiny(), target, IMAGES, tmp_path, backend="torch-tensorrr")


@pytest.mark.parametrize(("precision", "error"), [("bf16", 8e-2), pytest.param("fp16", 1e-2, marks=pytest.mark.slow)])
def test_lower_precisions(fake: FakeTorchTensorRT, tmp_path: Path, precision: str, error: float) -> None:
    engine = built(make_tiny(), tmp_path, precision=precision)
    assert engine.manifest["precision"]["built"] == precision
    assert 0 < engine.manifest["parity"]["max_rel"] < error
    assert engine.outputs[0].dtype == "float32"
    same(engine, make_tiny(), IMAGES, atol=error)


def test_tf32_is_compared_without_a_limit(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    fake.off_by = 0.01
    assert compile_program(source, target_of(tf32=True)).parity.max_abs == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "inputs", "unsupported", "engines"),
    [
        (make_tiny, (IMAGES,), {"relu"}, 3),
        (Views, (IMAGES,), {"sigmoid"}, 2),
        # sizes that an engine needs come from PyTorch, and the other way round
        pytest.param(Views, (IMAGES,), {"sym_size"}, None, marks=pytest.mark.slow),
        (Views, (IMAGES,), {"view", "expand"}, None),
        (Pair, (IMAGES, WORDS), {"index_select"}, 2),
    ],
)
def test_parts_in_tensorrt_and_parts_in_pytorch(
    fake: FakeTorchTensorRT,
    tmp_path: Path,
    make: Callable[[], nn.Module],
    inputs: tuple[torch.Tensor, ...],
    unsupported: set[str],
    engines: int | None,
) -> None:
    fake.unsupported, network = unsupported, make()
    engine = built(network, tmp_path, inputs)
    partition = engine.manifest["partition"]
    assert engines is None or partition["engines"] == engines
    assert {*partition["pytorch"]} == {name for name in unsupported if not name.startswith("sym_")}
    assert partition["pytorch_operators"] == sum(partition["pytorch"].values())
    assert partition["tensorrt_operators"] > 0
    same(engine, network, *inputs)


def test_a_library_that_tells_no_counts(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    fake.silent, fake.unsupported = True, {"relu"}
    assert compile_program(source, target_of()).partition == {
        **{"engines": 3, "tensorrt_operators": None, "pytorch_operators": 2, "pytorch": {"relu": 2}},
        "tuned_for_batch": 4,
    }


def test_the_report_is_not_printed_and_loggers_are_as_before(
    fake: FakeTorchTensorRT, source: TorchTrtSource, caplog: pytest.LogCaptureFixture
) -> None:
    report = logging.getLogger("torch_tensorrt.dynamo._DryRunTracker")
    before = report.level, report.propagate, [*report.handlers], [*logging.getLogger("torch_tensorrt").handlers]
    compile_program(source, target_of())
    after = report.level, report.propagate, [*report.handlers], [*logging.getLogger("torch_tensorrt").handlers]
    assert before == after
    assert "Number of Operators" not in caplog.text


def test_timings_are_kept_for_the_next_build(fake: FakeTorchTensorRT, source: TorchTrtSource, tmp_path: Path) -> None:
    compile_program(source, target_of())
    (kept,) = (tmp_path / "site/cache/deploy-sparse/timings").glob("*.cache")
    assert all(word in kept.name for word in ("H100", "11.1.0.106", "torch"))
    assert kept.read_bytes() == b"timings;"
    compile_program(source, target_of(builder_level=1))
    assert kept.read_bytes() == b"timings;timings;"
    assert not Path(fake.options["timing_cache_path"]).exists()
    compile_program(source, target_of(timing_cache=False))
    assert kept.read_bytes() == b"timings;timings;"


def test_prepared_runs_and_outputs_given(engine: Engine) -> None:
    with engine.open() as runner:
        feeds = runner.sample_inputs(3)
        runner.prepare(feeds)()
        expected = runner.run(feeds)["output"]
        out = {"output": np.empty((3, 10), np.float32)}
        assert runner.run(feeds, out)["output"] is out["output"]
        np.testing.assert_array_equal(out["output"], expected)
    with pytest.raises(EngineError, match="closed"):
        runner.run(feeds)


def test_engines_are_made_with_what_the_target_says(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    compile_program(source, target_of(version_compatible=True, hardware_compatibility="ampere-plus"))
    (loaded,) = fake.loaded
    assert vars(loaded.settings) == {"version_compatible": True, "hardware_compatible": True}
    assert loaded.name == "tensorrt_0"


def test_the_operator_in_the_file_computes_nothing() -> None:
    plan = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(NotImplementedError):
        PART([IMAGES], plan, ["x"], ["y"], [4, 1], [2], ["float32"])


# What goes wrong


def failing(source: TorchTrtSource, match: str) -> BuildError:
    with pytest.raises(BuildError, match=match) as problem:
        compile_program(source, target_of())
    return problem.value


def test_a_failed_compilation_is_one_message_and_leaves_nothing(fake: FakeTorchTensorRT, tmp_path: Path) -> None:
    fake.error = "[optimizer.cpp::computeCosts::4048] Error Code 10: Internal Error (Could not find any implementation)"
    fake.failing = RuntimeError("While interpreting the module got an error:\nno engine")
    with pytest.raises(BuildError, match="could not compile the network for 'mine'") as problem:
        built(make_tiny(), tmp_path / "out")
    given = problem.value.given
    assert "Could not find any implementation; While interpreting the module got an error: no engine" in given
    assert not [word for word in ("\n", "optimizer.cpp") if word in given]
    assert not (tmp_path / "site/cache/deploy-sparse/timings").exists()
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]
    assert not Path(fake.options["timing_cache_path"]).parent.exists()


@pytest.mark.parametrize("problem", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError()])
def test_out_of_memory(fake: FakeTorchTensorRT, source: TorchTrtSource, problem: Exception) -> None:
    fake.failing = problem
    assert "batch.max" in failing(source, "ran out of memory").fix


def test_an_interrupt_is_not_a_failed_compilation(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    fake.failing = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compile_program(source, target_of())


def test_nothing_for_tensorrt(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    class Everything(set[str]):
        def __contains__(self, name: object) -> bool:
            return True

    fake.unsupported = Everything()
    assert "runtime torch" in failing(source, r"all stays in PyTorch \{.*'convolution': 2").fix


def test_an_engine_that_computes_something_else(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    fake.off_by = 0.1
    assert "in torch-tensorrt" in failing(source, "computes something else than the module").given


@pytest.mark.parametrize(
    ("attribute", "match"),
    [
        ("aliased", "writes into its inputs"),
        ("allocates", "knows the shapes of its outputs only as it runs"),
        ("python_runtime", "has no runtime in C"),
        ("loses_shapes", "has an extent that does not follow from the batch"),
    ],
)
def test_what_does_not_go_into_a_file(
    fake: FakeTorchTensorRT, source: TorchTrtSource, attribute: str, match: str
) -> None:
    setattr(fake, attribute, True)
    fake.unsupported = {"mean"}
    assert "runtime tensorrt or torch" in failing(source, match).fix


def test_a_build_that_is_stopped(fake: FakeTorchTensorRT, source: TorchTrtSource) -> None:
    with pytest.raises(BuildError, match="cancelled"):
        compile_program(source, target_of(), watch=Watch(cancel=lambda: True))
    assert fake.options == {}


# Loading elsewhere


def changed(engine: Engine, version: str, **target: object) -> dict[str, object]:
    runtime = {"name": "torch-tensorrt", "version": version}
    return {**engine.manifest, "runtime": runtime, "target": {**engine.manifest["target"], **target}}


@pytest.mark.parametrize(
    ("version", "target", "takes"),
    [
        (f"{HERE}.0, TensorRT 11.1.0.106", {}, True),
        (f"{HERE}.3, TensorRT 11.1.0.106", {}, True),
        (f"{HERE}.0, TensorRT 11.1.0.100", {}, False),
        (f"{HERE}.0, TensorRT 11.1.0.100", {"version_compatible": True}, True),
        (f"{HERE}.0, TensorRT 11.2.0.1", {"version_compatible": True}, False),
        ("2.8.0, TensorRT 11.1.0.106", {}, False),
        ("2.8.0, TensorRT 10.12.0.1", {"version_compatible": True}, True),
        ("99.0.0, TensorRT 11.1.0.106", {"version_compatible": True}, False),
    ],
)
def test_versions(engine: Engine, version: str, target: dict[str, object], takes: bool) -> None:
    found = obstacle(changed(engine, version, **target))
    assert (found is None) == takes
    if found is not None:
        assert version in found.expected
        assert f"{HERE}.0, TensorRT 11.1.0.106" in found.reason


def test_versions_are_told_without_an_import(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # which makes an import fail
    assert version_obstacle(engine.manifest) is None
    older = version_obstacle(changed(engine, "2.8.0, TensorRT 10.12.0.1"))
    assert getattr(older, "reason", None) == f"torch-tensorrt {HERE}.0"
    monkeypatch.setattr(torch_trt_bindings.metadata, "version", {"torch": "2.14.1"}.__getitem__)
    monkeypatch.setattr(torch_trt_bindings.metadata, "PackageNotFoundError", KeyError)
    assert version_obstacle(changed(engine, "2.8.0, TensorRT 10.12.0.1")) is None


def test_another_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_trt_bindings, "local_gpu", lambda: Gpu("NVIDIA L4", "SM89"))
    with pytest.raises(EngineError, match=r"NVIDIA L4 \(SM89\)") as problem:
        load_engine(engine)
    assert "NVIDIA H100 80GB HBM3 (SM90), which it was tuned on" in problem.value.expected
    assert "deploy-sparse build SUBJECT" in problem.value.fix
    assert (
        obstacle(changed(engine, str(engine.manifest["runtime"]["version"]), hardware_compatibility="ampere-plus"))
        is None
    )


def test_no_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_trt_bindings, "local_gpu", lambda: None)
    assert "no NVIDIA GPU" in (engine.runnable() or "")
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        engine.open()


def test_no_library(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(EngineError, match="does not load") as problem:
        engine.open()
    assert "pip install torch-tensorrt" in problem.value.fix


def test_a_plan_that_tensorrt_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_trt_fake, "_plans", {})
    with pytest.raises(EngineError, match="failed while loading: Unable to deserialize the TensorRT engine"):
        engine.open()


def test_an_engine_folder_is_verified_and_names_its_gpu(engine: Engine) -> None:
    assert open_entry(engine.folder).runnable() is None
    data = bytearray(engine.path.read_bytes())
    data[len(data) // 2] ^= 1
    engine.path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="model"):
        open_entry(engine.folder)
