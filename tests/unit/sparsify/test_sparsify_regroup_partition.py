"""The row partition: sizes as asked, planted groups found, equal results whatever the number of threads."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.sparsify.regrouping.columns import widest_columns
from deploy_sparse.sparsify.regrouping.partition import exchange_, group_sums, partition, whole_numbers


def choose(width):
    return lambda sums, _: widest_columns(sums, width)


def planted(sizes, width, seed=0, noise=0.1):
    """Rows of one group are non-zero in ``width`` columns of their own, and a few others."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owner = owner[torch.randperm(len(owner), generator=generator)]
    columns = torch.arange(width * len(sizes)) // width
    values = (owner[:, None] == columns) | (torch.rand(len(owner), len(columns), generator=generator) < noise)
    return values.double(), owner


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_group_gets_its_size(sizes, columns, seed, turns):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 3, (sum(sizes), columns), generator=generator).double()
    labels = partition(values, sizes, choose(max(1, columns // 2)) if turns else None)
    assert torch.bincount(labels, minlength=len(sizes)).tolist() == sizes
    assert torch.equal(labels, partition(values.clone(), list(sizes), choose(max(1, columns // 2)) if turns else None))


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("sizes", [[32, 32, 32], [48, 48], [16] * 8])
def test_planted_groups_are_found(sizes, turns):
    values, owner = planted(sizes, 12)
    labels = partition(values, sizes, choose(12) if turns else None)
    alike = labels[:, None] == labels
    assert torch.equal(alike, owner[:, None] == owner)


def test_columns_improve_on_similarity_and_both_on_chance():
    generator = torch.Generator().manual_seed(3)
    values = whole_numbers(torch.rand(128, 60, generator=generator) ** 4, 128 * 128 * 60, factors=2)
    chance = torch.randperm(128, generator=generator) % 4
    held = [
        choose(15)(group_sums(values, labels, 4), None).worth
        for labels in (chance, partition(values, [32] * 4), partition(values, [32] * 4, choose(15)))
    ]
    assert held[0] < held[1] < held[2]


def test_the_number_of_threads_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.randn(192, 700, generator=generator).abs()
    values = whole_numbers(magnitudes, magnitudes.numel() * 192, factors=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(partition(values, [64, 64, 64], choose(100)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_an_exchange_ends_where_no_swap_of_two_rows_helps(groups, size, seed):
    affinity = torch.randint(0, 9, (groups * size, groups), generator=torch.Generator().manual_seed(seed)).double()
    labels = torch.arange(groups * size) % groups
    before = affinity.gather(1, labels[:, None]).sum()
    better = exchange_(labels, affinity)
    while exchange_(labels, affinity):
        pass
    after = affinity.gather(1, labels[:, None]).sum()
    assert torch.bincount(labels, minlength=groups).tolist() == [size] * groups
    assert bool(after > before) == better
    for a, b in combinations(range(groups * size), 2):
        swapped = affinity[a, labels[b]] + affinity[b, labels[a]]
        assert swapped <= affinity[a, labels[a]] + affinity[b, labels[b]]


@given(st.integers(1, 10_000), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_whole_numbers_add_up_exactly(terms, factors, seed):
    values = whole_numbers(torch.rand(50, generator=torch.Generator().manual_seed(seed)), terms, factors)
    assert torch.equal(values, values.round())
    assert int(values.max()) ** factors * terms <= 2**53
    assert int(values.max()) ** factors * terms > 2**53 / 2 ** (factors + 1)


def test_whole_numbers_of_nothing():
    assert torch.equal(whole_numbers(torch.zeros(4, 4), 16), torch.zeros(4, 4, dtype=torch.float64))
