import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ArtifactError
from deploy_sparse.measure.record import (
    Conditions,
    LatencyRecord,
    append_records,
    read_records,
)
from deploy_sparse.measure.record_conditions import GpuConditions, GpuState
from deploy_sparse.measure.timing import summarise

positive = st.floats(1e-6, 1e9)
GPU = GpuConditions(
    name="NVIDIA H200",
    driver="580.65",
    power_limit_w=700.0,
    sm_max_mhz=1980,
    before=GpuState(sm_mhz=345, power_w=76.5, temperature_c=31),
    after=GpuState(sm_mhz=1755, memory_mhz=3201, power_w=690.0, temperature_c=66, held_by=("power cap",)),
    sm_mhz=(1755, 1980),
    held_by=("power cap",),
)
COMMITTED = sorted((Path(__file__).resolve().parents[3] / "benchmarks" / "records").rglob("records.jsonl"))
names = st.text(min_size=1, max_size=20)


def optional(strategy):
    return st.none() | strategy


@st.composite
def records(draw):
    values = {
        "run_id": draw(names),
        "date": draw(st.datetimes(timezones=st.just(UTC))),
        "subject": draw(names),
        "baseline": draw(names),
        "target": draw(names),
        "runtime": draw(st.text(max_size=9)),
        "batch": draw(st.integers(1, 4096)),
        "accuracy": draw(optional(st.floats(0, 1))),
        "parameters": draw(optional(st.integers(0, 2**62))),
        "macs": draw(optional(st.integers(0, 2**62))),
        "engine_bytes": draw(optional(st.integers(0, 2**62))),
        "build_seconds": draw(optional(st.floats(0, 1e6))),
        "peak_memory_bytes": draw(optional(st.integers(0, 2**62))),
        "hashes": draw(st.dictionaries(names, st.text(max_size=9), max_size=2)),
        "environment": draw(st.dictionaries(names, st.text(max_size=9), max_size=2)),
        "conditions": Conditions(
            threads=draw(optional(st.integers(1, 64))),
            warmup_ms=draw(positive),
            duration_s=draw(positive),
            min_iterations=draw(st.integers(1, 99)),
            block_ms=draw(positive),
            interleaved_with=tuple(draw(st.lists(names, max_size=2))),
            processor_mhz=draw(optional(st.tuples(positive, positive))),
            transfers=draw(optional(st.sampled_from(["excluded", "included"]))),
            cuda_graph=draw(optional(st.booleans())),
            cache=draw(optional(st.sampled_from(["warm", "cold"]))),
            evicted_bytes=draw(optional(st.integers(1, 2**40))),
            cpus=draw(optional(st.sampled_from(["0", "0-3,8"]))),
            gpu=draw(optional(st.just(GPU))),
        ),
        "network": draw(optional(names)),
        "form": draw(optional(names)),
        "precision": draw(optional(st.sampled_from(["fp32", "tf32", "int8"]))),
        "sparsity": draw(optional(st.floats(0, 1))),
    }
    if draw(st.booleans()):
        block = st.lists(positive, min_size=1, max_size=4).map(tuple)
        blocks = tuple(draw(st.lists(block, min_size=1, max_size=4)))
        stats = summarise([sample for block in blocks for sample in block])
        if draw(st.booleans()):
            values |= {"device_samples_ms": blocks, "device_stats": stats}
        return LatencyRecord(
            **values, status="timed", stats=stats, samples_ms=blocks, cpu_ms=draw(optional(st.floats(0, 1e6)))
        )
    return LatencyRecord(**values, status="compiled, not timed here", reason=draw(names))


