"""Columns by rule: each against a plain loop or against every other choice there is."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.sparsify.regrouping.columns import (
    dense_columns,
    dense_share,
    equally_dense_columns,
    largest,
    ratio_width,
    shared_out,
    within_budget,
)


def random_sums(groups, columns, seed, most=20):
    return torch.randint(0, most, (groups, columns), generator=torch.Generator().manual_seed(seed)).double()


def test_largest_takes_ties_by_index():
    chosen = largest(torch.tensor([[2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]]), torch.tensor([3, 0]))
    assert chosen.tolist() == [[True, True, True, False], [False] * 4]


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 999),
    st.integers(1, 60),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_no_choice_of_the_area_a_budget_covers_holds_more(groups, columns, seed, area, sizes):
    sums, rows = random_sums(groups, columns, seed), torch.tensor(sizes[:groups])
    found = within_budget(sums, rows, area, narrowest=1, multiple=1)
    covered = int((found.chosen * rows[:, None]).sum())
    assert covered <= max(area, int(rows.max()))  # one column at least
    assert found.worth == float(sums[found.chosen].sum())
    for bits in product((False, True), repeat=groups * columns):
        other = torch.tensor(bits).reshape(groups, columns)
        if int((other * rows[:, None]).sum()) <= covered:
            assert float(sums[other].sum()) <= found.worth


def test_a_budget_spends_what_it_has():
    sums, rows = random_sums(4, 50, 1) + 1, torch.full((4,), 8)
    for area in (8, 100, 800, 1599, 1600, 5000):
        chosen = within_budget(sums, rows, area, narrowest=1, multiple=1).chosen
        assert int(chosen.sum()) == min(area // 8, 200)


def test_columns_that_hold_nothing_are_not_bought():
    sums = torch.tensor([[5.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    chosen = within_budget(sums, torch.tensor([4, 4]), 1000, narrowest=1, multiple=1).chosen
    assert chosen.tolist() == [[True, False, True], [False] * 3]


def test_a_budget_is_spent_in_multiples_and_on_no_thin_group():
    sums, rows = random_sums(3, 20, 5) + 1, torch.tensor([16, 16, 32])
    widths = within_budget(sums, rows, 700, narrowest=1, multiple=6).chosen.sum(dim=1)
    assert set(widths.tolist()) <= {0, 6, 12, 18, 20}
    sums[2] = 0.1
    sums[1, 3:] = 0.1
    thin = within_budget(sums, rows, 16 * 22, narrowest=1, multiple=1).chosen.sum(dim=1).tolist()
    assert thin[1] in (2, 3)
    widths = within_budget(sums, rows, 16 * 22, narrowest=4, multiple=1).chosen.sum(dim=1).tolist()
    assert widths == [20, 0, 0]


def test_a_budget_too_small_for_a_block_still_makes_the_smallest():
    sums = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0, 0.0]])
    for area in (1, 8):
        chosen = within_budget(sums, torch.tensor([8, 8]), area, narrowest=3, multiple=1).chosen
        assert chosen.tolist() == [[False] * 4, [True, True, True, False]]


def test_dense_columns_are_those_with_enough_nonzeros():
    sums = torch.tensor([[8.0, 5.0, 6.0, 0.0], [3.0, 2.0, 2.0, 2.0]])
    needed = torch.tensor([6.0, 3.0])
    found = dense_columns(sums, needed, narrowest=1, multiple=1)
    assert found.chosen.tolist() == [[True, False, True, False], [True, False, False, False]]
    assert found.worth == 2.0  # how much they have beyond what they need
    assert dense_columns(sums, needed, narrowest=2, multiple=1).chosen.sum(dim=1).tolist() == [2, 0]
    assert dense_columns(sums, needed, narrowest=1, multiple=3).chosen.sum(dim=1).tolist() == [3, 3]
    assert dense_columns(sums, needed, narrowest=1, multiple=8).chosen.all()


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 999), st.integers(1, 19))
@settings(max_examples=40, deadline=None)
def test_equal_widths_go_on_while_the_next_columns_are_dense_on_average(groups, columns, seed, t2):
    sums = random_sums(groups, columns, seed)
    found = equally_dense_columns(sums, torch.full((groups,), float(t2)), narrowest=1, multiple=1)
    width = int(found.chosen[0].sum())
    assert found.chosen.sum(dim=1).tolist() == [width] * groups
    ordered = sums.sort(dim=1, descending=True).values
    assert all(float(ordered[:, w].mean()) >= t2 for w in range(width))
    assert width == columns or float(ordered[:, width].mean()) < t2


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 999), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_the_derived_share_covers_nearest_to_the_area(groups, columns, seed, area):
    sums, sizes = random_sums(groups, columns, seed) + 1, torch.tensor([16, 32, 20])[:groups]
    share = dense_share(sums, sizes, area)
    shares = sums / sizes[:, None]
    reach = {float(s): abs(int(((shares >= s) * sizes[:, None]).sum()) - area) for s in shares.unique()}
    assert reach[share] == min(reach.values())


def published_width(mask, ratio):
    """The program's loop, with the sorted column index."""
    order = sorted(range(mask.shape[1]), key=lambda c: (-int(mask[:, c].sum()), c))
    left = mask.sum(dim=1).tolist()
    for width in range(1, mask.shape[1]):
        for row in range(len(mask)):
            left[row] -= int(mask[row, order[width - 1]])
        if all(width > ratio * rest for rest in left):
            return width
    return None


@given(
    st.integers(1, 12), st.integers(1, 30), st.floats(0.05, 1), st.integers(0, 999), st.sampled_from([0.5, 1.5, 4.0])
)
@settings(max_examples=60, deadline=None)
def test_the_ratio_rule_is_the_published_loop(rows, columns, density, seed, ratio):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    assert ratio_width(mask.double(), ratio, 1) == published_width(mask, ratio)


def test_the_ratio_rule_compares_positions():
    counts = torch.tensor([[4.0, 4.0, 4.0]])  # of 4 taps each: not 4 > 1.5 · 8, but 8 > 1.5 · 4
    assert ratio_width(counts, 1.5, 4) == 2
    assert ratio_width(counts, 1.5, 1) is None


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_sharing_out_gives_every_column_once_and_never_gets_worse(groups, width, seed):
    sums, widths = random_sums(groups, groups * width, seed), [width] * groups
    first = shared_out(sums, widths, None)
    assert first.chosen.sum(dim=0).tolist() == [1] * (groups * width)
    assert first.chosen.sum(dim=1).tolist() == widths
    assert first.worth == float(sums[first.chosen].sum())
    assert shared_out(sums, widths, first.chosen).worth >= first.worth
    assert first.worth >= float(sums.mean()) * groups * width - 1e-9


@pytest.mark.parametrize("groups", [2, 3])
def test_sharing_out_finds_the_owners(groups):
    owner = torch.arange(groups * 6) % groups
    sums = (owner == torch.arange(groups)[:, None]) * 5.0 + 1
    assert torch.equal(shared_out(sums, [6] * groups, None).chosen, owner == torch.arange(groups)[:, None])
