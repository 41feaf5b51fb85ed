"""Distributions and schedules: totals, bounds and known values."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.distribution import apportion, counts, densities, erk, exact
from deploy_sparse.sparsify.schedule import SCHEDULES, cubic, exponential, geometric, one_shot

shape = st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]))
shapes = st.lists(shape, min_size=1, max_size=8).map(lambda found: {f"w{i}": s for i, s in enumerate(found)})
density = st.floats(0.01, 1.0)


@given(shapes, density)
@settings(max_examples=100, deadline=None)
def test_erk_comes_to_the_density_and_no_layer_exceeds_one(layers, wanted):
    found = erk(layers, wanted)
    sizes = {name: math.prod(own) for name, own in layers.items()}
    assert sum(found[n] * sizes[n] for n in layers) == pytest.approx(wanted * sum(sizes.values()), rel=1e-9)
    assert all(0 < share <= 1 + 1e-12 for share in found.values())
    # below the cap every layer has the same ε
    scale = {n: found[n] * math.prod(own) / sum(own) for n, own in layers.items()}
    free = [scale[n] for n in layers if found[n] < 1 - 1e-9]
    assert not free or max(free) == pytest.approx(min(free))
    assert all(scale[n] <= max(free) * (1 + 1e-9) for n in layers if free)  # and no layer is capped without need


def test_erk_by_hand():
    layers = {"small": (2, 2, 1, 1), "large": (8, 8, 1, 1)}  # Σ/Π: 6/4 and 18/64
    uncapped = erk(layers, 0.2)  # ε · (6 + 18) = 13.6
    assert uncapped == {"small": pytest.approx(13.6 / 24 * 6 / 4), "large": pytest.approx(13.6 / 24 * 18 / 64)}
    capped = erk(layers, 0.5)  # 34 weights: 4 in the small layer, 30 of 64 in the large one
    assert capped == {"small": 1.0, "large": pytest.approx(30 / 64)}


@given(shapes, density)
@settings(max_examples=60, deadline=None)
def test_counts_come_to_the_rounded_total(layers, wanted):
    total = sum(math.prod(own) for own in layers.values())
    assert counts(layers, wanted) == round(exact(wanted) * total)
    for kind in ("uniform", "erk"):
        shares = densities(layers, wanted, kind)
        found = counts(layers, shares)
        floor = sum(1 for n, own in layers.items() if exact(shares[n]) * math.prod(own) < 1)  # each keeps one
        assert abs(sum(found.values()) - wanted * total) <= 1 + floor
        for n, own in layers.items():
            assert 1 <= found[n] <= math.prod(own)
            assert abs(found[n] - shares[n] * math.prod(own)) <= 1


def test_uniform_and_layer_and_global():
    layers = {"a": (4, 2), "b": (8, 8)}
    assert densities(layers, 0.3, "uniform") == {"a": 0.3, "b": 0.3}
    assert densities(layers, 0.3, "global") == densities(layers, 0.3) == 0.3
    assert densities(layers, {"b": 0.5, "a": 0.25}, "layer") == {"a": 0.25, "b": 0.5}


def test_decimal_numbers_are_meant_as_written():
    assert exact(1 - 0.7) == Fraction(3, 10)
    assert exact(0.1) == Fraction(1, 10)
    assert exact(Fraction(1, 3)) == Fraction(1, 3)


@pytest.mark.parametrize(
    ("given_density", "kind", "message"),
    [
        (0.5, "ERK", r"unknown distribution 'ERK'"),
        (0.5, "uniforn", r"did you mean 'uniform'"),
        (0.0, "uniform", r"density 0.0[\s\S]*inside \(0, 1\]"),
        (1.5, "erk", r"density 1.5"),
        (float("nan"), "global", r"density nan"),
        (0.5, "layer", r"distribution 'layer' with 0.5[\s\S]*densities by layer"),
        ({"a": 0.5}, "uniform", r"'uniform' with densities by layer"),
        ({"a": 0.5, "b": 2.0}, "layer", r"density of layer 'b' 2.0"),
    ],
)
def test_what_cannot_be_distributed_is_refused(given_density, kind, message):
    with pytest.raises(ConfigError, match=message):
        densities({"a": (2, 2), "b": (2, 2)}, given_density, kind)


def test_densities_of_other_layers_are_refused():
    with pytest.raises(TicketError, match=r"'conv2'[\s\S]*did you mean 'conv1'"):
        densities({"conv1": (2, 2)}, {"conv1": 0.5, "conv2": 0.5}, "layer")
    with pytest.raises(TicketError, match=r"'conv1'[\s\S]*name every layer once"):
        densities({"conv1": (2, 2)}, {}, "layer")


@given(st.floats(0.01, 1.0), st.integers(1, 100), st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=60, deadline=None)
def test_every_schedule_falls_to_exactly_the_density(final, steps, name):
    found = SCHEDULES[name](final, steps)
    assert len(found) == steps
    assert found[-1] == final
    assert all(a >= b - 1e-12 for a, b in zip((1.0, *found), found, strict=False))


def test_schedules_by_hand():
    assert geometric(0.2, 0) == 1.0
    assert [round(100 * geometric(0.2, r), 2) for r in (1, 2, 3, 9)] == [80.0, 64.0, 51.2, 13.42]
    assert one_shot(0.3, 2) == (0.3, 0.3)
    assert exponential(0.25, 2) == (0.5, 0.25)
    # sparsity 0.8 · (1 - (1/2)^3) = 0.7 half-way
    assert cubic(0.2, 2) == (pytest.approx(0.3), 0.2)


def test_schedules_refuse_what_is_out_of_range():
    with pytest.raises(ConfigError, match="density 0"):
        exponential(0, 3)
    with pytest.raises(ConfigError, match="0 pruning steps"):
        cubic(0.5, 0)
    with pytest.raises(ConfigError, match=r"pruning rate 1.0[\s\S]*inside \(0, 1\)"):
        geometric(1.0, 3)
    with pytest.raises(ConfigError, match="-1 rounds"):
        geometric(0.2, -1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(1, 8))
def test_apportioned_numbers_come_to_the_total_and_fit(data, count):
    names = [str(number) for number in range(count)]
    room = {name: data.draw(st.integers(1, 50)) for name in names}
    parts = {name: data.draw(st.floats(1e-3, 100)) for name in names}
    total = data.draw(st.integers(count, sum(room.values()) + 20))
    found = apportion(parts, room, total)
    assert sum(found.values()) == min(total, sum(room.values()))
    assert all(1 <= found[name] <= room[name] for name in names)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), count=st.integers(1, 6), total=st.integers(600, 1000))
def test_apportioned_numbers_are_in_proportion_where_there_is_room(data, count, total):
    parts = {str(number): data.draw(st.floats(1.0, 5.0)) for number in range(count)}
    found = apportion(parts, dict.fromkeys(parts, 1000), total)
    assert all(abs(found[name] - total * part / sum(parts.values())) < 1 for name, part in parts.items())


def test_parts_that_fit_are_left_as_they_are():
    parts = {"a": 29, "b": 461, "c": 512}
    assert apportion(parts, {"a": 100, "b": 1000, "c": 1000}, 1002) == parts
    assert apportion(parts, {"a": 100, "b": 1000, "c": 300}, 1002) == {"a": 42, "b": 660, "c": 300}
