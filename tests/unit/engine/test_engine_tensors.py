"""Feeds are checked, never cast; samples are seeded."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy_sparse.engine.tensors import (
    TensorSpec,
    check_feeds,
    check_outputs,
    numpy_dtype,
    placed_form,
    sample_feeds,
    spec_from_json,
)
from deploy_sparse.errors import EngineError, MissingDependencyError

X = TensorSpec("input", "float32", ("batch", 3, 4))
IDS = TensorSpec("tokens", "int64", ("batch", 7))
RANGE = (2, 5)

specs = st.builds(
    TensorSpec,
    st.just("input"),
    st.sampled_from(["float32", "float64", "int64", "int8", "bool"]),
    st.lists(st.integers(1, 4), max_size=3).map(lambda rest: ("batch", *rest)),
)


def good(batch: int = 2) -> dict[str, np.ndarray]:
    return sample_feeds((X, IDS), batch)


@given(specs, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_samples_pass_the_check_exactly_in_range(spec: TensorSpec, batch: int, seed: int) -> None:
    feeds = sample_feeds((spec,), batch, seed)
    assert feeds["input"].shape == spec.concrete(batch)
    assert np.array_equal(feeds["input"], sample_feeds((spec,), batch, seed)["input"])
    if RANGE[0] <= batch <= RANGE[1]:
        assert check_feeds(feeds, (spec,), RANGE) == batch
    else:
        with pytest.raises(EngineError, match=f"batch {batch} is outside this engine's range"):
            check_feeds(feeds, (spec,), RANGE)


@given(specs)
def test_spec_survives_json(spec: TensorSpec) -> None:
    assert spec_from_json(spec.as_json()) == spec


def test_other_seeds_give_other_samples() -> None:
    assert not np.array_equal(sample_feeds((X,), 2, 0)["input"], sample_feeds((X,), 2, 1)["input"])


def test_fixed_batch_ignores_the_range() -> None:
    spec = TensorSpec("input", "float32", (9, 3))
    assert check_feeds({"input": np.zeros((9, 3), np.float32)}, (spec,), RANGE) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inptu": np.zeros((2, 3, 4), np.float32)}, "unknown input 'inptu'.*did you mean 'input'"),
        ({"input": np.zeros((2, 3, 4))}, r"has dtype float64(.|\n)*\.astype\(np\.float32\)"),
        ({"tokens": np.zeros((2, 7), np.int32)}, r"has dtype int32(.|\n)*\.astype\(np\.int64\)"),
        ({"input": np.zeros((3, 4), np.float32)}, r"has 2 dimensions(.|\n)*array\[None\]"),
        ({"input": np.zeros((2, 1, 3, 4), np.float32)}, r"has 4 dimensions(.|\n)*reshape it"),
        ({"input": np.zeros((2, 3, 5), np.float32)}, r"has 5 at axis 2(.|\n)*expected: 4 there"),
        ({"input": np.zeros((2, 4, 3), np.float32).transpose(0, 2, 1)}, "not contiguous(.|\n)*ascontiguousarray"),
        ({"input": np.zeros((3, 3, 4), np.float32)}, "different batch sizes: input 3, tokens 2"),
        ({"input": torch.zeros(2, 3, 4)}, r"is a Tensor(.|\n)*\.detach\(\)\.cpu\(\)\.numpy\(\)"),
        ({"input": [1.0]}, r"is a list(.|\n)*np\.asarray"),
    ],
)
def test_bad_feeds_say_how_to_mend_them(change: dict[str, object], text: str) -> None:
    with pytest.raises(EngineError, match=f"(?s){text}"):
        check_feeds({**good(), **change}, (X, IDS), RANGE)


def test_missing_input_and_no_dictionary() -> None:
    with pytest.raises(EngineError, match="input 'tokens' is missing"):
        check_feeds({"input": good()["input"]}, (X, IDS), RANGE)
    with pytest.raises(EngineError, match=r"feeds is a ndarray(.|\n)*{'input': array}"):
        check_feeds(good()["input"], (X, IDS), RANGE)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [0, 1, 6])
def test_batch_outside_the_range(batch: int) -> None:
    with pytest.raises(EngineError, match="expected: a batch of 2 to 5"):
        check_feeds(good(batch), (X, IDS), RANGE)


# Arrays that take results

Y = TensorSpec("scores", "float32", ("batch", 2))
OTHER = TensorSpec("other", "float32", ("rows", 2))


def check(out: dict[str, np.ndarray], outputs: tuple[TensorSpec, ...] = (Y, OTHER)) -> None:
    feeds = good(3)
    forms = {spec.name: placed_form(spec.name, feeds[spec.name], spec) for spec in (X, IDS)}
    check_outputs(out, outputs, forms, (X, IDS))


def test_axes_of_outputs_take_the_extents_of_inputs_by_name() -> None:
    check({"scores": np.zeros((3, 2), np.float32), "other": np.zeros((99, 2), np.float32)})
    with pytest.raises(EngineError, match=r"goes into an array float32 \[4, 2\](.|\n)*expected: float32 \[3, 2\]"):
        check({"scores": np.zeros((4, 2), np.float32)})
    with pytest.raises(EngineError, match=r"expected: float32 \[rows, 2\]"):
        check({"other": np.zeros((9, 3), np.float32)})


def test_outputs_share_no_memory() -> None:
    memory = np.zeros((6, 2), np.float32)
    check({"scores": memory[:3], "other": memory[3:]})
    with pytest.raises(EngineError, match="'other' goes into memory of output 'scores'"):
        check({"scores": memory[:3], "other": memory[2:5]})


def test_swapped_bytes_are_another_type() -> None:
    with pytest.raises(EngineError, match=r"has dtype >f4(.|\n)*expected: float32"):
        check_feeds({**good(), "input": np.zeros((2, 3, 4), ">f4")}, (X, IDS), RANGE)


def test_bfloat16_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("x", "bfloat16", ("batch", 3))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    feeds = sample_feeds((spec,), 2)
    assert feeds["x"].dtype == ml_dtypes.bfloat16
    assert np.abs(feeds["x"].astype(np.float32)).max() > 0.1
    assert check_feeds(feeds, (spec,), RANGE) == 2
    with pytest.raises(EngineError, match="expected: bfloat16"):
        check_feeds({"x": np.zeros((2, 3), np.float32)}, (spec,), RANGE)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingDependencyError, match=r"NumPy alone has no bfloat16(.|\n)*pip install ml-dtypes"):
        sample_feeds((spec,), 2)
