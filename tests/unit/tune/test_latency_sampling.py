"""Few points find a staircase of known steps; a stopped table goes on without timing anything twice."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_samples import CONV, Synthetic, staircase, store

from deploy_sparse.errors import ConfigError
from deploy_sparse.tune.latency.measure import sample
from deploy_sparse.tune.latency.sampling import Sampler
from deploy_sparse.tune.latency.shapes import LayerShape

WIDE = LayerShape("conv", 2048, 512, height=7, width=7)


def complete(sampler, ms):
    points = {}
    while wanted := sampler.wanted(points):
        assert not set(wanted) & set(points)
        points |= {point: ms(sampler.layer.with_counts(*point)) for point in wanted}
    return sampler.surface(points)


@pytest.mark.parametrize("layer", [CONV, WIDE], ids=str)
def test_a_known_staircase_is_found_with_few_points(layer):
    ms = staircase(16)
    surface = complete(Sampler(layer, 16), ms)
    assert len(surface.points) + len(surface.checks) <= 24  # of 512 and 4096
    lot = random.Random(0)
    for _ in range(500):
        counts = lot.randint(1, layer.c_in), lot.randint(1, layer.c_out)
        known = ms(layer.with_counts(*counts))
        assert surface.ms(*counts) == pytest.approx(known, rel=0.05, abs=0.002 * ms(layer))
    assert surface.error < 0.05
    assert surface.settled


def test_every_point_that_was_used_is_met_exactly():
    ms = staircase(16)
    surface = complete(Sampler(CONV, 16), lambda shape: ms(shape) * (1 + 0.3 * (shape.c_out % 64 > 0)))
    for point, time in surface.points.items():
        assert surface.ms(*point) == pytest.approx(time, rel=1e-12)


def test_more_points_are_taken_where_lines_miss():
    """Vector kernels that take four blocks of outputs at once: a step within steps."""
    ms = staircase(16)

    def uneven(shape):
        return ms(shape) * (1.0 if -(-shape.c_out // 16) % 4 == 0 else 1.25)

    even, jagged = (complete(Sampler(CONV, 16), function) for function in (ms, uneven))
    assert len(jagged.points) > 1.5 * len(even.points)
    for count in (48, 208, 256, 368, 448):  # halving alone would only meet whole multiples of 64
        assert jagged.ms(256, count) == pytest.approx(uneven(CONV.with_counts(256, count)), rel=0.05)


def test_what_does_not_matter_to_the_network_is_not_refined():
    ms = staircase(16)

    def bent(shape):
        return ms(shape) * (1 + (shape.c_out / 512) * (1 - shape.c_out / 512))

    fine, coarse = complete(Sampler(CONV, 16), bent), complete(Sampler(CONV, 16, floor_ms=100.0), bent)
    assert len(coarse.points) < len(fine.points)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([4, 8, 16, 32]), st.tuples(st.integers(1, 256), st.integers(1, 512)), st.integers(0, 64))
def test_more_channels_never_take_less_time(step, counts, more):
    surface = _surfaces(step)
    c_in, c_out = counts
    assert surface.ms(min(c_in + more, 256), c_out) >= surface.ms(c_in, c_out) * (1 - 1e-9)
    assert surface.ms(c_in, min(c_out + more, 512)) >= surface.ms(c_in, c_out) * (1 - 1e-9)


_KNOWN = {}


def _surfaces(step):
    if step not in _KNOWN:
        _KNOWN[step] = complete(Sampler(CONV, step), staircase(step))
    return _KNOWN[step]


def test_counts_within_a_step_cost_the_same():
    surface = _surfaces(16)
    assert len({surface.ms(c_in, c_out) for c_in in (113, 120, 127, 128) for c_out in (241, 256)}) == 1


def test_a_depthwise_layer_is_one_line():
    layer = LayerShape("depthwise", 512, 512, (3, 3), padding=(1, 1), groups=512, height=14, width=14)
    surface = complete(Sampler(layer, 16), staircase(16))
    assert all(c_in == c_out for c_in, c_out in surface.points)
    assert surface.error is None
    assert surface.ms(100, 100) == pytest.approx(staircase(16)(layer.with_counts(100, 100)), rel=0.03)


def test_a_grouped_layer_keeps_whole_channels_for_every_group():
    layer = LayerShape("conv", 96, 96, (3, 3), padding=(1, 1), groups=12, height=14, width=14)
    surface = complete(Sampler(layer, 16), staircase(1))
    assert all(c % 12 == 0 for point in (*surface.points, *surface.checks) for c in point)


@pytest.mark.parametrize("counts", [(0, 1), (257, 512), (256, 513), (True, 1)])
def test_nothing_is_invented_outside_the_range(counts):
    with pytest.raises(ConfigError, match=r"channels of the layer conv 3x3 256->512 @14x14.*\n.*1 to \d+, the range"):
        _surfaces(16).ms(*counts)


def test_narrow_layers_have_what_points_there_are():
    surface = complete(Sampler(LayerShape("linear", 3, 2), 16), staircase(1))
    assert set(surface.points) == {(3, 2)}
    assert surface.ms(1, 1) == surface.points[3, 2]


LAYERS = {
    "one": CONV,
    "two": CONV,
    "three": WIDE,
    "depthwise": LayerShape("depthwise", 128, 128, (3, 3), groups=128, height=7, width=7),
    "head": LayerShape("linear", 512, 10),
}


def test_equal_layers_are_timed_once_and_the_multiple_is_the_staircases():
    bench = Synthetic(staircase(16))
    found = sample(LAYERS, bench, store(), seconds=60)
    assert found.multiple == 16
    assert set(found.surfaces) == set(LAYERS.values())
    own = [shape for shape in bench.asked if shape.height == 14 and shape.c_in % 16 == shape.c_out % 16 == 0]
    assert len(bench.asked) < 250
    assert len(own) <= 24 + 4 * 4  # the surface, and what the passes of the staircase have in whole steps


class Stopped(Exception):
    pass


def test_a_stopped_table_goes_on_where_it_was(tmp_path):
    whole = Synthetic(staircase(16))
    expected = sample(LAYERS, whole, store(), seconds=60)
    asked, times = [], itertools.count()

    def poll():
        if next(times) == 9:
            raise Stopped

    for _ in range(1000):
        times = itertools.count()
        bench = Synthetic(staircase(16), at_once=3, poll=poll)
        try:
            found = sample(LAYERS, bench, store(tmp_path), seconds=60)
            asked += bench.asked
            break
        except Stopped:
            asked += bench.asked
    assert found == expected
    assert sorted(map(str, asked)) == sorted(map(str, whole.asked))  # nothing twice
    again = Synthetic(staircase(16))
    assert sample(LAYERS, again, store(tmp_path), seconds=60) == expected
    assert not again.asked


def test_times_of_another_setting_or_damaged_files_are_not_taken(tmp_path):
    sample(LAYERS, Synthetic(staircase(16)), store(tmp_path), seconds=60)
    other = Synthetic(staircase(16))
    sample(LAYERS, other, store(tmp_path, batch=2), seconds=60)
    assert other.asked
    for file in tmp_path.iterdir():
        file.write_text("{")
    again = Synthetic(staircase(16))
    sample(LAYERS, again, store(tmp_path), seconds=60)
    assert len(again.asked) == len(other.asked)


def test_without_time_the_ends_of_every_range_are_measured_and_no_more():
    seconds = itertools.count(0, 100)
    bench = Synthetic(staircase(16))
    said = []
    found = sample(LAYERS, bench, store(), seconds=50, say=said.append, clock=lambda: next(seconds))
    assert not any(surface.settled for shape, surface in found.surfaces.items() if shape in (CONV, WIDE))
    for shape, surface in found.surfaces.items():
        assert surface.ms(shape.c_in, shape.c_out) == surface.points[shape.c_in, shape.c_out]
    assert any("time is up with" in line for line in said)
