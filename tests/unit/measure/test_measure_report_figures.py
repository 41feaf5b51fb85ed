"""Labels and ticks of the plots of records: names that are cut stay apart, and no axis goes beyond the whole."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import report_of

from deploy_sparse.measure.figures import accuracy_plots, told_apart
from deploy_sparse.measure.report import render_html


def test_long_names_are_told_apart_where_they_are_cut():
    assert told_apart(["dense", "a" * 12, "a" * 9 + "bcd"], 10) == {
        "dense": "dense", "a" * 12: "…aaa", "a" * 9 + "bcd": "…bcd",
    }  # fmt: skip
    assert told_apart(["resnet-30", "vgg-30-percent"], 10)["vgg-30-percent"] == "vgg-30-pe…"
    both = told_apart([f"{net}-{'a' * 20}-{share}" for net in ("x", "y") for share in (30, 50)], 10)
    assert list(both.values()) == ["1 x-aaaaa…", "2 x-aaaaa…", "3 y-aaaaa…", "4 y-aaaaa…"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab", max_size=30), max_size=20), st.integers(8, 20))
def test_names_that_are_cut_fit_and_differ(names, longest):
    found = told_apart(names, longest)
    assert found.keys() == {*names}
    assert len({*found.values()}) == len(found)
    assert all(len(label) <= longest for label in found.values())
    assert all(found[name] == name for name in names if max(map(len, names)) <= longest)


def test_subjects_with_one_beginning_have_labels_of_their_own(suite):
    forms = tuple(f"channels-in-multiples-of-sixteen-{form}" for form in ("score", "latency", "equal"))
    source = render_html(report_of(suite(("a",), (1, 8), forms, (0.5,))))
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        labels = re.findall(r'<(?:text|tspan) class="name[^>]*>([^<]+)<', svg)
        assert len({*labels}) == len(labels)


def test_no_tick_lies_beyond_the_whole(suite):
    (plot,) = accuracy_plots(report_of(suite(("a",), (1,), ("aligned",), (0.5,), accuracy=1.0)))
    assert max(float(tick.label) for tick in plot.y_ticks) == 100
    assert {point.y for point in plot.points} == {next(t.at for t in plot.y_ticks if float(t.label) == 100)}


def test_points_with_many_names_are_numbered_and_explained(suite):
    report = report_of(suite(networks=("a",), batches=(1,), sparsities=(0.3, 0.5, 0.7, 0.8)))
    source = render_html(report)
    (svg,) = [s for s in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL) if "Accuracy against" in s]
    drawn = re.findall(r'<text class="name over"[^>]*>([^<]*)</text>', svg)
    assert sorted(drawn) == [str(number) for number in range(1, 10)]
    explained = dict(re.findall(r'<tspan class="name">(\d)</tspan> ([^<]+)</text>', svg))
    assert explained["1"] == "dense"
    assert {*explained.values()} == {record.subject for record in report.records}
