import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.compare import MIN_PAIRS, compare, compare_all
from deploy_sparse.measure.interleave import interleave


def measured(machine, make_record, dense_ms, ticket_ms, *, noise=0.3, **changes):
    """Dense and ticket timed on the fake machine, as records."""
    calls = {"dense": machine.work("dense", dense_ms, noise), "ticket": machine.work("ticket", ticket_ms, noise)}
    samples = interleave(calls, warmup_ms=0, duration_s=0.2, block_ms=8.0, clock=machine.clock)
    return [make_record(name, taken.blocks_ms, **changes) for name, taken in samples.items()]


def test_interval_covers_a_known_ratio_about_as_often_as_it_says(machine, make_record):
    found = [compare(*measured(machine, make_record, 2.0, 1.0)) for _ in range(100)]
    assert sum(c.low <= 2.0 <= c.high for c in found) >= 90
    assert all(c.verdict == "faster" for c in found)
    assert all(c.low <= c.ratio <= c.high for c in found)


def test_equal_workloads_are_not_told_apart(machine, make_record):
    found = [compare(*measured(machine, make_record, 1.0, 1.0)) for _ in range(40)]
    assert sum(c.verdict == "cannot tell" for c in found) >= 38
    assert all(c.verdict == "cannot tell" for c in found if c.low <= 1 <= c.high)


def test_drift_that_both_share_cancels(machine, make_record):
    dense, ticket = machine.work("dense", 2.0), machine.work("ticket", 1.0)

    def slow_down():
        machine.speed *= 1.03

    samples = interleave({"dense": dense, "ticket": ticket}, poll=slow_down, warmup_ms=0, clock=machine.clock)
    found = compare(*(make_record(name, taken.blocks_ms) for name, taken in samples.items()))
    # blocks of a pair are 3 % apart, in turns the one way and the other
    assert 1.9 < found.low <= found.ratio <= found.high < 2.1


def test_slower_subject_is_called_slower_with_the_reason(machine, make_record):
    dense, ticket = measured(machine, make_record, 1.0, 1.5, noise=0.05)
    ticket = ticket.model_copy(update={"macs": dense.macs // 4})
    found = compare(dense, ticket)
    assert found.verdict == "slower"
    assert found.high < 1
    assert found.doubt is None
    assert any("does 0.25 of the baseline's multiply-accumulates, yet takes 1.5" in reason for reason in found.reasons)


def test_share_of_the_predicted_speed_up(make_record):
    found = compare(make_record(ms=2.0), make_record("ticket", ms=1.0, macs=40_551_000 // 4))
    assert found.mac_ratio == pytest.approx(4, rel=1e-3)
    assert found.reasons[0] == "reaches 0.50 of the MAC-predicted speed-up of 4.00×"
    assert compare(make_record(macs=None), make_record("ticket")).mac_ratio is None


def test_interval_around_one_cannot_tell(make_record):
    wobble = tuple((1.0 + 0.2 * (i % 2),) for i in range(20))
    found = compare(make_record(blocks=((1.1,),) * 20), make_record("ticket", wobble))
    assert found.low <= 1 <= found.high
    assert found.verdict == "cannot tell"
    assert found.doubt == "the interval includes 1"


@pytest.mark.parametrize("ms", [1.004, 0.996])
def test_difference_that_reopening_an_engine_makes_is_no_verdict(make_record, ms):
    found = compare(make_record(blocks=((1.0,),) * 20), make_record("ticket", ((ms,),) * 20))
    assert found.verdict == "cannot tell"
    assert "opening one engine twice" in found.doubt


def test_few_pairs_cannot_tell_however_large_the_ratio(make_record):
    few = MIN_PAIRS - 1
    found = compare(make_record(ms=9.0, count=few), make_record("ticket", ms=1.0, count=few))
    assert found.verdict == "cannot tell"
    assert f"only {few} paired blocks" in found.doubt
    assert (found.low, found.high) == (None, None)  # so few have no interval that could be shown


def test_waiting_is_named(make_record):
    found = compare(make_record(), make_record("ticket", ((1.0,),) * 20, cpu_ms=0.5))
    assert any(reason.startswith("ticket was on the processor for 0.50 of its wall time") for reason in found.reasons)


def test_equal_records_give_equal_comparisons(make_record):
    assert compare(make_record(ms=2), make_record("ticket")) == compare(make_record(ms=2), make_record("ticket"))


def test_unlike_conditions_are_refused_and_every_field_named(make_record):
    dense = make_record()
    other = dense.conditions.model_copy(update={"threads": 4, "interleaved_with": ("dense",)})
    ticket = make_record(
        "ticket", batch=8, target="rtx-sm89", run_id="run-2", conditions=other, environment={"python": "3.12"}
    )
    with pytest.raises(ConfigError, match="were not measured alike") as caught:
        compare(dense, ticket)
    for difference in (
        "batch: 1 -> 8",
        "target: cpu -> rtx-sm89",
        "run_id: run-1 -> run-2",
        "threads: 1 -> 4",
        "environment.python: 3.11 -> 3.12",
        "environment.processor: a processor -> absent",
    ):
        assert difference in str(caught.value)


def test_subjects_that_were_not_interleaved_are_refused(make_record):
    alone = make_record().conditions.model_copy(update={"interleaved_with": ()})
    with pytest.raises(ConfigError, match="interleaved with: dense is not among ticket"):
        compare(make_record(), make_record("ticket", conditions=alone))


def test_untimed_record_is_not_compared(make_record):
    with pytest.raises(ConfigError, match="'ticket' at batch 1 on cpu has no times: no NVIDIA GPU"):
        compare(make_record(), make_record("ticket", timed=False))


def test_compare_all_keeps_runs_batches_and_the_untimed_apart(make_record):
    records = [
        make_record(ms=2.0),
        make_record("ticket"),
        make_record(batch=8, ms=3.0),
        make_record("ticket", batch=8),
        make_record("ticket", run_id="run-2"),  # no baseline in that run
        make_record("broken", timed=False),
    ]
    found = compare_all(records)
    assert [(c.run_id, c.batch, c.subject) for c in found] == [("run-1", 1, "ticket"), ("run-1", 8, "ticket")]
    assert [round(c.ratio) for c in found] == [2, 3]
