"""Records that were timed in several ways, or several times: every row and sentence says which one it means."""

import re

from report_pages import gpu_record, report_of

from deploy_sparse.measure.contents import headlines, main_table, spread_table, subject_verdicts, verdicts
from deploy_sparse.measure.report_conditions import conditions_table
from deploy_sparse.measure.slower import missed, slower


def test_ways_of_timing_are_told_apart(make_record):
    records = [
        gpu_record(make_record, subject, ms, run_id=run, how=how)
        for run, how in (("r1", {}), ("r2", {"transfers": "included"}), ("r3", {"cache": "cold", "cuda_graph": True}))
        for subject, ms in (("dense", 4.0), ("ticket", 2.0))
    ]
    report = report_of(records)
    assert not report.repeated
    assert [report.place_of(group) for group in report.groups] == [
        *("h200-fp16, batch 1", "h200-fp16, batch 1, with transfers", "h200-fp16, batch 1, cold cache, CUDA graph"),
    ]
    table = main_table(report)
    assert "run" not in table.columns
    column = table.columns.index("timed with")
    assert [row[column] for row in table.rows[::2]] == ["", "with transfers", "cold cache, CUDA graph"]
    assert dict(conditions_table(report).rows)["transfers"] == "not known (run r1, r3); included (run r2)"


def test_every_row_and_sentence_says_how_it_was_timed(make_record):
    def of(run, name, ms, **how):
        how = {"interleaved_with": ("dense", "ticket"), **how}
        return make_record(name, ms=ms, run_id=run, conditions=make_record().conditions.model_copy(update=how))

    cold = {"cache": "cold", "evicted_bytes": 64}
    records = [of("r1", "dense", 2.0), of("r1", "ticket", 1.0)]
    records += [of("r2", "dense", 2.0, **cold), of("r2", "ticket", 0.5, **cold)]
    records += [of("r3", "dense", 2.0, **cold), of("r3", "ticket", 3.0, **cold)]
    report = report_of([r.model_copy(update={"macs": 9 if r.subject == "dense" else 1}) for r in records])
    for table in (main_table(report), spread_table(report), missed(report)):
        assert table.columns[:5] == ("subject", "target", "timed with", "run", "batch")
        assert len({row[:5] for row in table.rows}) == len(table.rows)
    assert [row[2:4] for row in missed(report).rows] == [("cold cache", "r3"), ("", "r1"), ("cold cache", "r2")]
    (sentence,) = slower(report)
    assert sentence.startswith("ticket on cpu at batch 1, cold cache in run r3: 0.667× the speed of dense")
    assert "Furthest ahead is ticket at batch 1, cold cache, 4.0" in headlines(report)[0].text


def test_what_was_evicted_from_warm_caches_is_known(make_record):
    def of(run, **how):
        return make_record(
            run_id=run, conditions=make_record().conditions.model_copy(update=how), environment={"run": run}
        )

    records = [of("r1", cache="cold", evicted_bytes=64 << 20), of("r2", cache="warm"), of("r3")]
    rows = dict(conditions_table(report_of(records)).rows)
    assert rows["evicted before each call, bytes"] == "67.11M (run r1); nothing (run r2); not known (run r3)"


def test_runs_that_measured_the_same_have_sentences_of_their_own(make_record):
    """The second run compares with another baseline, and found something else."""
    beside = make_record().conditions.model_copy(update={"interleaved_with": ("other", "dense", "ticket")})
    changes = {"baseline": "other", "run_id": "run-2", "conditions": beside}
    records = [make_record(ms=2.0), make_record("ticket"), make_record("other", **changes)]
    records.append(make_record("ticket", ms=3.0, seed=1, **changes))
    first, second = subject_verdicts(report_of(records))
    assert (first.kind, second.kind) == ("faster", "slower")
    assert first.text.startswith("cpu, run run-1: ticket against dense: faster at batch 1 (2.00×")
    assert second.text.startswith("cpu, run run-2: ticket against other: slower at batch 1 (0.33")


def test_ratio_that_a_shared_processor_makes_is_never_told_alone(make_record):
    """A long call is cut into pieces by what else runs, a short one is not: 23 times as fast, with a quarter of the work."""
    shared = report_of([make_record(ms=92.0, cpu_ms=16.0), make_record("ticket", ms=4.0, cpu_ms=4.0)])
    told = r"23\.\d+× .*\(.*; 4\.00× in processor time\)"
    assert re.search(told, verdicts(shared)[0].text)
    assert re.search(told, headlines(shared)[0].text)
    assert re.search(told, main_table(shared).rows[1][3])
    near = report_of([make_record(ms=92.0, cpu_ms=16.0), make_record("ticket", ms=24.0, cpu_ms=4.0)])
    assert near.comparisons[0].processor_ratio == 4
    assert "processor time" not in verdicts(near)[0].text
