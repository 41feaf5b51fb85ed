"""The packing of a mask: its form, its orders, its JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from packed_samples import mask_of, packing, packings
from pydantic import TypeAdapter

from deploy_sparse.errors import SurgeryError
from deploy_sparse.structure import Block
from deploy_sparse.surgery.packed import Packing, packing_of
from deploy_sparse.surgery.packing import Style, other_style

ADAPTER = TypeAdapter(Packing)
EVEN, ODD = tuple(range(0, 32, 2)), tuple(range(1, 32, 2))


def mask(out, channels, *blocks, kernel=(3, 3)):
    """Of ``(rows, input channels)`` pairs."""
    found = torch.zeros(out, channels, *kernel, dtype=torch.bool)
    for rows, reads in blocks:
        found[torch.tensor(rows).unsqueeze(1), torch.tensor(reads)] = True
    return found


@pytest.mark.parametrize(
    ("blocks", "tile", "form", "sizes"),
    [
        ([(EVEN, range(16)), (ODD, range(16, 32))], 16, "disjoint", [(16, 16)] * 2),
        ([(EVEN, range(16)), (ODD, range(8, 24))], 16, "equal", [(16, 16)] * 2),
        ([(EVEN, range(20)), (ODD, range(8, 26))], 16, "equal", [(16, 32)] * 2),
        ([(EVEN[:10], range(10)), (ODD[:10], range(16, 26))], 16, "equal", [(16, 16)] * 2),
        ([(EVEN[:10], range(10)), (ODD[:10], range(16, 26))], 1, "disjoint", [(10, 10)] * 2),
        ([(EVEN, range(10)), (ODD, range(8, 28))], 16, "free", [(16, 16), (16, 32)]),
        ([(EVEN[:9], range(16)), ((*ODD, 30), range(16, 32))], 16, "free", [(9, 16), (17, 16)]),
        ([(range(32), range(20))], 16, "equal", [(32, 32)]),
    ],
)
def test_fastest_form_of_a_mask(blocks, tile, form, sizes):
    found = packing_of(mask(32, 32, *blocks), tile=tile)
    assert found.form == form
    assert list(found.sizes) == sizes
    assert torch.equal(mask_of(found), mask(32, 32, *blocks))


def test_single_positions_and_linear_masks():
    cells = mask(32, 32, (EVEN, range(16)), (ODD, range(16, 32)))
    cells[EVEN, 3, 1, 1] = False
    assert packing_of(cells).form == "positions"
    assert packing_of(cells[:, :, 0, 0]).form == "disjoint"
    assert packing_of(cells[:, :, 0, 0]).kernel == ()
    assert packing_of(cells[:, :, :1, :1]).kernel == (1, 1)


def test_asked_form():
    cells = mask(32, 32, (EVEN, range(10)), (ODD, range(16, 26)))
    for form in ("disjoint", "equal", "free", "positions"):
        assert packing_of(cells, form=form).form == form
    assert packing_of(cells, form="disjoint").sizes == ((16, 10),) * 2


@pytest.mark.parametrize(
    ("blocks", "style"),
    [
        ([(EVEN, range(16)), (ODD, range(16, 32))], Style("free", 16)),
        ([(EVEN, range(16)), (ODD, range(8, 24))], Style("free", 16)),
        ([(range(32), range(20))], None),  # one block is one convolution in any form
        ([(EVEN[:9], range(16)), ((*ODD, 30), range(16))], None),  # 32 rows each for 9 and 17
        ([(EVEN[:15], range(16)), ((*ODD, 30), range(16))], None),  # twice 32 for 15 and 17
        (
            [(range(48), range(20)), (range(48, 96), range(10, 52))],
            Style("equal", 48),
        ),  # 48 columns twice for 32 and 48
        ([(range(40), range(20)), (range(40, 96), range(10, 40))], None),  # 64 columns twice for 32 and 32
    ],
)
def test_the_other_style_of_a_mask(blocks, style):
    wide = max(max(rows) for rows, _ in blocks) >= 32
    cells = mask(96, 64, *blocks) if wide else mask(32, 32, *blocks)
    found = packing_of(cells)
    other = other_style(found)
    assert other == style
    if other is not None:
        again = packing_of(cells, tile=other.tile, form=other.form)
        assert torch.equal(mask_of(again), cells)
        if other.form == "equal":
            padded, least = (sum(rows * columns for rows, columns in p.sizes) for p in (again, found))
            assert least < padded <= 1.25 * least


def test_positions_have_no_other_style():
    cells = mask(32, 32, (EVEN, range(16)), (ODD, range(16, 32)))
    cells[EVEN, 3, 1, 1] = False
    assert other_style(packing_of(cells)) is None


def test_orders():
    found = packing(6, 5, (1, 1), "free", [((1, 4), (0, 3)), ((0, 2, 5), (3, 4))], tile=3)
    assert found.columns == (0, 3, 3, 3, 4, 4)  # padding reads the last channel again
    assert found.rows == (1, 4, 0, 2, 5, -1)  # row 3 is in no block
    assert found.places == (2, 0, 3, 5, 1, 4)
    equal = dataclasses.replace(found, form="equal", tile=4)
    assert equal.rows == (1, 4, -1, -1, 0, 2, 5, -1)
    assert [equal.rows[place] for place in equal.places] == [0, 1, 2, -1, 4, 5]
    positions = Packing(2, 3, (1, 2), "positions", (Block((0, 1), (1, 4)),))
    assert positions.columns == (1, 4)


def test_orders_that_are_plain_already_need_no_look_up():
    plain = packing(4, 4, (3, 3), "disjoint", [((0, 1), (0, 1)), ((2, 3), (2, 3))])
    assert (plain.gathers, plain.restores) == (False, False)
    swapped = packing(4, 4, (3, 3), "disjoint", [((0, 1), (2, 3)), ((2, 3), (0, 1))])
    assert (swapped.gathers, swapped.restores) == (True, False)
    assert not dataclasses.replace(swapped, gather=False).gathers


@settings(max_examples=30, deadline=None)
@given(packings())
def test_json_round_trip(found):
    text = ADAPTER.dump_json(found)
    assert ADAPTER.validate_json(text) == found
    assert ADAPTER.validate_python(json.loads(text)) == found
    assert ADAPTER.validate_python(ADAPTER.dump_python(found)) == found


def test_json_writes_ranges():
    found = packing(8, 4, (3, 3), "disjoint", [(range(8), (0, 1))])
    body = json.loads(ADAPTER.dump_json(found))
    assert body["blocks"] == [{"rows": "0-7", "columns": "0-17"}]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (torch.ones(4, 4), r"a mask of dtype torch.float32 and shape \[4, 4\]"),
        (torch.ones(4, 4, 3, dtype=torch.bool), r"shape \[4, 4, 3\]\n  expected: a bool mask of a Linear or Conv2d"),
        (torch.eye(16, dtype=torch.bool), r"without blocks \(6.2% survives\)\n  expected: .* at least 8 rows"),
        (torch.zeros(16, 4, dtype=torch.bool), r"without blocks \(0.0% survives\)"),
    ],
)
def test_masks_without_packing(cells, message):
    with pytest.raises(SurgeryError, match=message):
        packing_of(cells)


@pytest.mark.parametrize(
    ("blocks", "form", "message"),
    [
        ([(EVEN, range(16)), (ODD, range(8, 24))], "disjoint", "input channels 8-15 are read by several blocks"),
        ([(EVEN[:9], range(16)), (ODD, range(16, 32))], "disjoint", "blocks of 9×16, 16×16 rows × input channels\n"),
        ([(EVEN, range(10)), (ODD, range(24))], "equal", "16×16, 16×32 .* once padded to multiples of 16\n"),
        ([(EVEN, range(10))], "diagonal", "the form 'diagonal'\n  expected: one of 'disjoint', 'equal'"),
        ([(EVEN, range(10))], "dijoint", "did you mean 'disjoint'"),
    ],
)
def test_form_that_a_mask_has_not(blocks, form, message):
    with pytest.raises(SurgeryError, match=message):
        packing_of(mask(32, 32, *blocks), form=form)


def test_single_positions_are_no_channels():
    cells = mask(32, 32, (range(32), range(16)))
    cells[:, 3, 1, 1] = False
    with pytest.raises(SurgeryError, match=r"block 0 has single positions of a 3×3 kernel(.|\n)*form 'positions'"):
        packing_of(cells, form="free")
    with pytest.raises(SurgeryError, match="the form 'positions' for a Linear"):
        packing_of(torch.ones(8, 8, dtype=torch.bool), form="positions")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "a packing without blocks"),
        ((Block((), (0,)),), "block 0 has the rows none"),
        ((Block((0,), ()),), "the columns none"),
        ((Block((1, 0), (0,)),), "block 0 has the rows 1,0"),
        ((Block((0, 4), (0,)),), "ascending rows below 4"),
        ((Block((0,), (0, 3)),), "ascending columns below 3"),
        ((Block((0,), (-1, 2)),), "ascending columns below 3"),
        ((Block((0, 1), (0,)), Block((1, 2), (1,))), "block 1 .* rows of an earlier block"),
    ],
)
def test_impossible_blocks(blocks, message):
    with pytest.raises(SurgeryError, match=message):
        Packing(4, 3, (), "free", blocks)


@pytest.mark.parametrize(("field", "value"), [("out_channels", 0), ("kernel", (3,)), ("kernel", (0, 3)), ("tile", 0)])
def test_impossible_sizes(field, value):
    with pytest.raises(SurgeryError, match="expected: positive sizes"):
        dataclasses.replace(packing(4, 4, (1, 1), "free", [((0, 1), (0, 1))]), **{field: value})


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([((0, 1), (0, 1))], {"form": "disjoint", "gather": False}, "whose blocks read 2 of 4 input channels"),
        (
            [((0, 1), range(4)), ((2, 3), range(4))],
            {"form": "equal", "gather": False},
            "gather=False in the form 'equal'",
        ),
        ([((0, 1), (0, 1))], {"form": "disjoint", "restore": False}, "computes 2 rows of its 4 not at all"),
        ([((0, 1, 2), (0,)), ((3,), (1,))], {"form": "equal", "tile": 3, "restore": False}, "and 2 as padding"),
    ],
)
def test_orders_that_cannot_be_left_to_the_neighbours(blocks, options, message):
    with pytest.raises(SurgeryError, match=message):
        packing(4, 4, (3, 3), blocks=blocks, **options)
