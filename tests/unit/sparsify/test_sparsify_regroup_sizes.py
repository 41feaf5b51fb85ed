"""How rows are divided: whole tiles, no group below the least rows, equal groups that fit the layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.sparsify.regroup import RegroupRule
from deploy_sparse.sparsify.regrouping.sizes import disjoint_parts, equal_parts, equal_rows, group_sizes
from deploy_sparse.sparsify.regrouping.table import Limits, Table

tiles = st.sampled_from([16, 32, 64])


@given(st.integers(1, 3000), tiles, st.sampled_from([0, 8, 40, 100]), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_groups_are_whole_tiles_but_for_the_remainder(rows, tile, min_rows, parts):
    least = min(min_rows or tile, rows)
    sizes = group_sizes(rows, least, RegroupRule(tile=tile, min_rows=min_rows, parts=parts))
    assert sum(sizes) == rows
    assert len(sizes) <= (parts or 8)
    assert min(sizes) >= least
    assert all(size % tile == 0 for size in sizes[:-1])
    assert len(sizes) == 1 or max(sizes) - min(sizes) < 2 * tile


def test_narrow_layers_are_one_group_and_wide_ones_eight():
    assert group_sizes(20, 20, RegroupRule()) == [20]
    assert group_sizes(100, 32, RegroupRule()) == [32, 32, 36]
    assert group_sizes(512, 32, RegroupRule()) == [64] * 8
    assert group_sizes(512, 32, RegroupRule(parts=16)) == [32] * 16
    assert group_sizes(128, 17, RegroupRule("code", parts=8)) == [16] * 8  # as published
    assert group_sizes(128, 17, RegroupRule("code")) == [32] * 4


@given(st.integers(1, 300), st.integers(0, 40), st.integers(1, 9), st.integers(8, 40), tiles)
@settings(max_examples=200, deadline=None)
def test_equal_groups_hold_every_surviving_row(alive, empty, parts, least, tile):
    each = equal_rows(alive, alive + empty, parts, min(least, alive), tile)
    if each is not None:
        assert alive <= each * parts <= alive + empty
        assert each * parts - alive < each
        assert each >= min(least, alive)
        assert parts == 1 or each % tile == 0 or each * parts == alive + empty


@pytest.mark.parametrize(
    ("alive", "rows", "tile", "parts", "expected"),
    [(64, 64, 32, 0, 2), (63, 64, 32, 0, 2), (100, 100, 32, 0, 2), (96, 96, 32, 0, 3), (97, 97, 32, 0, 1),
     (512, 512, 32, 0, 8), (512, 512, 32, 6, 4), (20, 64, 32, 0, 1)],
)  # fmt: skip
def test_as_many_equal_groups_as_fit(alive, rows, tile, parts, expected):
    rule = RegroupRule(tile=tile, parts=parts, blocks="equal")
    assert equal_parts(alive, rows, min(tile, alive), rule) == expected


@pytest.mark.parametrize(
    ("rows", "columns", "density", "parts", "expected"),
    [(256, 256, 0.26, 0, 4), (256, 256, 0.01, 0, 8), (256, 12, 0.3, 0, 4), (256, 256, 0.8, 0, 1), (256, 256, 0.3, 5, 4),
     (128, 3, 0.4, 0, 3), (127, 64, 0.3, 0, 3), (31, 64, 0.1, 0, 1)],
)  # fmt: skip
def test_disjoint_parts_divide_the_layer_near_its_density(rows, columns, density, parts, expected):
    rule = RegroupRule(blocks="disjoint", columns="channel", parts=parts)
    table = Table(torch.full((rows, columns), density * 9, dtype=torch.float64), torch.ones(rows, columns, 9), columns)
    assert disjoint_parts(rows, [table], [Limits.of(table, rule, rows)], rule) == expected


@pytest.mark.parametrize(
    ("columns", "densities", "parts", "expected"),
    [
        ((96,), (0.3,), 0, 3),
        ((128,), (0.3,), 0, 2),  # 96 rows are no 4 times 32
        ((96, 128), (0.3, 0.3), 0, 2),
        ((96, 128), (0.3, 0.3), 4, 2),
        ((96, 96), (0.3, 0.9), 0, 2),
        ((96, 1024), (0.3, 0.9), 0, 1),
    ],
)
def test_layers_divided_alike_get_a_number_of_blocks_that_all_can_have(columns, densities, parts, expected):
    rule = RegroupRule(blocks="disjoint", columns="channel", parts=parts)
    tables = [
        Table(torch.full((96, wide), density * 9, dtype=torch.float64), torch.ones(96, wide, 9), wide)
        for wide, density in zip(columns, densities, strict=True)
    ]
    assert disjoint_parts(96, tables, [Limits.of(table, rule, 96) for table in tables], rule) == expected
