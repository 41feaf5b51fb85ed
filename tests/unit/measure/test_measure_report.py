import html
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from report_pages import NASTY, Page

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.compare import compare_all
from deploy_sparse.measure.contents import main_table, untimed_table, verdicts
from deploy_sparse.measure.figures import nice_ticks
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.report import Report, Table, final_table, render_html, render_markdown
from deploy_sparse.measure.table import plain

SECTIONS = [
    *("Verdict", "Results", "Speed-up over batch", "Spread of the times", "IMP rounds", "Compiled, not timed here"),
    *("What got slower", "What missed its MAC-predicted speed-up", "Conditions", "Made from"),
]
PLOTS = ["Accuracy against latency", "Speed-up"]


@pytest.fixture
def records(make_record):
    group = make_record().conditions.model_copy(update={"interleaved_with": ("dense", "ticket", "regroup")})
    timed = [
        make_record(subject, ms=ms, batch=batch, accuracy=accuracy, macs=macs, seed=batch, conditions=group)
        for batch in (1, 8)
        for subject, ms, accuracy, macs in (
            ("dense", 1.0 * batch, 0.9778, 40_000_000),
            ("ticket", 0.5 * batch, 0.9744, 10_000_000),
            ("regroup", 1.25 * batch, None, 8_000_000),
        )
    ]
    return (*timed, make_record("ticket", timed=False, target="rtx-sm89", accuracy=0.9744))


@pytest.fixture
def report(records):
    rounds = Table("IMP rounds", ("round", "density"), ((0, 1.0), (1, 0.8)), "Rewound to epoch 1.")
    return Report(
        "Ticket of resnet20",
        records,
        compare_all(records),
        provenance=("recipe imp_refill, seed 0",),
        tables=(rounds,),
        conditions=(("command", "deploy-sparse profile a b"),),
    )


def test_equal_reports_give_equal_bytes(report):
    again = replace(report, comparisons=compare_all(report.records))
    assert render_html(report) == render_html(again)
    assert render_markdown(report) == render_markdown(again)


def test_sections_stand_in_order(report):
    found = re.findall(r"^## (.*)$", render_markdown(report), flags=re.MULTILINE)
    assert found == SECTIONS
    assert Page(render_html(report)).headings == [report.title, *SECTIONS[:2], *PLOTS, *SECTIONS[3:]]


def test_plots_stand_after_the_extra_tables_and_without_any_nothing_changes(report):
    curves = LinePlot("Density", "epoch", "share", (Series("weights", ((1, 1.0), (2, 0.5))),), "A note.")
    text, source = render_markdown(report), render_html(report)
    drawn = replace(report, plots=(curves,))
    page = Page(render_html(drawn))
    place = SECTIONS.index("IMP rounds") + 1
    assert page.headings == [report.title, *SECTIONS[:2], *PLOTS, *SECTIONS[3:place], "Curves", *SECTIONS[place:]]
    assert "A note." in page.text
    table = (
        "## Density\n\n| epoch | weights |\n| ---: | ---: |\n| 1 | 1.000 |\n| 2 | 0.5000 |\n\nShown: share. A note.\n\n"
    )
    assert render_markdown(drawn) == text.replace(f"## {SECTIONS[place]}", f"{table}## {SECTIONS[place]}")
    assert "Curves" not in source
    assert re.sub(r"<section>\n<h2>Curves.*?</section>\n", "", render_html(drawn), flags=re.DOTALL) == source


@pytest.mark.parametrize("many", [False, True])
def test_tables_that_are_first_stand_right_after_the_verdict(report, make_record, many):
    goals = Table("Goals", ("goal", "met"), (("a", "yes"),) * 30, "29 of 30.", first=True)
    if many:  # a summary, then the chapters
        records = tuple(
            make_record(name, network=network, run_id=network, ms=ms)
            for network in "ab"
            for name, ms in (("dense", 2.0), ("ticket", 1.0))
        )
        report = Report("Report", records, compare_all(records), tables=report.tables)
    drawn = replace(report, tables=(*report.tables, goals))
    headings = Page(render_html(drawn)).headings
    assert headings[1:3] == ["Verdict", "Goals"]
    assert headings.count("Goals") == 1
    assert "<summary>30 rows" not in render_html(drawn), "never folded"
    sections = [line[3:] for line in render_markdown(drawn).splitlines() if line.startswith("## ")]
    assert sections[:2] == ["Verdict", "Goals"]
    assert sections.count("Goals") == 1


