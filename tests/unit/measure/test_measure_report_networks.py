"""Reports of suites: several networks, batches, forms and sparsities, in chapters, with curves and nothing hidden."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from report_pages import NASTY, Page, gpu_record, report_of

from deploy_sparse.measure.contents import headlines, main_table, subject_verdicts, verdicts
from deploy_sparse.measure.curves import MOST_OF_A_FORM, speed_up_plots
from deploy_sparse.measure.report import MOST_ROWS_OPEN, render_html, render_markdown
from deploy_sparse.measure.report_conditions import conditions_table
from deploy_sparse.measure.slower import missed, slower, unclear
from deploy_sparse.measure.table import Table, markdown

LATER = {"aligned": 0.8, "unaligned": 0.7, "packed": 0.5}  # of the speed-up that the MACs predict


def test_every_network_has_a_chapter_with_its_own_numbers(suite):
    report = report_of(suite())
    page = Page(render_html(report))
    first, second = page.headings.index("resnet18"), page.headings.index("vgg16")
    assert page.headings[1] == "Verdict"
    assert first < second < page.headings.index("What got slower")
    assert [a["href"] for tag, a in page.tags if tag == "a"][:2] == ["#network-1", "#network-2"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {"network-1", "network-2", "slower", "conditions"} <= ids
    assert len([a for _, a in page.tags if "id" in a]) == len(ids)
    parts = re.split(r"^## ", render_markdown(report), flags=re.MULTILINE)
    chapters = {part.splitlines()[0]: part for part in parts}
    for network, chapter in (("resnet18", report.chapters[0]), ("vgg16", report.chapters[1])):
        assert {record.network for record in chapter.records} == {network}
        assert markdown(Table("", (table := main_table(chapter)).columns, table.rows)) in chapters[network]
        assert "### Results" in chapters[network]
    assert "network" not in main_table(report.chapters[0]).columns
    assert "network" in main_table(report).columns


def test_same_subjects_of_several_networks_keep_their_own_speed_ups(suite):
    records = (*suite(("resnet18",), forms=("unaligned",)), *suite(("vgg16",), forms=("unaligned",), run_id="run-9"))
    report = report_of(records)
    for record in records:
        if record.subject != "dense":
            found = report.comparison_of(record)
            assert (found.run_id, found.subject, found.batch) == (record.run_id, record.subject, record.batch)
            assert report.record_of(found) is record
    assert {report.place_of(group) for group in report.groups} == {
        *("resnet18, cpu, batch 1", "resnet18, cpu, batch 8", "vgg16, cpu, batch 1", "vgg16, cpu, batch 8"),
    }


def test_one_sentence_for_each_network_and_each_model(suite, make_record):
    records = suite(batches=(1, 8), forms=("aligned",))
    slow = next(r for r in records if (r.network, r.subject, r.batch) == ("vgg16", "aligned-0.5", 8))
    same = {
        name: getattr(slow, name) for name in ("batch", "network", "form", "sparsity", "macs", "conditions", "run_id")
    }
    worse = make_record(slow.subject, ms=40.0, **same)
    report = report_of([worse if record is slow else record for record in records])
    first, second = headlines(report)
    assert first.kind == "faster"
    assert re.fullmatch(
        r"resnet18, cpu: 4 compared with dense: 4 faster\. Furthest ahead is aligned-0\.75 at batch \d, [34]\.\d\d× as "
        r"fast \(95 % interval .*\); its MACs predict 4\.00×\.",
        first.text,
    )
    assert second.kind == "mixed"
    assert second.text.startswith("vgg16, cpu: 4 compared with dense: 3 faster, 1 slower. Furthest ahead")
    mixed, fast = subject_verdicts(report.chapters[1])
    assert (mixed.kind, fast.kind) == ("mixed", "faster")
    assert re.fullmatch(
        r"cpu: aligned-0\.5 against dense: faster at batch 1 \(.* to .*\); slower at batch 8 \(0\.\d+×, .* to .*\); its MACs "
        r"predict 2\.00×\.",
        mixed.text,
    )
    for text in (render_html(report), render_markdown(report)):
        assert all(sentence.text in text for sentence in (first, second, mixed, fast))
    assert slower(report) == (
        next(s for s in slower(report) if s.startswith("vgg16, aligned-0.5 on cpu at batch 8: ")),
    )


def test_nothing_faster_is_said_in_the_headline(make_record):
    alike = [make_record(network="a"), make_record("ticket", network="a")]
    (sentence,) = headlines(report_of(alike))
    assert (sentence.kind, sentence.text) == (
        "cannot tell",
        "a, cpu: 1 compared with dense: 1 cannot tell. None is faster.",
    )
    (sentence,) = headlines(report_of([make_record(timed=False, network="a")]))
    assert (sentence.kind, sentence.text) == ("not timed", "a: nothing was compared.")


def test_few_verdicts_are_read_one_by_one_and_many_are_summed_up(suite):
    few = report_of(suite(networks=("a",), forms=("aligned",)))
    assert all(sentence.text in render_markdown(few) for sentence in verdicts(few))
    assert "Furthest ahead" not in render_html(few)
    many = report_of(suite(networks=("a",), batches=(1, 2, 4, 8)))
    assert "Furthest ahead" in render_html(many)
    assert "## Verdicts" in render_markdown(many)


def test_speed_up_over_batch_is_what_was_measured(suite):
    report = report_of(suite(networks=("a",), batches=(8, 1, 32), forms=("aligned",)))
    plot = speed_up_plots(report)[0]
    assert (plot.title, plot.x_label, plot.doubling, plot.reference) == ("Speed-up over batch", "batch size", True, 1.0)
    assert [series.label for series in plot.series] == ["aligned-0.5", "aligned-0.75"]
    assert plot.predicted == "predicted by MACs"
    found = {(c.subject, c.batch): c for c in report.comparisons}
    for series in plot.series:
        own = [found[series.label, batch] for batch in (1, 8, 32)]
        assert series.points == tuple((c.batch, c.ratio) for c in own)
        assert series.intervals == tuple((c.low, c.high) for c in own)
        assert series.predicted == tuple(c.mac_ratio for c in own)


def test_speed_up_over_sparsity_has_a_line_for_each_batch_or_each_form(suite):
    report = report_of(suite(networks=("a",), forms=("aligned",)))
    (plot,) = [plot for plot in speed_up_plots(report) if "sparsity" in plot.title]
    assert [series.label for series in plot.series] == ["batch 1", "batch 8"]
    found = {(c.subject, c.batch): c.ratio for c in report.comparisons}
    assert plot.series[1].points == ((50.0, found["aligned-0.5", 8]), (75.0, found["aligned-0.75", 8]))
    assert plot.series[0].predicted == pytest.approx((2.0, 4.0))
    both = report_of(suite(networks=("a",)))
    plots = [plot for plot in speed_up_plots(both) if "sparsity" in plot.title]
    assert [plot.title for plot in plots] == ["Speed-up over sparsity, batch 1", "Speed-up over sparsity, batch 8"]
    assert [series.label for series in plots[0].series] == ["aligned", "unaligned"]
    lower, upper = plots[0].series[1].known[1][1], plots[0].series[0].known[1][1]
    assert lower == pytest.approx(0.7 * upper, rel=0.03)


def test_subjects_of_one_sparsity_are_not_silently_merged(suite, make_record):
    records = list(suite(networks=("a",), batches=(1,), forms=("aligned",)))
    twin = make_record(
        "aligned-0.5b",
        ms=0.9,
        network="a",
        form="aligned",
        sparsity=0.5,
        run_id="run-0",
        conditions=records[0].conditions,
    )
    names = tuple(record.subject for record in (*records, twin))
    all_of = [
        record.model_copy(update={"conditions": record.conditions.model_copy(update={"interleaved_with": names})})
        for record in (*records, twin)
    ]
    report = report_of(all_of)
    (plot,) = speed_up_plots(report)
    first = next(c for c in report.comparisons if c.subject == "aligned-0.5")
    assert plot.series[0].known[0] == (50.0, first.ratio)
    assert plot.note == "Of several subjects of one sparsity the first is drawn; the table has all."


def test_no_curve_without_two_places_and_many_subjects_share_no_plot(suite):
    single = report_of(suite(networks=("a",), batches=(1,), forms=("aligned",), sparsities=(0.5,)))
    assert speed_up_plots(single) == ()
    many = report_of(suite(networks=("a",), sparsities=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), count=8))
    over_batch = [plot for plot in speed_up_plots(many) if plot.x_label == "batch size"]
    assert [plot.title for plot in over_batch] == [
        f"Speed-up over batch: {form} ({number} of 2)" for form in ("aligned", "unaligned") for number in (1, 2)
    ]
    assert [len(plot.series) for plot in over_batch] == [MOST_OF_A_FORM, 1] * 2
    assert {line.label.split("-")[0] for line in over_batch[0].series} == {"aligned"}


def test_records_without_the_newer_fields_have_no_chapter_and_no_sparsity(make_record):
    report = report_of([make_record(ms=2.0), make_record("ticket")])
    assert report.networks == ("",)
    assert speed_up_plots(report) == ()
    assert not {"network", "form", "sparsity", "precision", "timed with", "run"} & {*main_table(report).columns}
    assert [heading for heading in Page(render_html(report)).headings if heading in ("", "Network not named")] == []
    mixed = report_of([make_record(network="a"), make_record(run_id="run-2")])
    assert "Network not named" in Page(render_html(mixed)).headings
    named = replace(mixed, names=(("run-2", "first run"),))
    assert "first run" in Page(render_html(named)).headings


def test_what_missed_its_prediction_is_listed_furthest_behind_first(suite):
    table = missed(report_of(suite(batches=(1,))))
    assert table.columns == ("subject", "network", "target", "batch", "speed-up", "predicted by MACs", "reached", "why")
    assert [row[0] for row in table.rows] == ["unaligned-0.5", "unaligned-0.75"] * 2  # of equal share, in order
    assert {row[6] for row in table.rows} <= {"69 %", "70 %", "71 %"}
    assert {row[7] for row in table.rows} == {"not known from these records"}
    behind = missed(report_of(suite(("a",), (1,), ("aligned", "unaligned", "packed"), (0.5,), share=LATER)))
    assert [row[0] for row in behind.rows] == ["packed-0.5", "unaligned-0.5", "aligned-0.5"]
    assert table.note.startswith("4 of 8 comparisons reach less than 95 % of what their multiply-accumulates predict.")


def test_interval_that_holds_the_prediction_misses_nothing(make_record):
    """Its median reaches 0.9 of it; so does a pair of too few blocks for an interval, which is told."""
    times = tuple((1.0 if number % 2 else 1.25,) for number in range(20))
    wide = [make_record(blocks=((2.0,),) * 20), make_record("ticket", times, macs=40_551_000 // 2)]
    assert [(c.ratio, c.high) for c in report_of(wide).comparisons] == [(pytest.approx(1.8), 2.0)]
    assert missed(report_of(wide)).rows == ()
    few = [make_record(blocks=((2.0,),) * 2), make_record("ticket", times[:2], macs=40_551_000 // 2)]
    assert [row[0] for row in missed(report_of(few)).rows] == ["ticket"]


def test_reasons_and_tables_of_layers_are_named_where_a_prediction_was_missed(suite, make_record):
    records = suite(networks=("a",), batches=(1,), forms=("unaligned",))
    waited = [record.model_copy(update={"cpu_ms": 0.5 * record.stats.mean}) for record in records]
    (first, _) = missed(report_of(waited)).rows
    assert first[-1].startswith(
        "dense was on the processor for 0.50 of its wall time; the rest it waited; "
        "unaligned-0.5 was on the processor for 0.50 of its wall time; the rest it waited"
    )
    assert "MAC-predicted" not in first[-1]  # the share has a column
    layers = Table("Layers", ("layer", "dense ms", "why"), (("conv1", 1.0, "width"),))
    assert {row[-1] for row in missed(report_of(records, tables=(layers,))).rows} == {"see the tables of layers"}


def test_it_is_said_when_nothing_missed_its_prediction(suite, make_record):
    reached = report_of(suite(networks=("a",), batches=(1,), forms=("aligned",)))
    assert missed(reached).note == (
        "Nothing: the intervals of all 2 comparisons hold 95 % of what their multiply-accumulates predict, or lie above it."
    )
    unknown = report_of([make_record(macs=None, ms=2.0), make_record("ticket", macs=None)])
    assert missed(unknown).note.startswith("Nothing was compared that has fewer multiply-accumulates")
    for report in (reached, unknown):
        assert f"## What missed its MAC-predicted speed-up\n\n{missed(report).note}" in render_markdown(report)
        assert missed(report).note in render_html(report)


def test_a_subject_without_its_baseline_is_told_as_unknown(make_record):
    report = report_of([make_record("ticket", network="a"), make_record(network="b", run_id="run-2")])
    assert unclear(report) == ("ticket on a, cpu, batch 1: dense was not timed beside it.",)
    assert slower(report) == ("Nothing was compared, so nothing is known to be slower.",)


def test_conditions_that_differ_stand_with_what_they_go_along_with(make_record):
    def of(network, batch, run, threads, versions):
        conditions = make_record().conditions.model_copy(update={"threads": threads})
        return make_record(
            network=network,
            batch=batch,
            run_id=run,
            conditions=conditions,
            environment={"python": "3.11", "ort": versions},
        )

    by_network = [of("a", 1, "r1", 1, "1.30"), of("a", 8, "r2", 1, "1.30"), of("b", 1, "r3", 2, "1.31")]
    rows = dict(conditions_table(report_of(by_network)).rows)
    assert rows["python"] == "3.11"
    assert rows["ort"] == "1.30 (a); 1.31 (b)"
    assert rows["threads"] == "1 (a); 2 (b)"
    assert rows["networks"] == "a; b"
    by_batch = [of("a", 1, "r1", 1, "1"), of("a", 8, "r1", 2, "1"), of("b", 1, "r3", 1, "1"), of("b", 8, "r3", 2, "1")]
    assert dict(conditions_table(report_of(by_batch)).rows)["threads"] == "1 (batch 1); 2 (batch 8)"
    by_run = [of("a", 1, "r1", 1, "1"), of("a", 1, "r2", 2, "1"), of("b", 1, "r3", 1, "1")]
    assert dict(conditions_table(report_of(by_run)).rows)["threads"] == "1 (run r1, r3); 2 (run r2)"


def test_many_runs_are_counted_and_not_listed(make_record):
    records = [make_record(run_id=f"run-{number}", network=f"n{number}") for number in range(9, 0, -1)]
    assert dict(conditions_table(report_of(records)).rows)["run"] == "9 runs, from run-1 to run-9"


def test_a_gpus_clock_and_state_are_shown(make_record):
    report = report_of([gpu_record(make_record, "dense", 4.0), gpu_record(make_record, "ticket", 2.0, seed=1)])
    dense, ticket = (dict(zip(main_table(report).columns, row, strict=True)) for row in main_table(report).rows)
    assert dense["GPU p50 ms"] == pytest.approx(0.5 * dense["p50 ms"])
    assert re.fullmatch(r"[12]\.\d\d× \(.* to .*\)", ticket["on the GPU's clock"])
    rows = dict(conditions_table(report).rows)
    assert rows["GPU"] == "NVIDIA H200, driver 580.1, power limit 700 W"
    assert rows["GPU clock"] == "1755 to 1980 MHz, of 1980 MHz at most"
    assert rows["GPU power before and after"] == "300 to 640 W"
    assert rows["GPU temperature before and after"] == "50 °C"
    assert rows["GPU clocks held down by"] == "power cap"


def test_sections_without_a_row_are_left_out(make_record):
    text = render_markdown(report_of([make_record(timed=False, network="a", hashes={})]))
    assert "Spread of the times" not in text
    assert "Made from" not in text


def test_network_without_a_name_has_a_place_among_the_others(make_record):
    report = report_of([make_record(network="a"), make_record(run_id="run-2")])
    assert dict(conditions_table(report).rows)["networks"] == "a; not named"


def html_tables(source):
    tables = []
    for table in re.findall(r"<table.*?</table>", source, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
        tables.append([re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows])
    return tables


def test_markdown_has_every_table_of_the_html_cell_by_cell(suite):
    report = report_of(
        suite(), conditions=(("command", "deploy-sparse bench x"),), tables=(Table("T", ("a", "b"), ((1, 2),)),)
    )
    text = render_markdown(report)
    lines = [
        [cell.strip().replace("\\", "").replace("`", "") for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    tables = html_tables(render_html(report))
    assert len(tables) >= 2 * 2 + 4
    for table in tables:
        for row in table:
            plain = [re.sub(r"</?code>", "", cell).replace("&#39;", "'") for cell in row]
            assert plain in [[cell.strip() for cell in line] for line in lines], row


def test_tables_say_what_their_cells_belong_to(suite):
    source = render_html(report_of(suite()))
    tags = Page(source).tags
    assert {a.get("scope") for tag, a in tags if tag == "th"} == {"row", "col"}
    regions = [a for tag, a in tags if tag == "div" and a.get("class") == "wide"]
    assert regions
    assert all(a["role"] == "region" and a["aria-label"] and a["tabindex"] == "0" for a in regions)
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        title, words = re.search(r'aria-labelledby="(t\d+) (d\d+)"', svg).groups()
        assert re.search(rf'<title id="{title}">[^<]+</title>\n<desc id="{words}">[^<]+</desc>', svg)


def test_long_raw_spread_is_folded_and_short_is_open(suite):
    short = render_html(report_of(suite(networks=("a",))))
    assert "<details open>" in short
    long = render_html(report_of(suite(networks=("a",), batches=(1, 2, 4, 8, 16, 32), sparsities=(0.5, 0.75))))
    assert "<details>\n<summary><h2>Spread of the times" in long
    many = Table("Layers", ("layer",), tuple((f"conv{n}",) for n in range(MOST_ROWS_OPEN + 1)), "All.")
    folded = f'<h2>Layers</h2>\n<p class="note">All.</p><details class="rows">\n<summary>{MOST_ROWS_OPEN + 1} rows'
    report = report_of(suite(networks=("a",)), tables=(many,))
    assert folded in render_html(report)
    few = replace(many, rows=many.rows[:-1])
    assert '<details class="rows">' not in render_html(replace(report, tables=(few,)))


def test_hostile_names_are_shown_and_not_run(suite):
    records = suite(networks=(NASTY, "b"), forms=(NASTY,), precision=NASTY)
    source = render_html(report_of(records))
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "alert"}
    assert NASTY in page.headings
    assert "<script" not in re.sub("`[^`]*`", "", render_markdown(report_of(records)))


def test_two_hundred_records_render_in_two_seconds_and_equal_ones_alike(suite):
    records = suite(("a", "b", "c", "d"), (1, 8, 32), sparsities=tuple(np.linspace(0.1, 0.9, 8)), count=8)
    report = report_of(records)
    assert len(records) == 204
    start = time.process_time()
    source, text = render_html(report), render_markdown(report)
    assert time.process_time() - start < 2.0
    assert (source, text) == (render_html(again := replace(report)), render_markdown(again))
