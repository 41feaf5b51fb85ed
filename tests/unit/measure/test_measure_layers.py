"""Layers added up from what a runtime timed: nothing lost, nothing twice, dense and sparse matched by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.measure.layers import (
    LayerPair,
    NetworkLayers,
    Piece,
    Reason,
    Work,
    layer_table,
    layers_of,
    match_layers,
    median_of,
)
from deploy_sparse.measure.table import markdown, plain


def network(*pieces: Piece, work=None, **changes) -> NetworkLayers:
    return NetworkLayers("a network", pieces, work or {}, **changes)


def conv(layer: str, ms: float, macs: int | None = None, layout: str | None = "NCHWc") -> Piece:
    return Piece((layer,), "product", "Conv", ms, layout, macs)


names = st.sampled_from(["conv1", "conv2", "fc", "Slice behind conv1", "shortcut"])
pieces = st.builds(
    Piece,
    layers=st.lists(names, min_size=1, max_size=3).map(tuple),
    part=st.sampled_from(["product", "behind", "look-up", "conversion", "other"]),
    kind=st.sampled_from(["Conv", "Add", "Gather"]),
    ms=st.integers(0, 1 << 20).map(lambda ticks: ticks / 1024),  # sums of these are exact
)
networks = st.lists(pieces, max_size=12).map(lambda found: network(*found))


@settings(max_examples=60, deadline=None)
@given(networks, networks)
def test_the_rows_of_both_sides_add_up_to_what_was_timed(dense: NetworkLayers, sparse: NetworkLayers) -> None:
    pairs = match_layers(dense, sparse)
    for side, whole in (("dense", dense), ("sparse", sparse)):
        rows = [row for pair in pairs if (row := getattr(pair, side)) is not None]
        assert sum(row.ms for row in rows) == whole.total_ms
        assert all(sum(row.parts.values()) == row.ms for row in rows)
        assert sum(sum(row.calls.values()) for row in rows) == len(whole.pieces)
        if whole.total_ms:
            assert sum(row.share for row in rows) == pytest.approx(1)
    assert all(pair.dense is not None or pair.sparse is not None for pair in pairs)
    told = {name for side in (dense, sparse) for piece in side.pieces for name in piece.layers}
    shown = [name for pair in pairs for name in (pair.dense or pair.sparse).layers]
    assert sorted(shown) == sorted(told), "every layer in one row"


@settings(max_examples=40, deadline=None)
@given(networks, networks, st.integers(1, 6))
def test_a_table_loses_no_time(dense: NetworkLayers, sparse: NetworkLayers, rows: int) -> None:
    pairs = match_layers(dense, sparse)
    table = layer_table(pairs, rows=rows)
    *shown, total = table.rows
    for column, whole in ((2, dense.total_ms), (4, sparse.total_ms)):
        assert float(total[column]) == pytest.approx(whole, rel=1e-2)
        cells = [float(row[column]) for row in shown if row[column] is not None]
        assert sum(cells) == pytest.approx(whole, rel=1e-2, abs=1e-9)
    assert len(shown) <= rows + 1


def test_parts_calls_and_work_are_added_up() -> None:
    (row,) = layers_of(
        network(
            Piece(("b",), "look-up", "Gather", 0.25),
            conv("b", 1.0, 100),
            conv("b", 0.5, 50, "plain"),
            Piece(("b",), "behind", "Relu", 0.25),
            work={"b": Work(("8→8",), ((8, 8),), 120, 64)},
        )
    )
    assert (row.name, row.kind, row.ms, row.share) == ("b", "Conv", 2.0, 1.0)
    assert row.parts == {"look-up": 0.25, "product": 1.5, "behind": 0.25}
    assert row.calls == {"look-up": 1, "product": 2, "behind": 1}
    assert row.layouts == {"NCHWc", "plain"}
    assert (row.done, row.work.macs, row.part("conversion")) == (150, 120, 0.0)


def test_macs_carried_out_are_told_of_all_products_or_not_at_all() -> None:
    (row,) = layers_of(network(conv("b", 1.0, 100), conv("b", 1.0, None)))
    assert row.done is None


def test_layers_that_one_runtime_fused_are_one_row_on_both_sides() -> None:
    dense = network(conv("a", 1.0), Piece(("b", "c"), "product", "Myelin", 2.0), conv("d", 3.0))
    sparse = network(Piece(("c", "e"), "product", "Myelin", 0.5), conv("a", 0.5), conv("b", 0.25))
    pairs = match_layers(dense, sparse)
    assert [pair.name for pair in pairs] == ["d", "b + c + e", "a"]
    assert [pair.dense.ms if pair.dense else None for pair in pairs] == [3.0, 2.0, 1.0]
    assert [pair.sparse.ms if pair.sparse else None for pair in pairs] == [None, 0.75, 0.5]


def test_pairs_are_in_the_order_of_the_dense_time_and_one_sided_ones_are_listed() -> None:
    work = {"long": Work(macs=400), "short": Work(macs=100)}
    dense = network(conv("short", 1.0), conv("gone", 0.5), conv("long", 3.0), work=work)
    sparse = network(conv("long", 1.0), conv("new", 9.0), conv("short", 1.0), work={"long": Work(macs=100)})
    pairs = match_layers(dense, sparse)
    assert [(pair.name, pair.ratio, pair.predicted) for pair in pairs] == [
        ("long", 3.0, 4.0),
        ("short", 1.0, None),
        ("gone", None, None),
        ("new", None, None),
    ]


def test_the_table_says_what_it_shows() -> None:
    work = {"conv1": Work(("3→16 3×3",), ((3, 16),), 800, 10), "conv2": Work(("16→16 3×3",), ((16, 16),), 200, 10)}
    cut = {"conv1": Work(("3→8 3×3",), ((3, 8),), 400, 10), "conv2": work["conv2"]}
    dense = network(conv("conv1", 3.0), conv("conv2", 0.75), Piece(("pad",), "other", "Slice", 0.25), work=work)
    sparse = network(conv("conv1", 1.0), conv("conv2", 0.75), Piece(("pad",), "other", "Slice", 0.25), work=cut)
    pairs = tuple(
        LayerPair(pair.name, pair.dense, pair.sparse, (Reason("x", "first"), Reason("y", "second")) if i == 0 else ())
        for i, pair in enumerate(match_layers(dense, sparse))
    )
    table = layer_table(pairs, rows=1, title="Layers", note="as timed")
    assert table.rows == (
        ("conv1", "3→16 3×3 ⇒ 3→8 3×3", "3.00", "75.0 %", "1.00", "3.00×", "2.00×", "first; second"),
        ("2 others", "", "1.00", "25.0 %", "1.00", "1.00×", "1.00×", ""),
        ("all layers", "", "4.00", "100.0 %", "2.00", "2.00×", "1.67×", ""),
    )
    assert plain(table).endswith("as timed\n")
    assert "| conv1 | 3→16 3×3 ⇒ 3→8 3×3 |" in markdown(table)
    assert [row[0] for row in layer_table(pairs, rows=2).rows] == ["conv1", "conv2", "pad", "all layers"]
    assert layer_table(pairs, rows=9).rows[1][1] == "16→16 3×3"


def test_of_several_rounds_the_median_of_every_piece_counts() -> None:
    rounds = [
        network(conv("a", 1.0), conv("a", 2.0), Piece(("a",), "conversion", "Reorder", 0.5), plain_ms=3.0, runs=10),
        network(Piece(("a",), "conversion", "Reorder", 0.5), conv("a", 9.0), conv("a", 2.5), plain_ms=9.0, runs=10),
        network(conv("a", 1.5), conv("a", 2.25), Piece(("a",), "conversion", "Reorder", 5.0), plain_ms=4.0, runs=10),
    ]
    found = median_of(rounds)
    assert [piece.ms for piece in found.pieces] == [1.5, 2.25, 0.5]
    assert (found.plain_ms, found.runs) == (4.0, 30)
    assert median_of(rounds[:1]).pieces == rounds[0].pieces
