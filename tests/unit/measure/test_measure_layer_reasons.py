"""Reasons for layers that fall short of their MACs: each from its own numbers, none where there is nothing to explain."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.measure.layer_reasons import MINOR, Machine, explained, machine_of, reasons
from deploy_sparse.measure.layers import LayerPair, NetworkLayers, Piece, Work, match_layers

MACHINE = Machine(
    macs_per_ms=50e6,
    best="conv1",
    floor_ms=0.003,
    tick_ms=0.001,
    move_ms=lambda size: size / 20e6,
    moved_by="a ReLU",
    multiple=4,
    tells=True,
)


def work(read: int, written: int, macs: int, moved: int = 1000) -> Work:
    return Work((f"{read}→{written} 3×3",), ((read, written),), macs, moved)


def pair(dense, sparse, before: Work, after: Work) -> LayerPair:
    """One layer; sides are pieces, or the ms of a convolution in the blocked layout."""
    sides = []
    for side, done in ((dense, before), (sparse, after)):
        if isinstance(side, float):
            side = [piece(side, done.macs)]
        sides.append(NetworkLayers("x", tuple(side), {"layer": done}))
    (found,) = match_layers(*sides)
    return found


def piece(ms: float, macs: int | None = None, layout: str | None = "NCHWc", part="product", kind="Conv") -> Piece:
    return Piece(("layer",), part, kind, ms, layout, macs)


def kinds(found) -> list[str]:
    return [reason.kind for reason in found]


DENSE, HALF = work(64, 64, 40_000_000), work(32, 32, 10_000_000)


@pytest.mark.parametrize("sparse_ms", [0.20, 0.25, 0.262])
def test_a_layer_that_gains_what_its_macs_predict_needs_no_reason(sparse_ms: float) -> None:
    assert reasons(pair(1.0, sparse_ms, DENSE, HALF), MACHINE) == ()


def test_an_unchanged_layer_is_called_that() -> None:
    (reason,) = reasons(pair(1.0, 1.0, DENSE, DENSE), MACHINE)
    assert (reason.kind, reason.text) == ("unchanged", "unchanged: 64→64 3×3 in both")
    slower = reasons(pair(1.0, 1.5, DENSE, DENSE), MACHINE)
    assert kinds(slower) == ["unchanged", "not explained"]


def test_one_sided_layers_say_on_which_side() -> None:
    whole = pair(1.0, 1.0, DENSE, DENSE)
    assert reasons(replace(whole, sparse=None), MACHINE)[0].text == "only in the dense network"
    assert reasons(replace(whole, dense=None), MACHINE)[0].text == "only in the sparse network"
    assert reasons(replace(whole, dense=None), MACHINE)[0].ms == 0.0, "it may be a layer of another name"
    look_up = pair([piece(0.1, part="other")], [piece(0.1, part="other")], Work(bytes=10), Work(bytes=10))
    assert reasons(replace(look_up, dense=None), MACHINE)[0].ms == pytest.approx(0.1), "dense does without it"


def test_what_the_profiler_cannot_count_is_not_passed_over() -> None:
    (reason,) = reasons(pair(0.012, 0.0045, DENSE, HALF), MACHINE)
    assert (reason.kind, reason.ms) == ("too short", 0.0)
    assert reason.text == "too short to tell: 0.00150 ms too long, and the profiler counts in 0.00100"


def test_a_layer_that_left_the_blocked_layout_names_the_counts_and_the_rates() -> None:
    odd = work(29, 30, 8_700_000)
    (reason,) = reasons(pair(1.0, [piece(0.4, 8_700_000, "plain")], DENSE, odd), MACHINE)
    assert reason.kind == "width"
    assert reason.text == (
        "29 channels read are no multiple of 4, so not in the NCHWc layout: 21.8 GMAC/s, and 40.0 GMAC/s in dense"
    )
    assert reason.ms == pytest.approx(0.4 - 8.7 / 40 - 0.003 * (1 - 8.7 / 40))  # but for what a call costs anyhow
    aligned = reasons(pair(1.0, [piece(0.4, 10_000_000, "plain")], DENSE, HALF), MACHINE)
    assert aligned[0].text == "not in the NCHWc layout: 25.0 GMAC/s, and 40.0 GMAC/s in dense"


def test_few_channels_that_fill_no_block_are_named() -> None:
    few = work(8, 64, 5_000_000)
    (reason,) = reasons(pair(1.0, [piece(0.3, 5_000_000, "NCHWc, plain input")], DENSE, few), MACHINE)
    assert reason.kind == "width"
    assert reason.text.startswith("8 channels read do not fill a block of the NCHWc layout: 16.7 GMAC/s")


def test_channels_that_are_filled_up_cost_what_they_are_filled_up_to() -> None:
    (reason,) = reasons(pair(1.0, [piece(0.3, 12_000_000)], DENSE, HALF), MACHINE)
    assert reason.kind == "width"
    assert reason.text == "channels filled up to the runtime's next step (32→32 3×3): 12M MACs for 10M"
    assert reason.ms == pytest.approx(0.05)


def test_both_sides_filled_up_alike_is_no_reason() -> None:
    found = reasons(pair([piece(1.0, 48_000_000)], [piece(0.3, 12_000_000)], DENSE, HALF), MACHINE)
    assert kinds(found) == ["not explained"]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("look-up", "look-ups of channels: 0.100 ms, 29 % of it"),
        ("conversion", "conversions of the memory layout: 0.100 ms, 29 % of it"),
        ("behind", "additions, activations and rescaling that are not fused: 0.100 ms, 29 % of it"),
    ],
)
def test_what_stands_around_the_product_is_told_with_its_share(part: str, text: str) -> None:
    sparse = [piece(0.25, 10_000_000), piece(0.1, part=part, layout=None, kind="Other")]
    (reason,) = reasons(pair(1.0, sparse, DENSE, HALF), MACHINE)
    assert (reason.kind, reason.text, reason.ms) == (part, text, pytest.approx(0.1))


def test_what_dense_pays_too_is_laid_against_it() -> None:
    dense = [piece(1.0, 40_000_000), piece(0.1, part="conversion", layout=None)]
    sparse = [piece(0.25, 10_000_000), piece(0.1, part="conversion", layout=None)]
    (reason,) = reasons(pair(dense, sparse, DENSE, HALF), MACHINE)
    assert reason.text.endswith(", in dense 0.100 ms")
    assert reason.ms == pytest.approx(0.1 - 0.25 * 0.1)


def test_a_call_close_to_the_shortest_piece_is_overhead() -> None:
    before, after = work(16, 16, 400_000), work(4, 4, 25_000)
    (reason,) = reasons(pair(0.02, [piece(0.005, 25_000)], before, after), MACHINE)
    assert (reason.kind, reason.text) == (
        "overhead",
        "overhead: 0.00500 ms a call, where the shortest piece takes 0.00300",
    )


def test_many_calls_pay_for_each() -> None:
    sparse = [piece(0.05, 1_250_000) for _ in range(8)]
    found = reasons(pair(1.0, sparse, DENSE, HALF), MACHINE)
    overhead = next(reason for reason in found if reason.kind == "overhead")
    assert overhead.text == "overhead: 0.00300 ms of the 0.0500 of a call in 8 calls, as the shortest piece takes that"
    assert overhead.ms == pytest.approx(0.003 * (8 - 0.25))


def test_a_layer_whose_numbers_take_longer_to_move_than_to_compute_is_bound_by_memory() -> None:
    before, after = work(64, 64, 40_000_000, 20_000_000), work(32, 32, 10_000_000, 8_000_000)
    (reason,) = reasons(pair(1.0, [piece(0.4, 10_000_000)], before, after), MACHINE)
    assert reason.kind == "memory"
    assert reason.text == "memory: moving its 8MB takes 0.400 ms at the least, its MACs 0.200 at the best rate"
    assert reason.ms == pytest.approx(0.4 - 0.25 - 0.003 * 0.75)  # but for what a call costs anyhow
    small = replace(after, bytes=4_000_000)  # 0.2 ms, less than its MACs predict
    assert kinds(reasons(pair(1.0, [piece(0.4, 10_000_000)], before, small), MACHINE)) == ["not explained"]


def test_what_no_cause_bears_is_called_not_explained_with_the_rates() -> None:
    (reason,) = reasons(pair(1.0, 0.5, DENSE, HALF), MACHINE)
    assert reason.kind == "not explained"
    assert reason.text == "not explained: 0.250 ms; 20.0 GMAC/s, and 40.0 GMAC/s in dense"


def test_a_runtime_that_tells_no_layouts_is_judged_by_the_targets_multiple() -> None:
    machine = replace(MACHINE, tells=False, multiple=8)
    odd = work(29, 32, 9_000_000)
    (reason,) = reasons(pair([piece(1.0, layout=None)], [piece(0.5, layout=None)], DENSE, odd), machine)
    assert (reason.kind, reason.text) == (
        "width",
        "29 channels are no multiple of 8: 18.0 GMAC/s, and 40.0 GMAC/s in dense",
    )
    stem, cut = work(3, 64, 40_000_000), work(3, 32, 20_000_000)
    found = reasons(pair([piece(1.0, layout=None)], [piece(0.9, layout=None)], stem, cut), machine)
    assert kinds(found) == ["not explained"], "three channels in both are nobody's doing"
    gemm = reasons(pair([piece(1.0, layout=None)], [piece(0.5, layout=None)], DENSE, odd), MACHINE)
    assert kinds(gemm) == ["not explained"], "where others have a layout this one has no multiple to keep"


def test_layers_without_macs_are_overhead_or_say_what_they_move() -> None:
    before, after = Work(bytes=4000), Work(bytes=2000)
    other = {"part": "other", "kind": "Slice", "layout": None}
    found = reasons(pair([piece(0.01, **other)], [piece(0.005, **other)], before, after), MACHINE)
    assert found[0].text == "overhead: 0.00500 ms a call, where the shortest piece takes 0.00300"
    found = reasons(pair([piece(0.1, **other)], [piece(0.09, **other)], before, after), MACHINE)
    assert found[0].text == "no MACs; moves 2kB, 4kB in dense"


def test_the_machine_is_what_the_layers_reached() -> None:
    dense = NetworkLayers(
        "dense",
        (piece(1.0, 40_000_000), Piece(("pool",), "other", "Pool", 0.02)),
        {"layer": DENSE, "pool": Work(bytes=500_000)},
        tick_ms=0.001,
    )
    sparse = NetworkLayers("sparse", (piece(0.2, 10_000_000),), {"layer": HALF}, tick_ms=0.001)
    pairs = match_layers(dense, sparse)
    machine = machine_of((dense, sparse), pairs, 4)
    assert (machine.macs_per_ms, machine.best) == (50_000_000, "layer")
    assert (machine.floor_ms, machine.tick_ms, machine.tells) == (0.02, 0.001, True)
    assert machine.move_ms(25_000_000) == pytest.approx(1.0)
    assert machine.moved_by == "25.0 GB/s, the most of any layer (pool)"
    measured = machine_of((dense, sparse), pairs, 4, lambda size: 7.0, "a probe")
    assert (measured.move_ms(1), measured.moved_by) == (7.0, "a probe")
    assert measured.lines()[0] == "most MACs a second: 50.0 GMAC/s, by layer; memory: a probe"
    assert machine_of((), (), 4).move_ms(10) == 0.0


times = st.floats(0.001, 5.0)


@settings(max_examples=80, deadline=None)
@given(times, times, times, times, st.integers(1, 100), st.integers(1, 100), st.booleans())
def test_reasons_account_for_what_is_too_long_and_no_more(a, b, look, behind, left, filled, plain) -> None:
    after = work(max(1, left // 2), 32, 400_000 * left)
    sparse = [
        piece(b, after.macs * (100 + filled) // 100, "plain" if plain else "NCHWc"),
        piece(look, part="look-up", layout=None),
        piece(behind, part="behind", layout=None),
    ]
    found_pair = pair(a, sparse, DENSE, after)
    (explained_pair,) = explained([found_pair], MACHINE)
    found = explained_pair.reasons
    excess = b + look + behind - a * left / 100
    if not found:
        assert excess <= 0.05 * (b + look + behind) + 1e-9
        return
    if kinds(found) == ["unchanged"]:
        return
    if kinds(found) == ["too short"]:
        assert excess <= 0.002 + 1e-9
        return
    total = sum(reason.ms for reason in found)
    assert all(reason.text for reason in found)
    if "not explained" in kinds(found):
        assert total == pytest.approx(excess, rel=1e-6)
    else:
        assert total >= (1 - MINOR) * excess - 1e-9