def test_tables_of_a_report_without_records_are_all_shown():
    report = Report("Report", (), (), tables=(Table("Goals", ("goal",), (("a",),), first=True),))
    assert "## Goals" in render_markdown(report)
    assert "Goals" in Page(render_html(report)).headings


def test_what_was_not_built_is_told_with_its_reason(make_record):
    records = (
        make_record(), make_record("ticket", timed=False),
        make_record("odd", timed=False, status="not built", reason="no channel can go", engine_bytes=None,
                    build_seconds=None),
    )  # fmt: skip
    report = Report("Report", records, ())
    table = untimed_table(report)
    assert table.title == "Not built or not timed here"
    assert [(row[0], row[2]) for row in table.rows] == [
        ("ticket", "compiled, not timed here: no NVIDIA GPU"), ("odd", "not built: no channel can go")
    ]  # fmt: skip
    text = render_markdown(report)
    assert "1 engine was compiled for cpu and not timed here; no latency is guessed." in text
    assert "1 engine was not built for cpu; the reasons are in the table of what was not timed." in text


def test_one_verdict_for_each_comparison_and_untimed_target(report):
    text = render_markdown(report)
    verdicts = re.search(r"## Verdict\n\n(.*?)\n\n", text, flags=re.DOTALL).group(1).splitlines()
    assert len(verdicts) == 5
    assert re.fullmatch(
        r"- cpu, batch 1: ticket is \d\.\d\d× as fast as dense \(95 % interval \d\.\d\d to \d\.\d\d\); "
        r"its MACs predict 4\.00×\.",
        verdicts[0],
    )
    assert verdicts[1].startswith("- cpu, batch 1: regroup is slower than dense, at 0.8")
    assert verdicts[2].startswith("- cpu, batch 8: ticket is ")
    assert verdicts[4] == "- rtx-sm89: compiled, not timed here: no NVIDIA GPU."


def test_main_table_has_every_timed_record_and_its_numbers(report):
    columns = main_table(report).columns
    rows = [dict(zip(columns, row, strict=True)) for row in Page(render_html(report)).rows if len(row) == len(columns)]
    assert [(row["subject"], row["batch"]) for row in rows] == [
        (subject, batch) for batch in "18" for subject in ("dense", "ticket", "regroup")
    ]
    dense, ticket, regroup = rows[:3]
    assert [dense[name] for name in ("test accuracy", "change, points", "parameters", "MACs", "engine KiB")] == [
        *("97.78 %", "–", "272.5k", "40M", "1066")
    ]
    assert dense["speed-up (95 % interval)"] == "baseline"
    assert ticket["change, points"] == "-0.34"
    assert ticket["predicted by MACs"] == "4.00×"
    assert [regroup["test accuracy"], regroup["change, points"]] == ["–", "–"]
    stats = report.records[0].stats
    for name in ("p50", "p90", "p95", "p99"):
        assert float(dense[f"{name} ms"]) == pytest.approx(getattr(stats, name), rel=1e-3)
    eight = rows[3]["samples/s"]  # eight samples in eight times the time
    assert float(eight) == pytest.approx(float(dense["samples/s"]), rel=0.01)
    assert float(ticket["samples/s"].removesuffix("k")) == pytest.approx(1 / report.records[1].stats.mean, rel=1e-3)


def test_baseline_comes_first_whatever_the_order_of_the_records(make_record):
    records = (make_record("ticket", ms=1.0), make_record(ms=2.0))
    table = final_table(Report("t", records, compare_all(records)))
    assert [row[0] for row in table.rows] == ["dense", "ticket"]


