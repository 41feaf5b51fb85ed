"""Targets: shipped files, names, validation, digest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy_sparse.artifact import digest_of
from deploy_sparse.config import config_from
from deploy_sparse.engine import target as module
from deploy_sparse.engine.target import Target, in_precision, in_runtime, list_targets, load_target, targets_folder
from deploy_sparse.errors import ConfigError

SHIPPED = (
    *("cpu", "rtx-portable", "rtx-sm120", "rtx-sm75", "rtx-sm80", "rtx-sm86", "rtx-sm89"),
    *("tensorrt", "tensorrt-a100", "tensorrt-h100", "tensorrt-l4", "tensorrt-orin", "torch-cpu", "torch-cuda"),
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
    full = {name: load_target(name) for name in SHIPPED if name.startswith("tensorrt-")}
    assert {target.runtime for target in full.values()} == {"tensorrt"}
    assert {name: target.compute_capabilities for name, target in full.items()} == {
        "tensorrt-a100": ("SM80",),
        "tensorrt-h100": ("SM90",),
        "tensorrt-l4": ("SM89",),
        "tensorrt-orin": ("SM87",),
    }


def test_digests_differ_and_ignore_the_description() -> None:
    assert len({load_target(name).digest for name in SHIPPED}) == len(SHIPPED)
    assert target_of().digest == target_of(description="other words").digest
    for change in ({"threads": 2}, {"batch": {"max": 8}}, {"width_multiple": 8}, {"name": "yours"}):
        assert target_of(**change).digest != target_of().digest


FIRST_KEYS = (  # what the digests of the first engines were made of
    *("name", "runtime", "precision", "tf32", "batch", "threads", "compute_capabilities", "builder_level"),
    *("workspace_mib", "width_multiple"),
)
CHANGES = {
    "aux_streams": 0,
    "sparse_weights": True,
    "timing_cache": False,
    "version_compatible": True,
    "hardware_compatibility": "ampere-plus",
    "refit": "any",
    "axes": {"height": {"min": 1, "opt": 2, "max": 3}},
}


def test_keys_that_came_later_leave_digests_alone_until_they_are_set() -> None:
    values = load_target("cpu").model_dump(mode="json")
    assert load_target("cpu").digest == digest_of({name: values[name] for name in FIRST_KEYS})
    plain = target_of(runtime="tensorrt")
    digests = {target_of(runtime="tensorrt", **{key: value}).digest for key, value in CHANGES.items()}
    digests |= {target_of(runtime="tensorrt", refit="any", strip=True).digest, plain.digest}
    assert len(digests) == len(CHANGES) + 2
    assert not set(CHANGES) & set(FIRST_KEYS)


def test_precision_and_exclude_are_part_of_the_digest() -> None:
    plain = load_target("rtx-sm89")
    digests = {in_precision(plain, precision).digest for precision in ("fp32", "fp16", "bf16", "int8", "fp8")}
    digests |= {in_precision(plain, "fp16", ["head"]).digest, in_precision(plain, "fp16", ["head", "stem"]).digest}
    assert len(digests) == 7
    assert target_of(runtime="tensorrt", precision="int8", tf32=True).tf32  # what stays fp32 may


def test_another_precision_has_another_name() -> None:
    plain = load_target("rtx-sm89")
    assert in_precision(plain, None) is in_precision(plain, "fp32") is plain
    half = in_precision(plain, "fp16", ("head",))
    assert (half.name, half.precision, half.exclude) == ("rtx-sm89-fp16", "fp16", ("head",))
    assert half.compute_capabilities == plain.compute_capabilities
    assert in_precision(half, None, ("stem", "head")).exclude == ("head", "stem")
    assert in_precision(half, "fp32").exclude == ()
    with pytest.raises(ConfigError, match=r"int4"):
        in_precision(plain, "int4")
    assert in_precision(plain, "fp16", "head") == half  # one pattern, not four letters


@pytest.mark.parametrize(
    ("change", "given", "expected"),
    [
        (lambda: in_precision(load_target("cpu"), "fp8"), "precision 'fp8' with target cpu", "only with a TensorRT runtime"),
        (
            lambda: in_precision(load_target("cpu"), None, ("head",)),
            "precision 'fp32' and exclude ['head'] with target cpu",
            "exclude only with a precision below fp32",
        ),
        (lambda: in_runtime(load_target("tensorrt-h100"), "tensorrt-rtx"), "runtime 'tensorrt-rtx' with target tensorrt-h100", "SM90"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named_without_the_whole_target(
    change: Callable[[], Target], given: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        change()
    assert caught.value.given == given
    assert expected in caught.value.expected
    assert "--" not in caught.value.fix
    path = write(tmp_path, mine='inherits = "cpu"\nprecision = "fp8"\n') / "mine.toml"
    with pytest.raises(ConfigError) as caught:
        load_target(path)
    assert (caught.value.given, caught.value.fix) == (f"{path} has keys that do not go together", f"mend it in {path}")


def test_options_of_torch() -> None:
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


def write(folder: Path, **texts: str) -> Path:
    """Target files by name; the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_inherits_a_shipped_target(tmp_path: Path) -> None:
    folder = write(tmp_path, mine='inherits = "tensorrt-a100"\nsparse_weights = true\n[batch]\nmax = 8\n')
    found, base = load_target(folder / "mine.toml"), load_target("tensorrt-a100")
    assert (found.name, found.description) == ("mine", "")  # neither is inherited
    assert (found.compute_capabilities, found.sparse_weights) == (("SM80",), True)
    assert (found.batch.min, found.batch.opt, found.batch.max) == (1, 8, 8)  # key by key, in tables too
    assert type(found) is Target
    assert found.digest == Target(**{**base.model_dump(), "name": "mine", "sparse_weights": True, "batch": found.batch}).digest  # fmt: skip


