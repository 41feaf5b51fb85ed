"""Blocks are recognised in a mask, and nothing else is taken for them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.structure import (
    MIN_BLOCK_ROWS,
    Block,
    Blocks,
    Channels,
    Dense,
    Slice,
    Unstructured,
    row_blocks,
    structure_of,
)


def filled(rows, columns, blocks):
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for chosen, places in blocks:
        mask[torch.tensor(chosen)[:, None], torch.tensor(places)] = True
    return mask


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_union_of_blocks_is_taken_apart_again(data):
    sizes = data.draw(st.lists(st.integers(MIN_BLOCK_ROWS, 12), min_size=1, max_size=4))
    empty, width = data.draw(st.integers(0, 3)), data.draw(st.integers(4, 18))
    order = data.draw(st.permutations(range(sum(sizes) + empty)))
    subsets = st.lists(st.integers(0, width - 1), min_size=1, max_size=width - 1, unique=True).map(sorted)
    columns = data.draw(st.lists(subsets, min_size=len(sizes), max_size=len(sizes), unique_by=tuple))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [(sorted(order[s : s + n]), c) for s, n, c in zip(starts, sizes, columns, strict=True)]
    mask = filled(len(order), width, blocks)
    expected = sorted((Block(tuple(r), tuple(c)) for r, c in blocks), key=lambda block: block.rows)
    assert row_blocks(mask) == tuple(expected)
    if len(blocks) > 1:
        assert structure_of(mask.reshape(len(order), width, 1, 1)) == Blocks(tuple(expected))


def test_columns_are_positions_of_the_flattened_row():
    mask = torch.zeros(16, 3, 2, 2, dtype=torch.bool)
    mask[:8, 1, 0] = mask[8:, :, 1, 1] = True
    rows = tuple(range(8)), tuple(range(8, 16))
    assert structure_of(mask) == Blocks((Block(rows[0], (4, 5)), Block(rows[1], (3, 7, 11))))


def test_too_few_equal_rows_are_no_block():
    mask = filled(16, 4, [(range(9), [0, 1]), (range(9, 16), [2])])
    assert structure_of(mask) == Unstructured(float(mask.float().mean()))
    assert isinstance(structure_of(filled(16, 4, [(range(8), [0, 1]), (range(8, 16), [2])])), Blocks)


def test_a_narrow_layer_may_be_one_block():
    mask = filled(6, 4, [(range(1, 4), [0, 2])]).reshape(6, 2, 2)
    assert structure_of(mask) == Blocks((Block((1, 2, 3), (0, 2)),))


def test_whole_channels_and_dense_layers_come_first():
    assert structure_of(torch.ones(16, 4, dtype=torch.bool)) == Dense()
    channels = filled(16, 4, [(range(8), [0, 1, 2, 3])])
    assert structure_of(channels) == Channels(tuple(range(8)))


def test_nothing_left_is_unstructured():
    assert structure_of(torch.zeros(16, 4, dtype=torch.bool)) == Unstructured(0.0)
    assert row_blocks(torch.zeros(16, 4, dtype=torch.bool)) is None


def test_a_slice_knows_where_its_channels_lie():
    flattened = Slice("fc.weight", 1, (0, 0, 1, 1, -1, 2, 2))
    assert flattened.positions(torch.tensor([True, False, True])).tolist() == [0, 1, 5, 6]
    assert flattened.positions(torch.zeros(3, dtype=torch.bool)).tolist() == []
