"""Targets: shipped files, names, validation, digest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy_sparse.artifact import digest_of
from deploy_sparse.config import config_from
from deploy_sparse.engine import target as module
from deploy_sparse.engine.target import Target, list_targets, load_target, targets_folder
from deploy_sparse.errors import ConfigError

SHIPPED = (
    *("cpu", "rtx-portable", "rtx-sm120", "rtx-sm80", "rtx-sm86", "rtx-sm89", "tensorrt", "torch-cpu"),
    "torch-cuda",
)


def target_of(**values: object) -> Target:
    return config_from(Target, {"name": "mine", "runtime": "onnxruntime"}, values, source="mine.toml")


def test_shipped_targets() -> None:
    assert list_targets() == SHIPPED
    for name in SHIPPED:
        found = load_target(name)
        assert found.name == name
        assert found.precision == "fp32"
        assert not found.tf32
        assert found.description
    assert load_target("cpu").runtime == "onnxruntime"
    assert load_target("cpu").width_multiple == 4
    assert load_target("rtx-sm89").compute_capabilities == ("SM89",)
    assert load_target("rtx-sm89").width_multiple == 8
    assert load_target("rtx-portable").compute_capabilities == ()
    assert load_target("tensorrt").runtime == "tensorrt"


def test_digests_differ_and_ignore_the_description() -> None:
    assert len({load_target(name).digest for name in SHIPPED}) == len(SHIPPED)
    assert target_of().digest == target_of(description="other words").digest
    for change in ({"threads": 2}, {"batch": {"max": 8}}, {"width_multiple": 8}, {"name": "yours"}):
        assert target_of(**change).digest != target_of().digest


def test_options_of_torch_leave_other_targets_digests_alone() -> None:
    values = load_target("cpu").model_dump(mode="json", exclude={"description"})
    assert load_target("cpu").digest == digest_of(
        {name: value for name, value in values.items() if name not in ("device", "cuda_graph", "block_kernel")}
    )
    for change in ({"device": "cuda"}, {"block_kernel": "never"}, {"precision": "fp16"}):
        assert target_of(runtime="torch", **change).digest != target_of(runtime="torch").digest
    assert target_of(runtime="torch", device="cuda").on_gpu
    assert not load_target("torch-cpu").on_gpu


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError) as caught:
        load_target("rtx-sm98")
    text = str(caught.value)
    assert "unknown target 'rtx-sm98'" in text
    assert "did you mean 'rtx-sm89'" in text
    assert "cpu, rtx-portable, rtx-sm120" in text


def test_target_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('runtime = "onnxruntime"\nthreads = 4\n[batch]\nmin = 2\nopt = 4\nmax = 8\n')
    found = load_target(path)
    assert (found.name, found.threads, found.batch.opt) == ("board", 4, 4)
    assert load_target(str(path)) == found
    assert load_target(found) is found


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml does not exist"):
        load_target(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ('runtime = "onnxruntime"\n[batch]\nmax = 0\n', "mend it in {path}"),
        ('runtime = "onnxruntime"\ntreads = 2\n', "did you mean 'threads'? mend it in {path}"),
        ("threads = 2\n", "mend it in {path}"),
    ],
)
def test_advice_is_the_file_and_no_option(text: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"board\.toml") as caught:
        load_target(path)
    assert caught.value.fix == fix.format(path=path)


@pytest.mark.parametrize("given", [None, 3, ["cpu"]])
def test_no_name_and_no_path(given: object) -> None:
    with pytest.raises(ConfigError, match=r"the target is of type (.|\n)*choose one of cpu, rtx-portable"):
        load_target(given)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"batch": {"min": 4, "opt": 2}}, "min <= opt <= max"),
        ({"batch": {"opt": 65}}, "min <= opt <= max"),
        ({"batch": {"min": 0}}, "greater than or equal to 1"),
        ({"runtime": "tensort"}, "'onnxruntime', 'tensorrt', 'tensorrt-rtx' or 'torch'"),
        ({"runtime": "tensorrt-rtx", "compute_capabilities": ["SM90"]}, "'SM75', 'SM80', 'SM86', 'SM89', 'SM120'"),
        ({"runtime": "tensorrt-rtx", "compute_capabilities": ["SM80", "SM80"]}, "every compute capability once"),
        ({"compute_capabilities": ["SM80"]}, "only with runtime tensorrt-rtx"),
        ({"tf32": True}, "tf32 only with a TensorRT runtime"),
        ({"precision": "fp16"}, "precision 'fp16' only with runtime torch, onnxruntime builds 'fp32'"),
        ({"precision": "int4"}, "'fp32', 'fp16' or 'bf16'"),
        ({"runtime": "torch", "tf32": True}, "tf32 only with a TensorRT runtime, or with torch on cuda"),
        ({"runtime": "torch", "device": "cuda", "tf32": True, "precision": "bf16"}, "tf32 is a way to compute fp32"),
        ({"runtime": "torch", "cuda_graph": True}, "cuda_graph only with device cuda"),
        ({"device": "cuda"}, "device only with runtime torch, not onnxruntime"),
        ({"block_kernel": "never"}, "block_kernel only with runtime torch"),
        ({"builder_level": 6}, "less than or equal to 5"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"name": "../up"}, "pattern"),
        ({"treads": 2}, "did you mean 'threads'"),
        ({"batch": {"maximum": 2}}, "unknown key 'batch.maximum'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        target_of(**values)


def test_an_installed_package_uses_its_own_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "deploy_sparse"
    (package / "_targets").mkdir(parents=True)
    (package / "_targets" / "cpu.toml").write_text('runtime = "onnxruntime"\n')
    (tmp_path / "site-packages" / "engines" / "targets").mkdir(parents=True)  # somebody else's folder: no checkout
    monkeypatch.setattr(module, "__file__", str(package / "engine" / "target.py"))
    assert targets_folder() == package / "_targets"
    assert list_targets() == ("cpu",)
    assert load_target("cpu").runtime == "onnxruntime"