def test_engine_that_was_not_timed_has_no_number_for_a_time(report):
    untimed = [row for row in Page(render_html(report)).rows if len(row) == 5 and row[1] == "rtx-sm89"]
    assert untimed == [["ticket", "rtx-sm89", "compiled, not timed here: no NVIDIA GPU", "1066", "3.25"]]
    assert "rtx-sm89" not in {row[1] for row in final_table(report).rows}


def test_what_got_slower_names_subject_and_reasons(report):
    text = render_markdown(report).split("## What got slower")[1].split("##")[0]
    assert text.count("\n- ") == 2
    assert "regroup on cpu at batch 1: 0.8" in text
    assert "of the MAC-predicted speed-up of 5.00×; does 0.20 of the baseline's multiply-accumulates" in text
    assert "ticket" not in text
    assert "1 engine was compiled for rtx-sm89 and not timed here; no latency is guessed." in render_html(report)


def test_what_got_slower_is_there_when_nothing_did(make_record):
    records = (make_record(ms=2.0), make_record("ticket", ms=1.0))
    nothing = render_markdown(Report("t", records, compare_all(records)))
    assert "## What got slower\n\n- Nothing: no subject was measured slower than its baseline.\n" in nothing
    assert "### What cannot be told\n\n- Everything that was measured here could be told.\n" in nothing
    alike = (make_record(), make_record("ticket"))
    unclear = render_markdown(Report("t", alike, compare_all(alike))).split("## What got slower")[1]
    assert "For 1 of 1 comparisons the data cannot tell." in unclear
    assert "\n- ticket on cpu at batch 1: cannot tell, as the interval includes 1: 1.000× the speed of dense" in unclear
    assert "Nothing was compared" in render_html(Report("t", records[:1], ()))


def test_verdict_that_cannot_tell_says_why(make_record):
    alike = (make_record(), make_record("ticket"))
    report = Report("t", alike, compare_all(alike))
    sentence = (
        "cannot tell ticket from dense, at 1.000× its speed (95 % interval 1.000 to 1.000); its MACs predict 1.00×: "
        "the interval includes 1."
    )
    assert f"- cpu, batch 1: {sentence}\n" in render_markdown(report)
    assert sentence in render_html(report)


def test_too_few_blocks_show_no_interval_anywhere(make_record):
    records = (make_record(ms=9.0, count=3), make_record("ticket", count=3))
    report = Report("t", records, compare_all(records))
    (verdict,) = verdicts(report)
    assert verdict.text == (
        "cpu, batch 1: cannot tell ticket from dense, at 9.00× its speed (too few blocks for an interval); its MACs "
        "predict 1.00×: only 3 paired blocks were timed, fewer than the 8 an interval needs."
    )
    assert final_table(report).rows[1][-2] == "9.00× (too few blocks for an interval), cannot tell"
    for text in (render_markdown(report), render_html(report)):
        assert not re.search(r"95 % interval [\d.]", text)
        assert "ticket on cpu at batch 1: cannot tell, as only 3 paired blocks were timed" in text


def test_command_can_be_copied_from_both(make_record):
    command = "deploy-sparse run imp_refill --config my_config --title 'a  *b* [x|y]' --fit.epochs 3"
    report = Report("t", (make_record(),), (), conditions=(("command", command), ("note", "a_b")))
    text = render_markdown(report)
    assert "| command | `" + command.replace("|", "\\|") + "` |" in text
    assert "| note | a\\_b |" in text
    assert f"<code>{html.escape(command, quote=True)}</code>" in render_html(report).replace("&#34;", "&quot;").replace(
        "&#39;", "&#x27;"
    )
    assert "white-space: pre-wrap" in render_html(report)


