import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.compare import MIN_PAIRS, RESAMPLES, SEED, _ratio, compare, compare_all
from deploy_sparse.measure.interleave import interleave
from deploy_sparse.measure.record_conditions import GpuConditions, GpuState
from deploy_sparse.measure.timing import summarise


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


@pytest.mark.parametrize("ratio", [1, 1.05, 1.25, 2, 4])
def test_known_ratios_come_out_exactly(machine, make_record, ratio):
    found = compare(*measured(machine, make_record, ratio, 1.0, noise=0))
    assert found.low == found.ratio == found.high == pytest.approx(ratio, rel=1e-12)
    assert found.verdict == ("cannot tell" if ratio == 1 else "faster")
    back = compare(*measured(machine, make_record, 1.0, ratio, noise=0))
    assert back.ratio == pytest.approx(1 / ratio, rel=1e-12)
    assert back.verdict == ("cannot tell" if ratio == 1 else "slower")


@pytest.mark.parametrize("per_block", [0.99, 1.01])
def test_drifting_clock_fools_a_measurement_in_a_row_and_not_an_interleaved_one(machine, make_record, per_block):
    def drift():
        machine.speed *= per_block

    way = {"warmup_ms": 0, "duration_s": 0.5, "block_ms": 8.0, "poll": drift, "clock": machine.clock}
    dense, ticket = (
        summarise([v for block in interleave({"a": machine.work("a", 1.0)}, **way)["a"].blocks_ms for v in block])
        for _ in range(2)
    )
    assert abs(dense.p50 / ticket.p50 - 1) > 0.25  # of equal work
    machine.speed = 1.0
    calls = {name: machine.work(name, 1.0) for name in ("dense", "ticket")}
    taken = interleave(calls, **way)
    found = compare(*(make_record(name, t.blocks_ms) for name, t in taken.items()))
    assert found.verdict == "cannot tell"
    assert found.ratio == pytest.approx(1, abs=0.011)  # what a block drifts


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_who_goes_first_gains_nothing(machine, make_record, penalty):
    """The machine is faster, or slower, for whoever opens a round."""
    turns = []

    def turn():
        turns.append(None)
        machine.speed = penalty if len(turns) % 2 else 1.0  # two warm-ups, then two blocks a round

    calls = {name: machine.work(name, 1.0) for name in ("dense", "ticket")}
    taken = interleave(calls, warmup_ms=0, duration_s=0.5, block_ms=8.0, poll=turn, clock=machine.clock)
    found = compare(*(make_record(name, t.blocks_ms) for name, t in taken.items()))
    assert found.low <= 1 <= found.high
    assert found.verdict == "cannot tell"


def test_clock_that_runs_wrong_runs_wrong_for_both(machine, make_record):
    fast = type(machine.clock)(lambda: int(1.2 * machine.wall), machine.clock.cpu_ns)
    calls = {"dense": machine.work("dense", 2.0), "ticket": machine.work("ticket", 1.0)}
    taken = interleave(calls, warmup_ms=0, duration_s=0.5, block_ms=8.0, clock=fast)
    found = compare(*(make_record(name, t.blocks_ms) for name, t in taken.items()))
    assert taken["dense"].blocks_ms[0][0] == pytest.approx(2.4)
    assert found.ratio == pytest.approx(2, rel=1e-5)


blocks = st.lists(st.floats(0.5, 2.0), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(blocks, blocks), min_size=1, max_size=14),
    scale=st.floats(0.2, 5.0),
)
def test_no_verdict_whose_interval_includes_1(make_record, pairs, scale):
    ticket = tuple(tuple(scale * value for value in block) for _, block in pairs)
    found = compare(make_record(blocks=tuple(block for block, _ in pairs)), make_record("ticket", ticket))
    if found.low is None:
        assert len(pairs) < MIN_PAIRS
        assert found.verdict == "cannot tell"
        return
    assert found.low <= found.ratio <= found.high
    assert found.verdict != "faster" or found.low > 1
    assert found.verdict != "slower" or found.high < 1
    assert (found.doubt is not None) == (found.verdict == "cannot tell")
    if found.low <= 1 <= found.high:
        assert found.verdict == "cannot tell"


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
    waited, processor = found.reasons[-2:]
    assert waited.startswith("ticket was on the processor for 0.50 of its wall time")
    assert processor == "in processor time the ratio is 2.02×"  # it did half the work, while something else ran
    assert found.processor_ratio == pytest.approx(2.02, abs=0.01)
    alike = compare(make_record(), make_record("ticket"))
    assert (len(alike.reasons), alike.processor_ratio) == (1, None)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=MIN_PAIRS, max_size=300), st.integers(1, 3))
def test_interval_is_the_quantiles_of_the_medians_of_resampled_pairs(ratios, calls):
    """To the last bit, as equal records give equal reports."""
    baseline = tuple((ratio,) * calls for ratio in ratios)
    found = _ratio(baseline, ((1.0,),) * len(ratios))
    chosen = np.random.default_rng(SEED).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    expected = np.quantile(np.median(np.array(ratios)[chosen], axis=1), (0.025, 0.975))
    assert found == (np.median(ratios), *expected)


