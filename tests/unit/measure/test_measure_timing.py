from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.timing import percentile, summarise, time_call

samples = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=200)


@given(samples)
def test_statistics_agree_with_numpy(values):
    stats = summarise(values)
    assert stats.count == len(values)
    assert (stats.min, stats.max) == (min(values), max(values))
    assert stats.mean == pytest.approx(np.mean(values))
    assert stats.std == pytest.approx(np.std(values), abs=1e-12)
    assert stats.cv == pytest.approx(np.std(values) / np.mean(values), abs=1e-12)
    assert stats.min <= stats.p50 <= stats.p90 <= stats.p95 <= stats.p99 <= stats.max


@given(samples, st.integers(1, 99))
def test_percentile_is_the_smallest_sample_that_covers_the_share(values, percent):
    found = percentile(sorted(values), percent)
    share = Fraction(percent, 100)
    assert Fraction(sum(v <= found for v in values), len(values)) >= share
    assert Fraction(sum(v < found for v in values), len(values)) < share


def test_percentiles_of_known_samples():
    assert summarise(range(1, 101)).p90 == 90
    assert summarise(range(1, 101)).p95 == 95
    assert summarise(range(1, 21)).p95 == 19
    assert summarise(range(1, 11)).p90 == 9  # 1 - 0.9 in binary would give 10
    assert summarise(range(1, 11)).p99 == 10
    assert summarise([3.0]).p50 == summarise([3.0]).p95 == summarise([3.0]).p99 == 3.0
    ordered = list(range(1000))
    for percent in (50, 90, 95, 99):
        assert percentile(ordered, percent) == np.percentile(ordered, percent, method="inverted_cdf")


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match=r"no samples to summarise"):
        summarise([])


def test_one_call_is_timed_on_both_clocks(machine):
    timing = time_call(machine.work("a", 2.5, busy=0.4), machine.clock)
    assert timing.wall_ms == 2.5
    assert timing.cpu_ms == 1.0
    assert machine.log == ["a"]