def test_everything_is_escaped(make_record):
    conditions = make_record().conditions.model_copy(update={"interleaved_with": ("dense", NASTY)})
    records = tuple(
        make_record(
            subject, ms=ms, accuracy=0.5, conditions=conditions, target=NASTY, environment={NASTY: NASTY},
            hashes={"onnx": NASTY},
        )
        for subject, ms in (("dense", 2.0), (NASTY, 1.0))
    )  # fmt: skip
    untimed = make_record(timed=False, target="x" + NASTY, reason=NASTY)
    report = Report(
        NASTY, (*records, untimed), compare_all(records), (NASTY,), (Table(NASTY, (NASTY,), ((NASTY,),), NASTY),),
        ((NASTY, NASTY), ("command", NASTY)), (LinePlot(NASTY, NASTY, NASTY, (Series(NASTY, ((0, 1),)),), NASTY),),
    )  # fmt: skip
    source = render_html(report)
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags}
    assert NASTY in "".join(page.text)
    assert "<script" not in re.sub("`[^`]*`", "", render_markdown(report))
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_html_is_one_file_without_scripts_or_network(report):
    source = render_html(report)
    tags = Page(source).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [attributes for _, attributes in tags if "src" in attributes]
    assert all(attributes["href"].startswith("#") for _, attributes in tags if "href" in attributes)
    assert not re.search(r"https?:|url\(|@import", source)
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_plots_mark_the_baseline_and_stay_inside(report):
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", render_html(report), flags=re.DOTALL)]
    assert len(plots) == 5  # accuracy and distribution for two batch sizes, and speed-up over them
    for accuracy in plots[:2]:
        assert len(accuracy.findall("rect[@class='base']")) == 1
        assert len(accuracy.findall("circle[@class='dot']")) == 1  # regroup has no known accuracy
    for strips in plots[3:]:
        assert len(strips.findall("path")) == 3
        marks = [float(x) for path in strips.findall("path") for x in re.findall(r"M([\d.]+) ", path.get("d"))]
        assert len(marks) == 3 * 99
        assert 0 < min(marks) <= max(marks) < 420
    assert "Not shown, as their accuracy was not given: regroup." in render_html(report)


def test_long_names_are_shortened_in_plots_only(make_record):
    name = "a-very-long-subject-name-" * 4
    record = make_record(name, baseline=name, accuracy=0.9)
    source = render_html(Report("t", (record,), ()))
    svgs = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(svgs) == 2
    drawn = [re.sub(r"<desc.*?</desc>", "", svg) for svg in svgs]
    assert all(name not in svg and re.search(r"a-very-long-subject-nam.*…", svg) for svg in drawn)
    assert f">{name}</th>" in source
    assert all(name in desc for desc in re.findall(r"<desc.*?</desc>", source))


def test_no_accuracy_and_no_times_are_said_not_drawn(make_record):
    source = render_html(Report("t", (make_record(timed=False),), ()))
    assert "<svg" not in source
    assert "no timed subject has a known accuracy" in source
    assert "Nothing was timed here." in source


def test_conditions_hold_versions_threads_date_and_command(report):
    rows = {row[0]: row[1] for row in Page(render_html(report)).rows if len(row) == 2}
    assert rows["python"] == "3.11"
    assert rows["threads"] == "1"
    assert rows["date"] == "2026-11-21 09:00 UTC"
    assert rows["targets"] == "cpu (onnxruntime); rtx-sm89 (onnxruntime)"
    assert rows["command"] == "deploy-sparse profile a b"
    assert rows["timing"].startswith("warm-up 200 ms, then blocks of 50 ms in turns, for at least 1.25 s and 10 calls")


def test_runs_that_measured_the_same_are_told_apart(make_record):
    records = tuple(
        make_record(subject, ms=ms, run_id=run)
        for run in ("run-1", "run-2")
        for subject, ms in (("dense", 2.0), ("ticket", 1.0))
    )
    text = render_markdown(Report("t", records, compare_all(records)))
    assert "cpu, batch 1, run run-1: ticket is" in text
    assert "cpu, batch 1, run run-2: ticket is" in text


def test_final_table_compares_dense_and_ticket(report):
    text = plain(final_table(report))
    assert re.search(
        r"^ticket +cpu +1 +97\.44 % +272\.5k +10M +0\.50\d\d +0\.50\d\d +\d\.\d\d× \(.* to .*\)", text, re.M
    )


def test_comparison_without_its_record_is_refused(records):
    with pytest.raises(ConfigError, match="'ticket' at batch 1 is compared but has no timed record here"):
        Report("t", records[:1], compare_all(records))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0371), (96.8, 98.1), (0, 12345), (97.2, 97.7)])
def test_ticks_are_round_inside_and_several(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert low <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-9)