def test_inherits_files_beside_it_over_several_steps(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "deep",
        a='name = "first"\nruntime = "onnxruntime"\nthreads = 2\nwidth_multiple = 8\n',
        b='inherits = "a.toml"\nthreads = 3\n',
        c='inherits = "./b.toml"\n[batch]\nmax = 5\n',
    )
    found = load_target(folder / "c.toml")
    assert (found.name, found.threads, found.width_multiple, found.batch.max) == ("c", 3, 8, 5)
    assert load_target(folder / "a.toml").name == "first"


@pytest.mark.parametrize(
    ("texts", "given", "fix"),
    [
        ({"mine": 'inherits = "tensort"\n'}, "inherits 'tensort': unknown target 'tensort'", "did you mean 'tensorrt'"),
        ({"mine": 'inherits = "./gone.toml"\n'}, r"gone\.toml does not exist", "check the path"),
        ({"mine": 'inherits = "mine.toml"\n'}, r"mine\.toml inherits from itself", "drop inherits in"),
        ({"mine": 'inherits = "b.toml"\n', "b": 'inherits = "mine.toml"\n'}, "inherits from itself", "drop inherits"),
        ({"mine": 'inherits = 3\nruntime = "torch"\n'}, "inherits = 3", "mend it in"),
        ({"mine": 'inherts = "cpu"\nruntime = "torch"\n'}, "unknown key 'inherts'", "did you mean 'inherits'"),
        ({"mine": 'inherits = "b.toml"\n', "b": 'runtime = "torch"\ntreads = 1\n'}, r"'treads' in .*b\.toml", r"mend it in .*b\.toml"),
        ({"mine": 'inherits = "tensorrt"\nruntime = "torch"\nrefit = "any"\n'}, r"mine\.toml", "mend it in .*mine"),
    ],
)  # fmt: skip
def test_bad_inheritance_names_the_file(texts: dict[str, str], given: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=given) as caught:
        load_target(write(tmp_path, **texts) / "mine.toml")
    assert re.search(fix, caught.value.fix)


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
        ({"runtime": "tensort"}, "'onnxruntime', 'tensorrt', 'tensorrt-rtx', 'torch' or 'torch-tensorrt'"),
        (
            {"runtime": "tensorrt-rtx", "compute_capabilities": ["SM90"]},
            "SM75, SM80, SM86, SM89, SM120, SM121: tensorrt-rtx does not compile for SM90",
        ),
        ({"runtime": "tensorrt-rtx", "compute_capabilities": ["SM80", "SM80"]}, "every compute capability once"),
        ({"runtime": "tensorrt-rtx", "compute_capabilities": ["SM9"]}, "'SM87', 'SM89', 'SM90'"),
        (
            {"compute_capabilities": ["SM80"]},
            "only with runtime tensorrt, tensorrt-rtx or torch-tensorrt, not onnxruntime",
        ),
        ({"builder_level": 5}, "builder_level only with runtime tensorrt, tensorrt-rtx or torch-tensorrt"),
        ({"runtime": "tensorrt", "threads": 4}, "threads only with runtime onnxruntime or torch, not tensorrt"),
        (
            {"runtime": "tensorrt-rtx", "refit": "any"},
            "refit only with runtime tensorrt or torch-tensorrt, not tensorrt-rtx",
        ),
        ({"runtime": "tensorrt-rtx", "timing_cache": False}, "timing_cache only with runtime tensorrt"),
        ({"runtime": "tensorrt-rtx", "version_compatible": True}, "version_compatible only with runtime tensorrt"),
        ({"axes": {"height": {"min": 4, "opt": 2, "max": 8}}}, "min <= opt <= max"),
        ({"axes": {"height": {"min": 4, "max": 8}}}, "'axes.height.opt' is missing"),
        ({"axes": {"height": {"min": 4, "opt": 4, "maxx": 8}}}, "axes.height.max"),
        (
            {"runtime": "torch", "axes": CHANGES["axes"]},
            "axes only with runtime onnxruntime, tensorrt or tensorrt-rtx",
        ),
        ({"runtime": "tensorrt", "strip": True}, "strip with refit = 'identical' or 'any'"),
        ({"runtime": "tensorrt", "hardware_compatibility": "any"}, "'none', 'same-capability' or 'ampere-plus'"),
        ({"runtime": "tensorrt", "sparse_weight": True}, "did you mean 'sparse_weights'"),
        ({"runtime": "tensorrt", "aux_streams": -1}, "greater than or equal to 0"),
        ({"tf32": True}, "tf32 only with a TensorRT runtime"),
        ({"runtime": "torch", "precision": "int8"}, "precision 'int8' not with runtime torch, which takes fp32, fp16"),
        ({"precision": "int4"}, "'fp32', 'fp16', 'bf16', 'int8' or 'fp8'"),
        (
            {"runtime": "tensorrt-rtx", "precision": "fp8", "compute_capabilities": ["SM86", "SM89"]},
            "precision 'fp8' only on later GPUs than SM86",
        ),
        ({"exclude": ["head"]}, "exclude only with a precision below fp32"),
        ({"precision": "fp16", "exclude": ["head", "head"]}, "exclude has every pattern once"),
        ({"precision": "fp16", "exclude": [""]}, "none that is empty"),
        (
            {"runtime": "torch", "precision": "fp16", "exclude": ["head"]},
            "exclude only with runtime onnxruntime, tensorrt or tensorrt-rtx",
        ),
        ({"runtime": "tensorrt", "tf32": True, "precision": "fp16"}, "tf32 is a way to compute fp32, not fp16"),
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
