"""The records of several runs, put together for each device."""

import pytest
from report_pages import gpu_record

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.device_report import Source, device_of, device_reports, file_names
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.table import Table


def pair(make_record, run, **changes):
    return make_record(ms=2.0, run_id=run, **changes), make_record("ticket", run_id=run, **changes)


def on_other(make_record, run):
    return pair(make_record, run, environment={"processor": "another processor"})


def test_runs_of_one_device_share_a_report(make_record):
    first, second = (Source(name, pair(make_record, name)) for name in ("one", "two"))
    (device,) = found = device_reports([first, second])
    report = found[device]
    assert device == "a processor"
    assert report.title == "Latency on a processor"
    assert report.records == (*first.records, *second.records)
    assert len(report.comparisons) == 2
    assert report.networks == ("one", "two")  # as the records do not say
    assert report.provenance == ("4 records from 2 sources: one, two",)


def test_networks_that_records_name_are_kept(make_record):
    sources = [Source("x", pair(make_record, "1", network="resnet18")), Source("y", pair(make_record, "2"))]
    (report,) = device_reports(sources).values()
    assert report.networks == ("resnet18", "y")


def test_a_single_source_keeps_what_it_says(make_record):
    table, plot = Table("T", ("a",), ((1,),)), LinePlot("P", "x", "y", (Series("s", ((0, 1.0),)),))
    source = Source("one", pair(make_record, "1"), ("Ticket abc",), (table,), (("command", "c"),), (plot,))
    (report,) = device_reports([source], "Mine").values()
    assert (report.title, report.provenance, report.names) == ("Mine", ("Ticket abc",), ())
    assert (report.tables, report.conditions, report.plots) == ((table,), (("command", "c"),), (plot,))


def test_tables_of_several_sources_say_whose_they_are(make_record):
    table = Table("Layers", ("layer",), (("conv1",),))
    sources = [
        Source(name, pair(make_record, name), tables=(table,), conditions=(("command", name), ("note", "text")))
        for name in ("one", "two")
    ]
    (report,) = device_reports(sources).values()
    assert [found.title for found in report.tables] == ["one: Layers", "two: Layers"]
    assert report.conditions == (
        *(("command", "one"), ("note", "text (one)")),
        *(("command", "two"), ("note", "text (two)")),
    )


def test_every_device_has_its_own_report_with_the_tables_made_on_it(make_record):
    table = Table("Layers", ("layer",), (("conv1",),))
    here = Source("here", pair(make_record, "1"), tables=(table,))
    there = Source("there", on_other(make_record, "2"))
    both = Source("both", (*pair(make_record, "3"), *on_other(make_record, "4")), tables=(table,))
    reports = device_reports([here, there, both])
    assert list(reports) == ["a processor", "another processor"]
    first, second = reports.values()
    assert [record.run_id for record in first.records] == ["1", "1", "3", "3"]
    assert [record.run_id for record in second.records] == ["2", "2", "4", "4"]
    assert [found.title for found in first.tables] == ["here: Layers"]
    assert second.tables == ()


def test_a_gpu_is_the_device_of_what_ran_on_it_and_of_what_was_compiled_beside(make_record):
    timed = (gpu_record(make_record, "dense", 2.0), gpu_record(make_record, "ticket", 1.0))
    compiled = make_record("ticket", timed=False, target="rtx-sm89")
    assert device_of(timed[0]) == "NVIDIA H200"
    (device,) = found = device_reports([Source("one", (compiled, *timed))])
    assert device == "NVIDIA H200"
    assert len(found[device].records) == 3
    assert list(device_reports([Source("one", (compiled,))])) == ["a processor"]


def test_a_gpu_without_a_name_is_not_taken_for_the_processor(make_record):
    dense, ticket = (
        record.model_copy(update={"conditions": record.conditions.model_copy(update={"cuda_graph": True})})
        for record in pair(make_record, "1", target="torch-cuda", runtime="torch")
    )
    alone = pair(make_record, "2", target="tensorrt", runtime="tensorrt")
    reports = device_reports([Source("one", (dense, ticket, *alone)), Source("two", pair(make_record, "3"))])
    assert {device: len(report.records) for device, report in reports.items()} == {
        "a GPU beside a processor": 4,
        "a processor": 2,
    }


def test_a_record_given_twice_counts_once_and_two_different_ones_are_refused(make_record):
    records = pair(make_record, "1")
    (report,) = device_reports([Source("one", records), Source("copy", records)]).values()
    assert report.records == records
    assert report.networks == ("one",)
    other = (records[0], make_record("ticket", ms=3.0, run_id="1"))
    with pytest.raises(ConfigError, match=r"one and two hold different records of 'ticket' at batch 1 on cpu of run 1"):
        device_reports([Source("one", records), Source("two", other)])


def test_nothing_to_report_is_refused():
    with pytest.raises(ConfigError, match="no record to report"):
        device_reports([Source("one", ())])


def test_files_are_named_after_their_devices_and_none_is_overwritten():
    assert file_names(["AMD EPYC, 2 cores", "NVIDIA H200", "nvidia h200", "../x", "∅"]) == {
        "AMD EPYC, 2 cores": "amd-epyc-2-cores",
        "NVIDIA H200": "nvidia-h200",
        "nvidia h200": "nvidia-h200-2",
        "../x": "x",
        "∅": "device",
    }
