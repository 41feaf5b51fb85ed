"""What gc removes and what it leaves: superseded, damaged, unfinished, of others; beside builders and other gcs."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import DAY, flip, make_old, names, only, other_target, plant, unfinished

from deploy_sparse.artifact import unfinished_name
from deploy_sparse.engine import collect as module
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.collect import collect
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.onnx.file import OnnxFile
from deploy_sparse.engine.store import QUIET_S, read_store
from deploy_sparse.errors import ArtifactError, ConfigError


def test_gc_keeps_the_latest_of_each_name_target_and_gpu(store: Path, built: Engine) -> None:
    ages = {age: plant(store, built, age) for age in (1, 2, 3)}
    other_name = plant(store, built, 9, name="other")
    board = plant(store, built, 9, target=other_target(built, name="board"))
    first, second = (plant(store, built, 9, gpu={"name": name, "capability": "SM90"}) for name in ("H100", "H200"))
    shown = collect(store, dry_run=True)
    assert names(shown.removed) == {ages[2].name, ages[3].name}
    assert all(folder.exists() for folder in ages.values())
    assert {v.why for v in shown.verdicts} == {f"superseded: by {ages[1].name}"}
    assert names(collect(store, keep=2, older_than_days=5).removed) == set()
    assert names(collect(store, keep=2).removed) == {ages[3].name}
    assert names(collect(store).removed) == {ages[2].name}
    left = {ages[1], other_name, board, first, second}
    assert {*store.iterdir()} == left
    assert names(collect(store, keep=0, older_than_days=5).removed) == {p.name for p in left - {ages[1]}}
    assert {*store.iterdir()} == {ages[1]}


def test_a_cache_hit_makes_an_entry_the_latest(store: Path, built: Engine, exported: OnnxFile) -> None:
    mine = build_engine(exported, "cpu", out=store, name="tiny").folder
    make_old(mine, 9)
    rival = plant(store, built, 2)
    assert build_engine(exported, "cpu", out=store, name="tiny").cached
    assert names(collect(store).removed) == {rival.name}
    assert open_entry(mine)


def test_damaged_and_incompatible_ones_do_not_count_as_kept(store: Path, built: Engine) -> None:
    good, bad = plant(store, built, 2), plant(store, built, 1)
    flip(bad / "model.onnx")
    done = collect(store)
    assert names(done.removed) == {bad.name}
    assert names(done.kept) == {good.name}


def test_unfinished_entries_go_once_nobody_writes_them(store: Path) -> None:
    folder = unfinished(store)
    assert unfinished_name(folder.name) == "tiny-cpu-0123456789ab"
    assert only(store).being_written
    (verdict,) = collect(store).verdicts
    assert "within the hour" in verdict.left
    make_old(folder, 1.01 * QUIET_S / DAY)
    assert not only(store).being_written
    assert names(collect(store).removed) == {folder.name}
    assert not list(store.iterdir())


def test_files_of_others_are_never_removed(store: Path, built: Engine) -> None:
    noted, linked, deep = (plant(store, built, age) for age in (2, 3, 4))
    plant(store, built, 1)
    (noted / "notes.txt").write_text("precious")
    (linked / "model.engine").symlink_to(built.path)
    (deep / "model.pt2").mkdir()
    (deep / "model.pt2" / "precious").write_text("x")
    foreign = store / "mine"
    foreign.mkdir()
    (foreign / "engine.json").write_text('{"kind": "engine", "horsepower": 90}')
    half = unfinished(store)
    (half / "thesis.tex").write_text("x")
    make_old(half, 9)
    done = collect(store, keep=0)
    assert {v.entry.folder for v in done.verdicts if v.left} == {noted, linked, deep, half}
    assert all("remove" in v.left for v in done.verdicts if v.left)
    assert done.others == ("mine",)
    for path in (noted / "notes.txt", linked / "model.engine", deep / "model.pt2/precious", foreign / "engine.json"):
        assert path.exists()
    assert (half / "thesis.tex").exists()


def test_an_entry_that_was_replaced_since_is_put_back(
    store: Path, built: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant(store, built)
    flip(folder / "model.onnx")
    real = os.rename

    def mended_first(source, destination):
        monkeypatch.setattr(os, "rename", real)
        shutil.rmtree(folder)
        plant(store, built)
        real(source, destination)

    monkeypatch.setattr(os, "rename", mended_first)
    (verdict,) = collect(store).verdicts
    assert verdict.left == "it changed while gc looked at it"
    assert open_entry(folder)
    assert [*store.iterdir()] == [folder]


def test_removed_by_another_or_not_removable(store: Path, built: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plant(store, built)

    def fails(problem: OSError):
        def rename(source, destination):
            raise problem

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", fails(PermissionError(13, "Permission denied")))
        (verdict,) = collect(store, keep=0).verdicts
        assert verdict.left == "it cannot be removed (Permission denied)"
        assert open_entry(folder)
        patch.setattr(module.os, "rename", fails(FileNotFoundError(2, "gone")))
        assert names(collect(store, keep=0).removed) == {folder.name}
    monkeypatch.setattr(module.shutil, "rmtree", fails(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(
        module.shutil, "rmtree", lambda path: fails(PermissionError(13, "Permission denied"))(path, path)
    )
    (verdict,) = collect(store, keep=0).verdicts
    assert verdict.left.startswith("a part of it cannot be removed (Permission denied): ")
    assert only(store).state == "unfinished"  # the next gc knows what it is


def test_build_while_gc_takes_the_entry(store: Path, exported: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy_sparse.engine import build

    first = build_engine(exported, "cpu", out=store).folder
    real = build.open_entry

    def taken(folder):
        monkeypatch.setattr(build, "open_entry", real)
        assert collect(store, keep=0).removed
        return real(folder)

    monkeypatch.setattr(build, "open_entry", taken)
    again = build_engine(exported, "cpu", out=store)
    assert not again.cached
    assert again.folder == first
    assert open_entry(first)


def test_gc_beside_builders_and_other_gcs(store: Path, exported: OnnxFile) -> None:
    """Four builders of one key and four gcs that keep nothing: every build returns a whole engine."""

    key = build_engine(exported, "cpu", out=store).manifest["key"]

    def build(_: int) -> str:
        return build_engine(exported, "cpu", out=store).manifest["key"]

    with ThreadPoolExecutor(8) as pool:
        built = [pool.submit(build, index) for index in range(16)]
        swept = [pool.submit(collect, store, keep=0) for _ in range(40)]
        problems = [future.exception() for future in built]
        assert all(future.result() is not None for future in swept)
    # what gc took between the end of a build and its last check is an error; it never makes a wrong or torn answer
    assert all(problem is None or isinstance(problem, ArtifactError) for problem in problems)
    assert {f.result() for f, problem in zip(built, problems, strict=True) if problem is None} <= {key}
    assert build_engine(exported, "cpu", out=store).manifest["key"] == key
    assert {entry.state for entry in read_store(store).entries} == {"good"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "damaged", "incompatible", "unfinished", "stranger"]), max_size=5), st.integers(0, 3))  # fmt: skip
def test_gc_twice_is_gc_once_and_never_takes_a_stranger(built: Engine, tmp_path: Path, kinds, keep) -> None:
    store = tmp_path / "s"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    for index, kind in enumerate(kinds):
        if kind == "unfinished":
            make_old(unfinished(store, f"tiny-cpu-{index:012x}"), 1)
        elif kind == "stranger":
            (store / f"mine-{index}").mkdir()
        else:
            target = other_target(built, later=1) if kind == "incompatible" else built.manifest["target"]
            folder = plant(store, built, index, target=target)
            if kind == "damaged":
                flip(folder / "model.onnx")
                make_old(folder, index)
    assert names(collect(store, keep=keep, dry_run=True).removed) == names(collect(store, keep=keep).removed)
    left = sorted(path.name for path in store.iterdir())
    assert len(left) == min(kinds.count("good"), keep) + kinds.count("stranger")
    assert not collect(store, keep=keep).verdicts
    assert left == sorted(path.name for path in store.iterdir())


def test_bad_arguments(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep -1"):
        collect(store, keep=-1)
    for days in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="--older-than"):
            collect(store, older_than_days=days)
    with pytest.raises(ArtifactError, match="gone does not exist"):
        read_store(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file is a file"):
        collect(tmp_path / "file")
    assert read_store(store).entries == ()