@settings(max_examples=25, deadline=None)
@given(st.lists(records(), min_size=1, max_size=3))
def test_records_survive_the_file(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("records") / "a.jsonl"
    append_records(path, written[:1])
    append_records(path, written[1:])
    assert read_records(path) == tuple(written)
    assert path.read_bytes().count(b"\n") == len(written)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_records_are_read_and_written_back_to_the_byte(path):
    found = read_records(path)
    assert "".join(f"{record.to_json_line()}\n" for record in found) == path.read_text()
    for record in found:
        if record.timed:
            assert record.stats == summarise([sample for block in record.samples_ms for sample in block])


def test_there_are_committed_records_of_version_1():
    assert {record.schema_version for path in COMMITTED for record in read_records(path)} >= {1}


def as_version_1(record):
    """The line that version 1 wrote for a record."""
    values = json.loads(record.to_json_line())
    new = ("network", "form", "precision", "sparsity", "device_stats", "device_samples_ms")
    values = {key: value for key, value in values.items() if key not in new} | {"schema_version": 1}
    of_conditions = (
        "threads",
        "warmup_ms",
        "duration_s",
        "min_iterations",
        "block_ms",
        "interleaved_with",
        "processor_mhz",
    )
    values["conditions"] = {key: values["conditions"][key] for key in of_conditions}
    if values["stats"] is not None:
        del values["stats"]["p95"]
    return values


def test_version_1_is_read_with_its_p95_filled_in_and_stays_version_1(tmp_path, make_record):
    path = tmp_path / "a.jsonl"
    new = make_record()
    lines = [json.dumps(as_version_1(r), separators=(",", ":")) for r in (new, make_record(timed=False))]
    path.write_text("".join(f"{line}\n" for line in lines))
    old, untimed = read_records(path)
    assert (old.schema_version, new.schema_version) == (1, 2)
    assert old.stats == new.stats
    assert old.stats.p95 == sorted(sample for block in new.samples_ms for sample in block)[94]
    assert [old.to_json_line(), untimed.to_json_line()] == lines
    append_records(path, [new])
    assert [record.schema_version for record in read_records(path)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda c: {**c, "network": "vgg16"}, "is of schema version 1 but states network"),
        (lambda c: {**c, "conditions": {**c["conditions"], "cache": "cold"}}, "schema version 1 but states cache"),
        (lambda c: {**c, "stats": {**c["stats"], "p95": 2.0}}, "statistics that are not those of its samples"),
        (lambda c: {**c, "stats": {**c["stats"], "p99": 2.0}}, "statistics that are not those of its samples"),
        (lambda c: {**c, "schema_version": 2}, "statistics that are not those of its samples"),  # it has no p95
    ],
)
def test_each_version_is_held_to_what_it_states(tmp_path, make_record, alter, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(alter(as_version_1(make_record()))) + "\n")
    with pytest.raises(ArtifactError, match=message):
        read_records(path)


def test_times_of_the_device_need_their_statistics_and_the_same_blocks(make_record):
    blocks = ((0.5,),) * 20
    stats = summarise([0.5] * 20)
    assert make_record(device_samples_ms=blocks, device_stats=stats).device_stats.p95 == 0.5
    for times in (
        {"device_samples_ms": blocks},
        {"device_stats": stats},
        {"device_samples_ms": blocks[1:], "device_stats": summarise([0.5] * 19)},
    ):
        with pytest.raises(ArtifactError, match="has times of the device without their statistics, or in other blocks"):
            make_record(**times)
    with pytest.raises(ArtifactError, match="statistics that are not those of its samples"):
        make_record(device_samples_ms=blocks, device_stats=summarise([0.4] * 20))


def test_untimed_record_cannot_hold_times(make_record):
    timed = make_record()
    for times in (
        {"samples_ms": timed.samples_ms},
        {"stats": timed.stats},
        {"device_stats": timed.stats},
        {"device_samples_ms": timed.samples_ms},
        {"cpu_ms": 1.0},
    ):
        with pytest.raises(ArtifactError, match="'compiled, not timed here' but holds times"):
            make_record(timed=False, **times)
    with pytest.raises(ArtifactError, match="without a reason"):
        make_record(timed=False, reason=None)


def test_what_was_not_built_has_a_status_of_its_own_since_version_2(make_record, tmp_path):
    record = make_record(timed=False, status="not built", reason="no channel can go")
    append_records(tmp_path / "r.jsonl", [record])
    assert read_records(tmp_path / "r.jsonl") == (record,)
    assert not record.timed
    with pytest.raises(ArtifactError, match="'not built' but holds times"):
        make_record(timed=False, status="not built", cpu_ms=1.0)
    with pytest.raises(ArtifactError, match="is of schema version 1 but 'not built'"):
        make_record(timed=False, status="not built", schema_version=1)


def test_timed_record_needs_samples_and_their_own_statistics(make_record):
    for missing in ({"samples_ms": ()}, {"stats": None}, {"reason": "busy"}):
        with pytest.raises(ArtifactError, match="'timed' without samples and statistics"):
            make_record(**missing)
    with pytest.raises(ArtifactError, match="statistics that are not those of its samples"):
        make_record(stats=summarise([0.5]))


def test_date_is_utc(make_record):
    with pytest.raises(ArtifactError, match=r"dated 2026-11-21T09:00:00\+02:00"):
        make_record(date=datetime(2026, 11, 21, 9, tzinfo=timezone(timedelta(hours=2))))
