"""Sparse amenable channels: counted row by row, and rare in random masks."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.sparsify.amenable import SparseRows, amenable


def brute_force(mask, allowed):
    rows = [
        Fraction(int((m & a).sum()), int(a.sum())) for m, a in zip(mask.flatten(1), allowed.flatten(1), strict=True) if a.any()
    ]  # fmt: skip
    layer = Fraction(int((mask & allowed).sum()), int(allowed.sum())) if rows else Fraction(0)
    counts = (lambda r: True, lambda r: r < layer, lambda r: 2 * r < layer)
    return SparseRows(*(sum(1 for row in rows if count(row)) for count in counts))


@given(st.integers(0, 999), st.sampled_from([(6, 5), (5, 4, 3, 3), (4, 6, 3)]), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_counts_row_by_row(seed, shape, density, columns):
    generator = torch.Generator().manual_seed(seed)
    rows_there = torch.rand(shape[0], generator=generator) < 0.8
    columns_there = torch.rand(shape[1], generator=generator) < columns
    allowed = (rows_there[:, None] & columns_there).reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
    chance = density * torch.rand(shape[0], generator=generator)
    mask = torch.rand(shape, generator=generator) < chance.reshape(-1, *[1] * (len(shape) - 1))
    found = amenable({"w": mask}, {"w": allowed})
    assert found.by_layer == {"w": brute_force(mask, allowed)}


def test_a_small_layer_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]) > 0  # density 7/16
    whole = torch.ones_like(mask)
    assert amenable({"w": mask}, {"w": whole}).by_layer["w"] == SparseRows(4, sparser=2, amenable=1)
    assert amenable({"w": mask}, {}).by_layer["w"] == SparseRows(4, sparser=2, amenable=1)
    allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]) > 0  # 2/2, 2/2, 1/2: 5/6
    assert amenable({"w": mask}, {"w": allowed}).by_layer["w"] == SparseRows(3, sparser=1, amenable=0)


def test_layers_add_up_and_biases_and_norms_do_not_count():
    one = torch.tensor([[True, True], [True, False]])
    masks = {"a": one, "a.bias": torch.tensor([True, False]), "b": ~one}
    found = amenable(masks, {name: torch.ones_like(mask) for name, mask in masks.items()})
    assert list(found.by_layer) == ["a", "b"]
    assert (found.channels, found.sparser, found.amenable) == (4, 2, 1)
    assert amenable({}, {}).channels == 0


def test_a_random_mask_has_half_of_its_channels_sparser_and_next_to_none_amenable():
    mask = torch.rand(512, 128, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.1
    found = amenable({"w": mask}, {})
    assert 0.4 < found.sparser / found.channels < 0.6
    assert found.amenable == 0
    starved = mask.clone()
    starved[:100] &= torch.rand(100, 128, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.2
    assert amenable({"w": starved}, {}).amenable == 100


def test_an_empty_layer_has_no_channel_below_its_density():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    assert amenable({"w": mask}, {}).by_layer["w"] == SparseRows(3, sparser=0, amenable=0)
    assert amenable({"w": mask}, {"w": mask}).by_layer["w"] == SparseRows(0, 0, 0)
