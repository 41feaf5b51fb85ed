"""The house rules a machine can check: who imports whom, what an import costs, how big a file is."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deploy_sparse"

# room -> rooms it may import besides itself
ALLOWED = {
    "errors": set(),
    "artifact": {"errors"},
    "config": {"errors"},
    "structure": {"errors", "artifact"},
    "ties": set(),
    "exporting": set(),
    "programs": {"exporting", "errors"},
    "flags": set(),
    "masked": {"ties", "errors"},
    "ticket": {"flags", "structure", "artifact", "masked", "ties", "errors"},
    "sparsify": {"structure", "ticket", "errors"},
    "surgery": {"flags", "structure", "ticket", "ties", "programs", "exporting", "artifact", "errors"},
    "engine": {"programs", "exporting", "artifact", "config", "errors"},
    "bundle": {"engine", "artifact", "config", "errors"},
    "measure": {"artifact", "config", "errors"},
    "data": {"artifact", "config", "errors"},
    "zoo": {"artifact", "config", "errors"},
    "train": {"sparsify", "data", "ticket", "structure", "artifact", "config", "errors"},
    "tune": {"sparsify", "surgery", "engine", "measure", "ticket", "structure", "artifact", "config", "errors"},
    "workflow": {
        "zoo",
        "data",
        "train",
        "tune",
        "sparsify",
        "surgery",
        "measure",
        "ticket",
        "structure",
        "artifact",
        "config",
        "errors",
    },
    "suites": {
        "api",
        "zoo",
        "sparsify",
        "surgery",
        "engine",
        "tune",
        "measure",
        "ticket",
        "structure",
        "artifact",
        "config",
        "errors",
    },
    "dynamic": {"sparsify", "surgery", "structure", "ticket", "errors"},
    "api": {
        "zoo",
        "sparsify",
        "surgery",
        "engine",
        "tune",
        "ticket",
        "masked",
        "structure",
        "ties",
        "artifact",
        "config",
        "errors",
    },
}
HEAVY = {"torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "torch_tensorrt",
         "sklearn", "matplotlib", "safetensors", "jinja2", "pydantic", "rich", "numpy", "pycuda", "triton"}  # fmt: skip
OWNERS = {
    "tensorrt": "engine/trt/bindings.py",
    "tensorrt_rtx": "engine/trt/bindings.py",
    "triton": "engine/blocks/triton_kernel.py",
    "sklearn": "data/",
    "pynvml": "measure/gpu_state.py",
}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """(absolute dotted name, line) of every import statement in a file, at any depth but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    package = ["deploy_sparse", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if node.module is None:
                yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield stem, node.lineno


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    room = room_of(path)
    if room in ("cli", "__init__"):  # may import everything
        return
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "deploy_sparse" and len(parts) > 1:
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{path}:{line}: {room} may not import {name}"
        if (owner := OWNERS.get(parts[0])) is not None:
            assert owner in path.as_posix(), f"{path}:{line}: only {owner} may import {parts[0]}"


def test_every_room_has_a_rule():
    assert {room_of(p) for p in modules()} <= {*ALLOWED, "cli", "__init__"}


@pytest.mark.parametrize("program", ["import deploy_sparse", "import deploy_sparse.cli.main"])
def test_importing_costs_no_heavy_library(program):
    check = f"import sys; {program}; print(*[m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_every_public_name_resolves():
    import deploy_sparse

    for name in deploy_sparse.__all__:
        assert getattr(deploy_sparse, name).__doc__
    assert set(deploy_sparse.__all__) <= set(dir(deploy_sparse))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deploy_sparse.nothing


def test_help_takes_under_a_third_of_a_second_of_cpu_time():
    """The least of five runs, so that a busy machine does not decide."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = subprocess.run(
            [sys.executable, "-m", "deploy_sparse.cli.main", "--help"], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "doctor" in answer.stdout
    assert min(times) < 0.3


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_load_path_unpickles():
    """No pickle module, and no torch.load, anywhere in the package, the recipes or the benchmarks."""
    banned = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for path in [*modules(), *(ROOT / "recipes").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load")}, path
