"""Feeds are checked, never cast; samples are seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy_sparse.engine.tensors import TensorSpec, check_feeds, sample_feeds, spec_from_json
from deploy_sparse.errors import EngineError

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
