"""What the tables say, against numbers worked out by hand."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from suite_samples import small

from deploy_sparse.measure.record import Conditions, LatencyRecord
from deploy_sparse.measure.timing import summarise
from deploy_sparse.suites.layers import LayerFacts
from deploy_sparse.suites.state import SubjectFacts
from deploy_sparse.suites.tables import Measured, goal_table, headline_table, subject_table, tables, verdict

CONDITIONS = {"warmup_ms": 0.0, "duration_s": 0.1, "min_iterations": 1, "block_ms": 5.0}


def record(subject, ms, macs, *, network="first", batch=1, run="r1", beside=("dense", "half", "odd"), reason=None):
    samples = tuple((ms * (1 + 0.001 * (i % 3)),) for i in range(12))
    times = {"status": "timed", "stats": summarise([s for block in samples for s in block]), "samples_ms": samples}
    return LatencyRecord(
        run_id=f"{run}-{network}-{batch}",
        date=datetime(2026, 1, 2, tzinfo=UTC),
        subject=subject,
        baseline="dense",
        target="cpu",
        runtime="onnxruntime",
        batch=batch,
        network=network,
        macs=macs,
        conditions=Conditions(**CONDITIONS, interleaved_with=tuple(n for n in beside if n != subject)),
        **(times if reason is None else {"status": "compiled, not timed here", "reason": reason}),
    )


def group(dense=10.0, half=2.6, odd=4.0, **where):
    return record("dense", dense, 100, **where), record("half", half, 25, **where), record("odd", odd, 50, **where)


def measured(suite, records, described=()):
    return Measured(suite, tuple(records), {(f.network, f.subject, f.target): f for f in described})


def test_a_goal_on_the_mac_predicted_speed_up_is_judged_at_every_batch():
    suite = small(goals=[{"forms": ["half"], "of_predicted": 0.95}])
    found = goal_table(measured(suite, [*group(), *group(half=2.5, batch=4)]))
    assert [(row[4], row[6].partition(" (")[0], row[7]) for row in found.rows] == [
        (1, "0.962", "yes"), (4, "1.000", "yes")
    ]  # fmt: skip
    worse = goal_table(measured(suite, group(half=3.0)))
    (row,) = worse.rows
    assert (row[0], row[5], row[6].partition(" (")[0], row[7]) == ("of MAC-predicted", "0.95", "0.833", "no")
    both = goal_table(measured(suite, [*group(), *group(half=3.0, batch=4)]))
    assert both.note.startswith("Of 2 goals 1 are met, 1 are missed, and of 0 nobody can tell. ")


def test_a_goal_is_met_by_its_whole_interval(monkeypatch):
    suite = small(goals=[{"forms": ["half"], "of_predicted": 0.95}])
    found = measured(suite, group()).comparison("first", "half", "cpu", 1)
    wide = replace(found, ratio=3.6, low=3.4, high=4.2)  # of 4 times by MACs
    monkeypatch.setattr(Measured, "comparison", lambda self, *place: wide)
    (row,) = goal_table(measured(suite, group())).rows
    assert row[6:] == ("0.900 (0.850 to 1.050)", "cannot tell")
    wide = replace(found, ratio=4.0, low=3.81, high=4.2)
    assert goal_table(measured(suite, group())).rows[0][7] == "yes", "the interval is beyond 3.8"
    wide = replace(found, ratio=4.0, low=None, high=None)
    assert goal_table(measured(suite, group())).rows[0][7] == "cannot tell"


def test_a_goal_over_another_form_compares_the_two_in_one_run():
    suite = small(goals=[{"forms": ["half"], "over": "odd", "times": 1.25}])
    (row,) = goal_table(measured(suite, group())).rows
    assert row[0] == "over odd"
    assert row[6].startswith("1.54× (")  # 4.0 / 2.6
    assert row[6].endswith("), with 0.50× the MACs")
    assert row[7] == "yes"
    apart = [*group()[:2], record("dense", 10.0, 100, run="r2"), record("odd", 4.0, 50, run="r2")]
    assert goal_table(measured(suite, apart)).rows == (), "times of two runs are not compared"


def headlined(saving, forms=("half",), **more):
    entry = {"source": "A paper", "claim": "half", "network": "first", "forms": list(forms), "timed": "a layer", **more}
    return small(headlines=[{**entry, **({"saving": saving} if saving is not None else {})}])


def row_of(saving, facts=(), half=2.6, **more):
    (row,) = headline_table(measured(headlined(saving, **more), group(half=half), facts)).rows
    return row


def test_a_headline_stands_beside_what_the_whole_network_saves():
    row = row_of(0.6)
    assert row[:4] == ("A paper: half", "first", "half", "60.00 %")
    assert row[4].startswith("74.00 % (")  # 1 - 2.6 / 10
    assert row[5:] == ("reached", "75.00 %", "a layer", "cpu")  # 1 - 25 / 100


def test_what_has_to_be_known_of_the_papers_comes_from_the_suite():
    plain = headline_table(measured(headlined(0.6), group())).note
    told = headlined(0.6).model_copy(update={"headlines_note": "They used a slide rule."})
    assert headline_table(measured(told, group())).note == f"{plain} They used a slide rule."
    assert told.measured() == headlined(0.6).measured(), "texts may change"


def test_batches_stand_side_by_side_in_one_row_for_each_form():
    suite = headlined(0.7, forms=("half", "odd"))
    table = headline_table(measured(suite, [*group(), *group(half=4.1, batch=32)]))
    assert table.columns[4:6] == ("ours saves at batch 1", "ours saves at batch 32")
    half, odd = table.rows
    assert [cell.partition(" (")[0] for cell in half[4:6]] == ["74.00 %", "59.00 %"]
    assert half[6] == (
        "at batch 1 reached; at batch 32 falls short; "
        "the engine reaches 0.61 at batch 32 of the MAC-predicted speed-up"
    )  # fmt: skip
    assert odd[6].startswith("falls short; the MACs permit 50.00 % at most")


def test_a_shortfall_that_the_macs_do_not_permit_says_so_and_where_they_are():
    facts = SubjectFacts(network="first", subject="half", target="cpu", how="", macs=25, dense_macs=100, whole_macs=20)
    row = row_of(0.8, [facts])
    assert row[5] == "falls short; the MACs permit 75.00 % at most; 20.00 % of the MACs are in layers that lose nothing"
    small_share = facts.model_copy(update={"whole_macs": 1})
    assert row_of(0.8, [small_share])[5] == "falls short; the MACs permit 75.00 % at most"


def test_a_shortfall_of_the_engine_says_how_much_it_reaches():
    row = row_of(0.7, half=5.0)
    assert row[5] == "falls short; the engine reaches 0.50 at batch 1 of the MAC-predicted speed-up"


def test_a_shortfall_of_the_engine_names_what_its_layers_lose():
    layers = LayerFacts(
        network="first", subject="half", target="cpu", batch=1, ms=10.0,
        beyond={"memory": 2.0, "look-up": 3.0, "width": 0.01}, columns=("layer",), rows=(("conv1",),), note="as timed",
    )  # fmt: skip
    found = Measured(headlined(0.7), group(half=5.0), {}, {("first", "half", "cpu"): layers})
    headline, table = tables(found)
    assert headline.rows[0][5].endswith(
        "; of its layers' time at batch 1, beyond their MACs: look-ups of channels 30 %, moving memory 20 %"
    )
    assert (table.title, table.rows, table.note) == (
        "Layers: first, half, on cpu at batch 1",
        (("conv1",),),
        "as timed",
    )


def test_a_headline_without_a_figure_is_compared_with_nothing():
    row = row_of(None)
    assert (row[3], row[5]) == ("not given", "nothing to compare with")


def test_the_papers_own_macs_stand_beside_ours():
    assert row_of(0.6, macs_left=0.3)[5] == "reached; the paper's network has 30.00 % of the MACs left, ours 25.00 %"


def test_a_figure_within_the_interval_is_not_called_short():
    suite = headlined(0.74)
    noisy = measured(suite, group(half=2.603))
    found = noisy.comparison("first", "half", "cpu", 1)
    wide = type(found)(**{**found.__dict__, "low": 3.7, "high": 4.0})
    assert 1 - 1 / found.ratio < 0.74
    told = "cannot tell, as the interval includes the figure"
    assert verdict(suite.headlines[0], {1: wide}).startswith(told)
    assert verdict(suite.headlines[0], {1: replace(wide, ratio=3.9)}).startswith(told), "nor is it called reached"
    few = replace(found, low=None, high=None)
    assert verdict(suite.headlines[0], {1: few}).startswith("cannot tell, with too few blocks")


def test_of_two_runs_the_later_counts():
    suite = headlined(0.6)
    rows = headline_table(measured(suite, [*group(half=9.0), *group(run="r2")])).rows
    assert [row[5] for row in rows] == ["reached"]


def test_what_was_not_timed_has_no_row():
    records = [record("dense", 1.0, 100), record("half", 1.0, 25, reason="no GPU")]
    assert headline_table(measured(headlined(0.6), records)).rows == ()


def test_subjects_are_labelled_as_made_from_random_weights():
    facts = SubjectFacts(
        network="first",
        subject="half",
        target="cpu",
        how="one-shot on random weights",
        parity="1e-07",
        macs=25,
        dense_macs=100,
    )
    table = subject_table(measured(small(), group(), [facts]))
    assert table.rows == (("first", "half", "cpu", "one-shot on random weights", "25.00 %", "1e-07"),)
    assert "they say nothing about accuracy" in table.note
    assert "seed 0" in table.note


def test_goals_and_headlines_stand_right_after_the_verdict():
    suite = small(
        goals=[{"forms": ["half"], "of_predicted": 0.9}],
        headlines=[{"source": "A paper", "claim": "half", "network": "first", "forms": ["half"], "timed": "a layer"}],
    )
    facts = SubjectFacts(network="first", subject="half", target="cpu", how="made up")
    found = tables(measured(suite, group(), [facts]))
    assert [(table.title, table.first) for table in found] == [
        ("Goals", True), ("The papers' headlines", True), ("What was measured", False)
    ]  # fmt: skip


def test_tables_without_rows_are_left_out():
    assert tables(measured(small(), group())) == ()


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_the_saving_and_its_interval_hold_the_true_share(share):
    found = measured(headlined(0.1), group(half=10 * (1 - share)))
    (row,) = headline_table(found).rows
    middle, low, high = (
        float(word) for word in row[4].replace("%", "").replace("(", "").replace(")", "").replace("to", "").split()
    )
    assert low <= middle <= high
    assert middle == pytest.approx(100 * share, abs=0.01)
