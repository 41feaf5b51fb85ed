import gc
import itertools

import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.interleave import interleave


def run(machine, subjects, **changes):
    options = {"warmup_ms": 3.0, "duration_s": 0.04, "min_iterations": 4, "block_ms": 10.0, "clock": machine.clock}
    return interleave(subjects, **{**options, **changes})


def test_blocks_alternate_and_the_order_turns_every_round(machine):
    run(machine, {"a": machine.work("a", 5), "b": machine.work("b", 5)}, warmup_ms=0)
    blocks = [(name, len(list(group))) for name, group in itertools.groupby(machine.log[2:])]
    assert machine.log[:2] == ["a", "b"]  # one untimed call each, even without warm-up time
    # a b | b a | a b | b a: equal neighbours belong to two rounds
    assert blocks == [("a", 2), ("b", 4), ("a", 4), ("b", 4), ("a", 2)]


def test_warm_up_lasts_its_time_and_is_not_in_the_samples(machine):
    samples = run(machine, {"a": machine.work("a", 1)}, warmup_ms=7, duration_s=0.02)
    assert len(machine.log) == 7 + 20
    assert sum(map(len, samples["a"].blocks_ms)) == 20


def test_every_sample_is_kept_with_its_block(machine):
    samples = run(machine, {"a": machine.work("a", 4, busy=0.5), "b": machine.work("b", 2)})
    assert samples["a"].blocks_ms == ((4.0, 4.0, 4.0),) * 4
    assert samples["b"].blocks_ms == ((2.0,) * 5,) * 4
    assert samples["a"].cpu_ms == 2.0


def test_all_subjects_reach_both_floors_with_equally_many_blocks(machine):
    samples = run(machine, {"slow": machine.work("slow", 30), "fast": machine.work("fast", 1)}, min_iterations=7)
    assert len(samples["slow"].blocks_ms) == len(samples["fast"].blocks_ms) == 7
    brief = run(machine, {"fast": machine.work("fast", 1)}, duration_s=0.1)
    assert sum(map(sum, brief["fast"].blocks_ms)) >= 100


def test_poll_runs_before_every_block_and_ends_the_run(machine):
    seen = []

    def poll():
        seen.append(gc.isenabled())
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(machine, {"a": machine.work("a", 5), "b": machine.work("b", 5)}, poll=poll)
    assert seen == [True] * 6  # 2 warm-ups, 3 blocks, and the one that raises
    assert len(machine.log) == 2 + 3 * 2


def test_garbage_collector_rests_in_blocks_and_wakes_even_after_an_error(machine):
    states = []
    work = machine.work("a", 5)

    def call():
        states.append(gc.isenabled())
        work()
        if len(states) == 4:
            raise RuntimeError("broken engine")

    with pytest.raises(RuntimeError, match="broken engine"):
        run(machine, {"a": call})
    assert states == [True, False, False, False]
    assert gc.isenabled()


def test_device_clock_has_blocks_of_its_own_in_the_same_turn(machine):
    host = {"a": machine.work("a", 5), "b": machine.work("b", 5)}
    on_device = machine.work("a on the device", 6)  # launching and reading the clock: 6 ms of wall time for 4

    def gpu_ms():
        on_device()
        return 4.0

    samples = run(machine, host, device={"a": gpu_ms}, warmup_ms=0)
    assert machine.log[:3] == ["a", "a on the device", "b"]  # all are warmed up
    assert machine.log[3:9] == ["a", "a", "a on the device", "a on the device", "b", "b"]
    assert machine.log[9:13] == ["b", "b", "a", "a"]
    assert samples["a"].device_blocks_ms == ((4.0, 4.0),) * 4
    assert samples["a"].blocks_ms == ((5.0, 5.0),) * 4  # what reading the device's clock costs is not in them
    assert samples["b"].device_blocks_ms == ()


def test_what_goes_before_each_call_is_not_timed_but_counts_towards_the_duration(machine):
    samples = run(
        machine, {"a": machine.work("a", 1)}, before_each=machine.work("evict", 9), warmup_ms=2, duration_s=0.1
    )
    assert machine.log[:2] == ["a", "a"]  # the warm-up is of code, and evicts nothing
    assert machine.log[2:] == ["evict", "a"] * 10
    assert samples["a"].blocks_ms == ((1.0,),) * 10  # a block lasts 10 ms, all in all
    assert samples["a"].cpu_ms == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_ms": -1}, "the warm-up is -1 ms"),
        ({"duration_s": 0}, "the timed duration is 0 s"),
        (
            {"duration_s": float("inf")},
            r"the timed duration is inf s\n  expected: a finite number of seconds above 0\n",
        ),
        ({"duration_s": "2"}, "the timed duration is '2'"),
        ({"min_iterations": 0}, "the least number of calls is 0"),
        ({"min_iterations": 2.5}, r"2\.5\n  expected: a whole number from 1 on"),
        ({"block_ms": float("nan")}, "the length of a block is nan ms"),
    ],
)
def test_values_out_of_range_are_refused(machine, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(machine, {"a": machine.work("a", 1)}, **changes)
    assert "_" not in str(caught.value)  # no name that only one of the two ways to call this knows
    assert machine.log == []


def test_no_subject_is_refused(machine):
    with pytest.raises(ConfigError, match="no subject to time"):
        run(machine, {})
