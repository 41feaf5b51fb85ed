"""torch-tensorrt: what it is asked in each version, and what is said where it cannot be asked.

The library runs only beside a GPU; a stand-in with its recorded signatures takes its place.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from engine_samples import make_tiny
from torch_trt_fake import (
    GPU,
    HERE,
    PARAMETERS,
    FakeTorchTensorRT,
    built,
    install,
    package,
    target_of,
)

from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.target import RUNTIMES_OF
from deploy_sparse.engine.torch_trt import bindings as torch_trt_bindings
from deploy_sparse.engine.torch_trt.bindings import builder_library, compile_options, library
from deploy_sparse.errors import BuildError, ConfigError, MissingDependencyError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTorchTensorRT:
    return install(tmp_path / "site", monkeypatch)


# What the library is asked


@pytest.mark.parametrize("version", list(PARAMETERS))
def test_arguments_are_those_of_the_version(version: str) -> None:
    compiler = FakeTorchTensorRT(version).module.dynamo.compile
    options = compile_options(compiler, target_of(), "timings", 100)
    assert options.keys() <= PARAMETERS[version]
    typed = version in ("2.8", "2.9", "2.10", "2.11", "2.12")  # later ones are strongly typed without being asked
    assert options.get("use_explicit_typing", False) == typed
    assert "enabled_precisions" not in options


def test_parameters_are_those_of_the_package_that_is_here() -> None:
    found = importlib.util.find_spec("torch_tensorrt")
    if found is None or found.origin is None:
        pytest.skip("no torch-tensorrt here, not even its files")
    folder = Path(found.origin).parent
    version = (folder / "_version.py").read_text().split("__version__ = ", 1)[1].split("\n")[0].strip("\"'")
    tree = ast.parse((folder / "dynamo" / "_compiler.py").read_text())
    (compiler,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "compile")
    names = {argument.arg for argument in (*compiler.args.args, *compiler.args.kwonlyargs)}
    assert names == PARAMETERS[".".join(version.split(".")[:2])]
    tree = ast.parse((folder / "dynamo" / "runtime" / "_TorchTensorRTModule.py").read_text())
    (module,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "TorchTensorRTModule")
    (made,) = (each for each in module.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    positional = [argument.arg for argument in made.args.args]
    assert positional == ["self", "serialized_engine", "input_binding_names", "output_binding_names"]
    assert {"name", "settings"} <= {argument.arg for argument in made.args.kwonlyargs}
    assert "Number of Operators in Engine: " in (folder / "dynamo" / "_DryRunTracker.py").read_text()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"disable_tf32": True, "workspace_size": 0, "optimization_level": 3, "max_aux_streams": None}),
        ({}, {"immutable_weights": True, "refit_identical_engine_weights": False, "version_compatible": False}),
        ({}, {"hardware_compatible": False, "sparse_weights": False, "num_avg_timing_iters": 8}),
        ({}, {"cache_built_engines": False, "reuse_cached_engines": False, "timing_cache_path": "timings"}),
        ({"tf32": True}, {"disable_tf32": False}),
        ({"workspace_mib": 64}, {"workspace_size": 64 << 20}),
        ({"builder_level": 5, "aux_streams": 0}, {"optimization_level": 5, "max_aux_streams": 0}),
        ({"sparse_weights": True, "version_compatible": True}, {"sparse_weights": True, "version_compatible": True}),
        ({"hardware_compatibility": "ampere-plus"}, {"hardware_compatible": True}),
        ({"refit": "any"}, {"immutable_weights": False, "refit_identical_engine_weights": False}),
        ({"refit": "identical"}, {"immutable_weights": False, "refit_identical_engine_weights": True}),
    ],
)
def test_keys_of_the_target(values: dict[str, object], expected: dict[str, object]) -> None:
    options = compile_options(FakeTorchTensorRT("2.14").module.dynamo.compile, target_of(**values), "timings", 100)
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(("operators", "expected"), [(0, 1), (3, 3), (5, 5), (100, 5)])
def test_networks_of_few_operators_are_compiled_all_the_same(operators: int, expected: int) -> None:
    options = compile_options(FakeTorchTensorRT("2.14").module.dynamo.compile, target_of(), "timings", operators)
    assert options["min_block_size"] == expected


def test_a_version_without_an_argument_is_named() -> None:
    with pytest.raises(BuildError, match="has no argument 'disable_tf32'") as problem:
        compile_options(lambda exported_program, **kwargs: None, target_of(), "timings", 5)
    assert "2.8 to 2.14" in problem.value.expected


@pytest.mark.parametrize("key", ["strip", "exclude", "axes", "threads", "cuda_graph"])
def test_keys_that_it_does_not_take(key: str) -> None:
    assert "torch-tensorrt" not in RUNTIMES_OF[key]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_precisions_that_it_does_not_take(precision: str) -> None:
    with pytest.raises(ConfigError, match="torch-tensorrt"):
        target_of(precision=precision)


# What is missing


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_trt_bindings.metadata, "version", lambda name: {"torch": "2.14.1"}[name])
    monkeypatch.setattr(torch_trt_bindings.metadata, "PackageNotFoundError", KeyError)
    with pytest.raises(MissingDependencyError, match="torch-tensorrt is not installed") as problem:
        library()
    assert "pip install torch-tensorrt" in problem.value.fix
    monkeypatch.setattr(
        torch_trt_bindings.metadata, "version", {"torch": "2.14.1", "torch-tensorrt-rtx": "2.14.0"}.__getitem__
    )
    with pytest.raises(MissingDependencyError, match="torch-tensorrt-rtx, which is, takes its place"):
        library()


def test_no_driver(fake: FakeTorchTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_trt_bindings, "local_gpu", lambda: None)
    with pytest.raises(MissingDependencyError, match="no NVIDIA driver or no GPU here"):
        library()
    with pytest.raises(MissingDependencyError, match="no NVIDIA driver"):
        built(make_tiny(), Path("never"))


def test_made_for_another_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(tmp_path / "site", monkeypatch, "2.8")
    assert fake.module.__version__ == "2.8.0"
    with pytest.raises(MissingDependencyError, match=r"torch-tensorrt 2\.8\.0 was made for another PyTorch than") as it:
        library()
    assert f"torch-tensorrt=={HERE}.*" in it.value.fix


@pytest.mark.parametrize("raised", ["RuntimeError", "OSError", "ImportError", "Exception"])
def test_an_import_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str) -> None:
    site = tmp_path / "site"
    package(site, monkeypatch, "torch-tensorrt", f"{HERE}.0")
    monkeypatch.setattr(torch_trt_bindings, "local_gpu", lambda: GPU)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    lines = ["import logging", "logging.captureWarnings(True)", f"raise {raised}('libnvinfer.so.11: no such file')"]
    (site / "torch_tensorrt.py").write_text("\n".join(lines))
    shown = warnings.showwarning
    with pytest.raises(MissingDependencyError, match=r"does not load: libnvinfer\.so\.11: no such file"):
        library()
    assert warnings.showwarning is shown


def test_asking_costs_no_torch() -> None:
    program = "import sys, deploy_sparse.engine.torch_trt.bindings; print(*{'torch', 'torch_tensorrt', 'tensorrt'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"compute_capabilities": ["SM80"]}, r"which is a NVIDIA H100 80GB HBM3 \(SM90\)"),
        ({"hardware_compatibility": "same-capability"}, "'same-capability', which torch-tensorrt has not"),
    ],
)
def test_targets_that_this_machine_cannot_build_for(
    fake: FakeTorchTensorRT, values: dict[str, object], match: str
) -> None:
    with pytest.raises(BuildError, match=match):
        builder_library(target_of(**values))
    assert builder_library(target_of(compute_capabilities=["SM90", "SM80"])) is fake.module


def test_an_onnx_file_is_no_subject(fake: FakeTorchTensorRT, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"model\.onnx"):
        build_engine(tmp_path / "model.onnx", target_of(), out=tmp_path)