def test_two_hundred_comparisons_take_less_than_a_second(make_record):
    records = [make_record(name, count=30, run_id=f"run-{run}") for run in range(200) for name in ("dense", "ticket")]
    start = time.process_time()
    assert len(compare_all(records)) == 200
    assert time.process_time() - start < 0.8


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
    with pytest.raises(ConfigError, match="interleaved with: ticket is not among dense"):
        compare(make_record(conditions=alone), make_record("ticket"))


GPU = GpuConditions(name="a GPU", before=GpuState(), after=GpuState())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"cache": "cold"}, "cache: warm -> cold"),
        ({"transfers": "included"}, "transfers: excluded -> included"),
        ({"cuda_graph": True}, "cuda_graph: False -> True"),
        ({"cpus": "1"}, "cpus: 0-1 -> 1"),
        ({"warmup_ms": 0.0}, "warmup_ms: 200.0 -> 0.0"),
        ({"gpu": GPU.model_copy(update={"power_limit_w": 300.0})}, "gpu.power_limit_w: None -> 300.0"),
    ],
)
def test_other_ways_of_timing_are_unlike_conditions(make_record, changes, difference):
    way = {"cache": "warm", "transfers": "excluded", "cuda_graph": False, "cpus": "0-1", "gpu": GPU}
    dense, ticket = make_record(), make_record("ticket")
    dense, ticket = (r.model_copy(update={"conditions": r.conditions.model_copy(update=way)}) for r in (dense, ticket))
    assert compare(dense, ticket).pairs == 20
    ticket = ticket.model_copy(update={"conditions": ticket.conditions.model_copy(update=changes)})
    with pytest.raises(ConfigError, match="were not measured alike") as caught:
        compare(dense, ticket)
    assert caught.value.given.endswith(f"alike: {difference}")


def test_precisions_are_compared_where_both_are_known(make_record):
    with pytest.raises(ConfigError, match="precision: fp32 -> fp16"):
        compare(make_record(precision="fp32"), make_record("ticket", precision="fp16"))
    assert compare(make_record(precision="fp32"), make_record("ticket")).pairs == 20


def test_networks_are_compared_where_both_are_known(make_record):
    with pytest.raises(ConfigError, match="network: resnet18 -> vgg16"):
        compare(make_record(network="resnet18"), make_record("ticket", network="vgg16"))
    assert compare(make_record(network="resnet18"), make_record("ticket")).pairs == 20


def on_device(make_record, subject, ms, *, spread=0.0, **conditions):
    """A record whose calls take ``ms`` on the device's clock."""
    noise = np.random.default_rng(0).uniform(1 - spread, 1 + spread, (20, 3))
    device = tuple(tuple(float(ms * value) for value in row) for row in noise)
    stats = summarise([sample for block in device for sample in block])
    times = {"device_samples_ms": device, "device_stats": stats, "cpu_ms": 0.1}
    record = make_record(subject, ((1.0,),) * 20, macs=None, **times)
    return record.model_copy(update={"conditions": record.conditions.model_copy(update=conditions)})


def test_both_clocks_give_a_ratio_and_the_host_gives_the_verdict(make_record):
    found = compare(on_device(make_record, "dense", 0.9), on_device(make_record, "ticket", 0.3))
    assert (found.ratio, found.verdict) == (1, "cannot tell")  # a user waits as long
    assert found.device_ratio == found.device_low == found.device_high == pytest.approx(3)
    assert found.reasons == ("ticket kept the GPU at work for 0.30 of its wall time; the rest is launches and waiting",)
    assert compare(make_record(), on_device(make_record, "ticket", 0.3)).device_ratio is None


@pytest.mark.parametrize("way", [{"gpu": GPU}, {"cuda_graph": False}])
def test_processor_time_says_nothing_of_a_gpu_without_a_clock(make_record, way):
    """The processor waits for it, or asks it all the time, as its library likes."""
    pair = [make_record(name, macs=None, cpu_ms=0.5) for name in ("dense", "ticket")]
    assert any("processor time" in reason for reason in compare(*pair).reasons)
    pair = [r.model_copy(update={"conditions": r.conditions.model_copy(update=way)}) for r in pair]
    assert (compare(*pair).reasons, compare(*pair).processor_ratio) == ((), None)


def test_what_disturbs_a_gpu_is_said(make_record):
    held = GPU.model_copy(update={"held_by": ("clocks set by the user", "power cap")})
    way = {"transfers": "included", "gpu": held}
    found = compare(
        on_device(make_record, "dense", 0.9, spread=0.2, **way), on_device(make_record, "ticket", 0.5, **way)
    )
    unsteady, waits, capped = found.reasons
    assert unsteady.startswith("dense's times on the GPU vary by 1")
    assert unsteady.endswith("steady ones need locked clocks: nvidia-smi -lgc")
    assert waits.endswith("0.50 of its wall time; the rest is transfers, launches and waiting")
    assert capped == "the GPU's clocks were held down meanwhile: power cap"


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
