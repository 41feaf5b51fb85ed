"""Calibration data: every form of it, its digest, and everything that can be wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_sparse.engine.precision.calibration import Calibration, read_calibration
from deploy_sparse.engine.tensors import TensorSpec
from deploy_sparse.errors import ArtifactError, ConfigError, DeploySparseError

ONE = [TensorSpec("input", "float32", ("n", 3))]
TWO = [TensorSpec("image", "float32", ("n", 3)), TensorSpec("ids", "int64", ("n", 2))]
X = np.arange(210, dtype=np.float32).reshape(70, 3)
IDS = np.arange(140, dtype=np.int64).reshape(70, 2)


def read(given: object, specs: list[TensorSpec] | None = None) -> Calibration:
    found = read_calibration(given, specs or ONE, {})
    assert found is not None
    return found


def rows(found: Calibration, name: str = "input") -> np.ndarray:
    return np.concatenate([batch[name] for batch in found.batches])


def test_none_and_what_was_read_stay() -> None:
    assert read_calibration(None, ONE, {}) is None
    found = read(X)
    assert read(found) is found


@pytest.mark.parametrize(
    "form", ["npz", "named npz", "folder", "array", "tensor", "batches", "tuples", "mappings", "loader"]
)
def test_forms_of_one_input(form: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X)
    np.savez_compressed(tmp_path / "b.npz", input=X)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "1.npy", X[:40])
    np.save(tmp_path / "folder" / "2.npy", X[40:])
    halves = [X[:40], X[40:]]
    given = {
        "npz": tmp_path / "a.npz",
        "named npz": str(tmp_path / "b.npz"),
        "folder": tmp_path / "folder",
        "array": X,
        "tensor": torch.from_numpy(X),
        "batches": halves,
        "tuples": ((half,) for half in halves),
        "mappings": [{"input": half} for half in halves],
        "loader": torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=35),
    }[form]
    found = read(given)
    np.testing.assert_array_equal(rows(found), X)
    assert found.samples == 70
    assert all(batch["input"].shape[0] <= 40 for batch in found.batches)


def test_several_inputs_and_fixed_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=X, ids=IDS)
    for given in (tmp_path / "a.npz", [(X, IDS)], [{"ids": IDS, "image": X}]):
        found = read(given, TWO)
        np.testing.assert_array_equal(rows(found, "ids"), IDS)
        np.testing.assert_array_equal(rows(found, "image"), X)
        assert found.samples == 70
    found = read(X, [TensorSpec("input", "float32", (4, 3))])
    assert {batch["input"].shape for batch in found.batches} == {(4, 3)}
    assert found.samples == 68  # the last two fill no batch


def test_digest_is_of_the_numbers() -> None:
    assert read(X).digest == read(X.copy()).digest == read(torch.from_numpy(X)).digest
    changed = X.copy()
    changed[0, 0] += 1
    digests = {read(given).digest for given in (X, changed, X[:-1], X[::-1].copy())}
    assert len(digests) == 4


def damaged(path: Path) -> Path:
    np.savez(path, X)
    path.write_bytes(path.read_bytes()[:200])
    return path


def pickled(path: Path) -> Path:
    np.savez(path, np.array([{"a": 1}, None], dtype=object))
    return path


BAD = {
    "missing": (lambda folder: folder / "gone.npz", r"gone\.npz does not exist"),
    "another file": (lambda folder: folder / "x.pt", r"x\.pt does not exist(.|\n)*an \.npz file"),
    "damaged": (lambda folder: damaged(folder / "x.npz"), r"x\.npz cannot be read"),
    "objects": (lambda folder: pickled(folder / "x.npz"), r"x\.npz cannot be read \(Object arrays cannot be loaded"),
    "empty archive": (lambda folder: (np.savez(folder / "x.npz"), folder / "x.npz")[1], r"x\.npz holds no arrays"),
    "empty folder": (lambda folder: folder, "holds no samples"),
    "no batches": (lambda folder: [], "the batches given holds no samples"),
    "empty batch": (lambda folder: [X[:0]], "has an empty batch"),
    "number": (lambda folder: 3, "calibration data is a int"),
    "masked": (lambda folder: [np.ma.masked_less(X, 9)], r"masked array(.|\n)*filled\(0\)"),
    "bytes": (lambda folder: b"x", "calibration data is a bytes"),
    "labels": (lambda folder: [(X, np.zeros(70))], r"batch 0 holds 2 arrays(.|\n)*leave labels out"),
    "type": (lambda folder: X.astype(np.float64), r"dtype float64(.|\n)*astype\(np\.float32\)"),
    "shape": (lambda folder: [X, X[:, :2]], r"calibration batch 1 of the batches given: input 'input' has 2 at axis 1"),
    "name": (lambda folder: [{"inputs": X}], r"unknown input 'inputs'(.|\n)*did you mean 'input'"),
    "NaN": (lambda folder: [X * np.nan], "has NaN or infinite numbers in 'input'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(DeploySparseError, match=message) as caught:
        read(make(tmp_path))
    assert isinstance(caught.value, ArtifactError | ConfigError)


def test_inputs_with_different_numbers_of_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=X, ids=IDS[:60])
    with pytest.raises(ConfigError, match=r"image \(70, 3\), ids \(60, 2\)"):
        read(tmp_path / "a.npz", TWO)


def test_other_axes_are_checked_against_their_ranges() -> None:
    specs = [TensorSpec("input", "float32", ("n", "length"))]
    assert read_calibration([X, X[:, :2]], specs, {"length": (1, 3)}) is not None
    with pytest.raises(ConfigError, match="has 3 at axis 1"):
        read_calibration([X], specs, {"length": (1, 2)})


def test_long_arrays_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", image=X, ids=IDS)
    for given in ({"image": X, "ids": IDS}, {"ids": torch.from_numpy(IDS), "image": torch.from_numpy(X)}):
        found = read(given, TWO)
        assert (found.samples, found.source) == (70, "the arrays given")
        assert found.digest == read(tmp_path / "two.npz", TWO).digest
    with np.load(tmp_path / "two.npz") as archive:
        assert read(archive, TWO).digest == found.digest
    assert read({"anything": X}).digest == read(X).digest
    with pytest.raises(ConfigError, match=r"unknown input 'labels'"):
        read({"image": X, "labels": IDS}, TWO)
    with pytest.raises(ConfigError, match=r"calibration arrays have shapes image \(70, 3\), ids \(40, 2\)"):
        read({"image": X, "ids": IDS[:40]}, TWO)


def test_numbers_that_tell_no_range() -> None:
    for given in (np.zeros((70, 3), np.float32), [np.full((4, 3), 0.5, np.float32)] * 2):
        with pytest.raises(ConfigError, match=r"is the same number everywhere(.|\n)*preprocessed"):
            read(given)
    assert read([np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)]).samples == 8
    ones = {"image": X, "ids": np.ones_like(IDS)}  # a mask may be
    assert read(ones, TWO).samples == 70
    assert read(np.zeros((1, 1), np.float32), [TensorSpec("x", "float32", ("n", 1))]).samples == 1
