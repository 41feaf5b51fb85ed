"""The store: what is whole and what runs here, under damage, strangers and other versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_samples import DAY, flip, names, only, plant

from deploy_sparse.artifact import digest_of, sha256_bytes
from deploy_sparse.engine import fit
from deploy_sparse.engine.collect import collect
from deploy_sparse.engine.cuda.gpu import Gpu
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.fit import gpu_takes, gpus, version_takes
from deploy_sparse.engine.runner import load_engine
from deploy_sparse.engine.store import read_store
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ArtifactError, EngineError, MissingDependencyError


def test_a_good_entry(built: Engine) -> None:
    for folder in (built.folder.parent, built.folder):
        entry = only(folder)
        assert (entry.state, entry.runs_here, entry.why, entry.fix) == ("good", True, None, None)
        facts = entry.facts()
        assert facts["folder"] == str(built.folder)
        assert (facts["name"], facts["target"], facts["for"], facts["precision"]) == ("tiny", "cpu", "any CPU", "fp32")
        assert facts["runtime"] == f"onnxruntime {built.manifest['runtime']['version']}"
        assert facts["bytes"] == sum(path.stat().st_size for path in built.folder.iterdir())
        assert json.loads(json.dumps(facts)) == facts


def test_newest_first_and_everything_else_by_name(store: Path, built: Engine) -> None:
    old, new = plant(store, built, 3), plant(store, built, 1)
    (store / "notes.txt").write_text("x")
    (store / "runs").mkdir()
    (store / "link-cpu-0123456789ab").symlink_to(old, target_is_directory=True)
    (store / "empty-cpu-0123456789ab").mkdir()
    (store / ".tmp-file-1-00000000").write_text("no folder")
    found = read_store(store)
    assert [entry.folder for entry in found.entries] == [new, old]
    assert [round(entry.age_s / DAY) for entry in found.entries] == [1, 3]
    assert set(found.others) == {"notes.txt", "runs", "link-cpu-0123456789ab", "empty-cpu-0123456789ab", ".tmp-file-1-00000000"}  # fmt: skip


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json", "engine.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "garbage"])
def test_damage_is_found_and_says_what_to_do(entry: Path, name: str, damage: str) -> None:
    path = entry / name
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "garbage":
        path.write_bytes(b"\x00\xff{")
    else:
        path.unlink()
    found = only(entry.parent)
    assert found.state == "damaged"
    assert not found.runs_here
    assert str(entry) in found.why
    assert f"deploy-sparse engines gc {entry.parent}; then build it again: deploy-sparse build SUBJECT" in found.fix
    if name != "engine.json":
        assert found.fix.endswith(f"--target cpu --out {entry.parent} --name tiny")
    assert names(collect(entry.parent).removed) == {entry.name}
    assert not list(entry.parent.iterdir())


def test_without_hashes_only_sizes_are_compared(entry: Path) -> None:
    flip(entry / "model.onnx")
    assert only(entry.parent, hashes=False).state == "good"
    (entry / "model.onnx").write_bytes(b"")
    assert only(entry.parent, hashes=False).state == "damaged"


def test_entry_of_another_version_of_the_toolkit_is_incompatible(entry: Path) -> None:
    sidecar = json.loads((entry / "engine.json").read_text())
    for change in ({"format_version": 99}, {"target": {**sidecar["target"], "new_key": 1}}):
        body = {key: value for key, value in {**sidecar, **change}.items() if key != "digest"}
        (entry / "engine.json").write_text(json.dumps({**body, "digest": digest_of(body)}))
        found = only(entry.parent)
        assert found.state == "incompatible"
        assert "version" in found.why
        assert "build it again" in found.fix
    flip(entry / "model.onnx")
    assert only(entry.parent).state == "damaged"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "deep/model.engine", "."])
def test_manifest_that_names_files_elsewhere(entry: Path, name: str) -> None:
    (entry.parent / "secret").write_text("x")
    sidecar = json.loads((entry / "engine.json").read_text())
    body = {key: value for key, value in sidecar.items() if key != "digest"}
    body["files"] = {**body["files"], name: {"bytes": 1, "sha256": sha256_bytes(b"x")}}
    (entry / "engine.json").write_text(json.dumps({**body, "digest": digest_of(body)}))
    for look in (open_entry, load_engine):
        with pytest.raises(ArtifactError, match="is damaged"):
            look(entry)
    assert read_store(entry.parent).entries[0].state == "damaged"
    assert collect(entry.parent).removed
    assert (entry.parent / "secret").exists()


@pytest.mark.parametrize("name", ["../model.onnx", "model.onnx.json", "engine.json", None])
def test_manifest_that_runs_another_file(entry: Path, name: str | None) -> None:
    sidecar = json.loads((entry / "engine.json").read_text())
    body = {**{key: value for key, value in sidecar.items() if key != "digest"}, "engine_file": name}
    (entry / "engine.json").write_text(json.dumps({**body, "digest": digest_of(body)}))
    with pytest.raises(ArtifactError, match="is no usable engine"):
        load_engine(entry)


def test_unreadable_entry_is_named_and_left(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access  # a superuser, who runs tests too, may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.onnx" and real(path, mode))
    found = only(entry.parent)
    assert (found.state, found.runs_here) == ("unreadable", False)
    assert "chmod" in found.fix
    assert names(collect(entry.parent).kept) == {entry.name}
    assert (entry / "model.onnx").exists()


def test_another_version_of_the_library_is_incompatible_another_gpu_is_not(
    built_rtx: Engine, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = plant(store, built_rtx, runtime={"name": "tensorrt-rtx", "version": "1.0.0.1"})
    now = plant(store, built_rtx, 1)
    for gpu in (None, Gpu("H100", "SM90"), Gpu("RTX 4090", "SM89")):
        monkeypatch.setattr(trt_bindings, "local_gpu", lambda gpu=gpu: gpu)
        found = {entry.folder: entry for entry in read_store(store).entries}
        assert (found[old].state, found[old].runs_here) == ("incompatible", False)
        assert "it needs tensorrt-rtx 1.0.0.1: engines are not portable across versions" in found[old].why
        assert f"build it again here: deploy-sparse build {old / 'model.onnx'} --target rtx-sm89" in found[old].fix
        assert found[now].state == "good"
        assert found[now].runs_here == (gpu == Gpu("RTX 4090", "SM89"))
        if gpu is None:
            assert found[now].why == "no NVIDIA GPU here; it needs an NVIDIA GPU and its driver"
            assert f"deploy-sparse build {now / 'model.onnx'} --target cpu" in found[now].fix
    done = collect(store)
    assert names(done.removed) == {old.name}
    assert now.exists()


def test_engine_whose_library_is_not_installed_stays(
    built_rtx: Engine, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(store, built_rtx, runtime={"name": "tensorrt-rtx", "version": "1.0.0.1"})

    def absent(runtime: str):
        raise MissingDependencyError("tensorrt-rtx is not installed", expected="it", fix="pip install tensorrt-rtx")

    monkeypatch.setattr(trt_bindings, "library", absent)
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("RTX 4090", "SM89"))
    found = only(store)
    assert (found.state, found.runs_here) == ("good", False)
    assert "tensorrt-rtx is not installed" in found.why
    assert found.fix == "pip install tensorrt-rtx"
    assert not collect(store).verdicts


def test_torch_engine_of_a_newer_pytorch(built: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"device": "cpu", "name": "torch-cpu"}
    manifest = {"runtime": {"name": "torch", "version": "2.14.1+cpu"}, "target": target}
    for here, fits in (("2.14.0", True), ("2.15.0", True), ("3.0", True), ("2.13.9", False)):
        monkeypatch.setattr(fit.metadata, "version", lambda name, here=here: here)
        assert (fit.version_obstacle(manifest) is None) == fits
        assert (fit.obstacle(manifest) is None) == fits
    assert fit.obstacle(manifest).expected == "torch 2.14.1+cpu or newer"


@pytest.mark.parametrize(
    ("built", "here", "plain", "forward"),
    [
        ("11.4.0.106", "11.4.0.106", True, True),
        ("11.3.0.1", "11.4.0.106", False, True),
        ("11.4.0.106", "11.3.0.1", False, False),
        ("10.16.1.11", "11.4.0.106", False, True),
        ("11.4.0.106", "12.0.0.1", False, False),
        ("9.3.0", "11.0.0", False, False),
        ("10.9.0.34", "10.16.1.11", False, True),
    ],
)
def test_versions(built: str, here: str, plain: bool, forward: bool) -> None:
    assert version_takes(built, here, version_compatible=False) == plain
    assert version_takes(built, here, version_compatible=True) == forward


@pytest.mark.parametrize(
    ("compatibility", "taken", "words"),
    [
        ("none", {"A100"}, "A100 (SM80)"),
        ("same-capability", {"A100", "A30"}, "SM80"),
        ("ampere-plus", {"A100", "A30", "H100"}, "SM80 and newer"),
    ],
)
def test_gpus(compatibility: str, taken: set[str], words: str) -> None:
    manifest = {
        "runtime": {"name": "tensorrt"},
        "target": {"hardware_compatibility": compatibility},
        "compute_capabilities": ["SM80"],
        "gpu": {"name": "A100", "capability": "SM80"},
    }
    machines = {"A100": "SM80", "A30": "SM80", "H100": "SM90", "T4": "SM75"}
    assert {name for name, capability in machines.items() if gpu_takes(manifest, name, capability)} == taken
    assert gpus(manifest) == words


def test_host_code_is_refused_unless_asked_before_anything_is_opened(
    built_rtx: Engine, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {**built_rtx.manifest["target"], "name": "tensorrt", "runtime": "tensorrt", "version_compatible": True}
    folder = plant(
        store, built_rtx, target=target, runtime={"name": "tensorrt", "version": "11.3.0.1"},
        gpu={"name": "L4", "capability": "SM89"},
    )  # fmt: skip
    opened: list[dict[str, object]] = []
    library = type("tensorrt", (), {"__version__": "11.4.0.106"})
    monkeypatch.setattr(trt_bindings, "library", lambda runtime: library)
    monkeypatch.setattr(trt_bindings, "local_gpu", lambda: Gpu("L4", "SM89"))

    class Session:
        def __init__(self, plan: bytes, runtime: str, rebuild: str, **options: object) -> None:
            opened.append(options)

        def close(self) -> None: ...

    monkeypatch.setattr("deploy_sparse.engine.trt.session.TrtSession", Session)
    with pytest.raises(EngineError, match=r"holds host code(.|\n)*load_engine\(path, allow_host_code=True\)"):
        load_engine(folder)
    assert not opened
    load_engine(folder, allow_host_code=True).close()
    open_entry(folder).open(allow_host_code=True).close()
    assert [(options["allow_host_code"], options["weights"]) for options in opened] == [(True, None)] * 2
    plain = plant(
        store, built_rtx, target={**target, "version_compatible": False, "refit": "identical", "strip": True},
        runtime={"name": "tensorrt", "version": "11.4.0.106"}, gpu={"name": "L4", "capability": "SM89"},
    )  # fmt: skip
    load_engine(plain, allow_host_code=True).close()  # nothing in it to allow
    weights = (plain / "model.onnx").read_bytes()
    assert (opened[-1]["allow_host_code"], opened[-1]["weights"]) == (False, weights)


def test_listing_cpu_engines_imports_neither_torch_nor_onnx(built: Engine) -> None:
    code = (
        "import sys; from deploy_sparse.cli.main import main; main(['engines', 'ls', sys.argv[1]]); "
        "assert not {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules), 'heavy import'"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(built.folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert built.folder.name in done.stdout
