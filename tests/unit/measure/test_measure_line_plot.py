"""Plots of series: what their table says, where their lines stand, and that no two lines look alike."""

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.figures import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from deploy_sparse.measure.line_figure import COLOURS, DASHES, LONGEST_NAME, MARKERS, line_figure
from deploy_sparse.measure.line_plot import LinePlot, Series, predicted_lines, values_table
from deploy_sparse.measure.report import Report, render_html


def plot(*series, **changes):
    named = tuple(Series(f"series {number}", tuple(points)) for number, points in enumerate(series))
    return replace(LinePlot("A title", "epoch", "a share", named), **changes)


def corners(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_a_short_plot_is_told_whole():
    table = values_table(plot([(1, 0.5), (2, None)], [(1, 1.0), (2, 0.123456)], note="A note."))
    assert table.title == "A title"
    assert table.columns == ("epoch", "series 0", "series 1")
    assert table.cells == (("1", "0.5000", "1.000"), ("2", "–", "0.1235"))
    assert table.note == "Shown: a share. A note."


def test_a_long_plot_is_told_by_eight_points_first_and_last_among_them():
    table = values_table(plot([(step, step / 7) for step in range(0, 200_001, 1000)]))
    assert [row[0] for row in table.cells] == ["0", "29000", "57000", "86000", "114000", "143000", "171000", "200000"]
    assert float(table.cells[3][1]) == pytest.approx(86_000 / 7, rel=1e-3)
    assert table.note == "Shown: a share. 8 of 201 points."


def test_rows_stand_where_every_series_has_a_point():
    often, seldom = [(x, 1.0 * x) for x in range(20)], [(x, 2.0 * x) for x in (0, 10, 19)]
    assert [row[0] for row in values_table(plot(often, seldom)).cells] == ["0", "10", "19"]
    apart = values_table(plot([(0.5, 1.0), (2, 1.0)], [(1.25, 3.0), (3, 3.0)]))
    assert apart.cells == (("0.5000", "1.000", "–"), ("1.250", "–", "3.000"), ("2", "1.000", "–"), ("3", "–", "3.000"))


def test_lines_stand_on_the_scale_of_their_axes():
    figure = line_figure(plot([(0, 0.0), (50, 0.5), (100, 1.0)], [(0, 1.0), (100, 1.0)]))
    rising, flat = (corners(line.path) for line in figure.lines)
    (left, bottom), (middle, centre), (right, top) = rising
    assert (left, middle, right) == (LEFT, (LEFT + RIGHT) / 2, RIGHT)
    assert bottom == BOTTOM
    assert TOP < top < centre == pytest.approx((bottom + top) / 2, abs=0.1)
    assert {y for _, y in flat} == {top}
    assert [tick.label for tick in figure.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    ticks = {tick.label: tick.at for tick in figure.y_ticks}
    assert list(ticks) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert (ticks["0.0"], ticks["1.0"]) == (bottom, top)


def test_an_unknown_value_leaves_a_gap_and_a_point_alone_is_marked():
    series = [(x, None if x in (8, 10, 12) else 1.0) for x in range(1, 21)]
    (line,) = line_figure(plot(series)).lines
    assert line.path.count("M") == 4
    assert len(corners(line.path)) == 17
    marks = [x for x, _ in corners(line.markers)]
    alone = [LEFT + (x - 1) / 19 * (RIGHT - LEFT) for x in (9, 11)]
    assert all(any(abs(mark - x) < 0.1 for mark in marks) for x in alone)
    assert len(marks) < 17


def test_long_lines_have_few_markers_and_alike_ones_not_the_same():
    points = [(x, 0.1) for x in range(160)]
    figure = line_figure(plot(points, points, points))
    places = [{x for x, _ in corners(line.markers)} for line in figure.lines]
    assert all(5 <= len(found) <= 6 for found in places)
    assert not places[0] & places[1]
    assert not places[1] & places[2]
    assert all(len(corners(line.path)) == 160 for line in figure.lines)


def test_thirty_lines_are_told_apart_without_colour():
    figure = line_figure(plot(*[[(0, 1.0), (1, 2.0)]] * 30))
    shapes = [re.sub(r"^M[-\d.]+ [-\d.]+", "", line.sample) for line in figure.lines]
    assert len(set(MARKERS)) == len(MARKERS)
    assert len({(shape, line.dash) for shape, line in zip(shapes, figure.lines, strict=True)}) == 30
    assert {line.colour for line in figure.lines} == set(range(COLOURS))
    heights = [line.y for line in figure.lines]
    assert heights == sorted(set(heights))
    assert heights[-1] < figure.height


def test_every_style_that_lines_have_is_in_the_page(make_record):
    source = render_html(Report("t", (make_record(),), (), plots=(plot(*[[(0, 1.0), (1, 2.0)]] * 6),)))
    for colour in range(COLOURS):
        assert f"svg .l{colour} {{ stroke: var(--l{colour}); }}" in source
        assert source.count(f"--l{colour}: #") == 3  # light, dark, print
    assert all(f"svg .d{dash} {{ stroke-dasharray:" in source for dash in range(1, DASHES))
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)]
    (drawn,) = [svg for svg in figures if svg.find("title").text == "A title"]
    assert drawn.get("role") == "img"
    assert [path.get("class") for path in drawn.findall("path[@class]")][:6] == [
        f"line l{number} d{number % DASHES}" for number in range(6)
    ]
    assert {"series 0", "series 5", "epoch", "a share"} <= {text.text for text in drawn.findall("text")}


def test_the_summary_says_in_words_what_the_picture_shows():
    figure = line_figure(plot([(1, None), (2, 0.5), (200_000, 0.1)], [(1, None)]))
    assert figure.summary == (
        "A title: a share against epoch. series 0 from 0.5000 at 2 to 0.1000 at 200000; series 1 unknown."
    )
    assert [line.label for line in figure.lines] == ["series 0", "series 1 (not known)"]
    assert figure.lines[1].path == figure.lines[1].markers == ""


@pytest.mark.parametrize("empty", [plot(), plot([]), plot([(1, None)])])
def test_without_a_known_value_it_is_said_not_drawn(empty, make_record):
    source = render_html(Report("t", (make_record(timed=False),), (), plots=(replace(empty, note="Why."),)))
    assert "<svg" not in source
    assert "There is no plot: no value is known." in source
    assert "Why." in source
    values_table(empty)


def test_long_names_are_shortened_in_the_picture_only(make_record):
    name = "a-very-long-series-name-" * 4
    long = LinePlot("t", name, name, (Series(name, ((0, 1.0),)),))
    figure = line_figure(long)
    assert {len(figure.x_label), len(figure.y_label), len(figure.lines[0].label)} == {LONGEST_NAME}
    assert name in figure.summary
    assert values_table(long).columns == (name, name)


@pytest.mark.parametrize(
    ("points", "labels"),
    [
        ([(1, 1.0), (2, 1.0), (3, 1.0)], ["1", "2", "3"]),  # no half epochs
        ([(0.0, 1.0), (0.5, 1.0)], ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        ([(0, 1.0), (200_000, 1.0)], ["0", "50k", "100k", "150k", "200k"]),
        ([(0, 1.0), (0.00005, 1.0)], ["0", "1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
        ([(7, 1.0)], ["7"]),
    ],
)
def test_ticks_are_labelled_with_the_digits_they_need(points, labels):
    assert [tick.label for tick in line_figure(plot(points)).x_ticks] == labels


def test_values_equal_but_for_rounding_make_a_flat_line():
    for value in (0.0, 0.1, 5e8, -3.0):
        figure = line_figure(plot([(0, value), (1, value * (1 + 1e-15))]))
        assert len({y for _, y in corners(figure.lines[0].path)}) == 1
        assert len({tick.label for tick in figure.y_ticks}) == len(figure.y_ticks) >= 2
        assert max(len(tick.label) for tick in figure.y_ticks) <= 6


def test_points_that_make_no_line_are_refused():
    for number in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"'loss' holds a number that is not finite[\s\S]*give None"):
            Series("loss", ((1, number),))
    for points in (((2, 1.0), (1, 1.0)), ((1, 1.0), (1, None))):
        with pytest.raises(ConfigError, match="'loss' does not ascend"):
            Series("loss", points)


NUMBERS = st.floats(-1e9, 1e9)
POINTS = st.lists(st.tuples(NUMBERS, st.none() | NUMBERS), max_size=30, unique_by=lambda p: p[0]).map(
    lambda points: sorted(points, key=lambda point: point[0])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(POINTS, max_size=4))
def test_everything_stays_inside_whatever_the_numbers(series):
    drawn = plot(*series)
    figure = line_figure(drawn)
    assert len(values_table(drawn).rows) <= 8
    known = [found.known for found in drawn.series]
    if not any(known):
        assert figure.lines == ()
        return
    for line, found in zip(figure.lines, known, strict=True):
        places = corners(line.path)
        assert len(places) == len(found)
        assert set(corners(line.markers)) <= set(places)
        assert bool(line.markers) == bool(found)
        for x, y in places:
            assert LEFT <= x <= RIGHT
            assert TOP <= y <= BOTTOM
    assert figure.x_ticks
    assert figure.y_ticks
    assert all(LEFT <= tick.at <= RIGHT for tick in figure.x_ticks)
    assert all(TOP <= tick.at <= BOTTOM for tick in figure.y_ticks)
    assert figure.height > max(line.y for line in figure.lines)
    assert WIDTH > RIGHT


SPEED_UPS = LinePlot(
    "Speed-up over batch",
    "batch size",
    "times",
    (
        Series("a", ((1, 1.8), (8, 2.0), (32, 2.2)), ((1.7, 1.9), None, (2.1, 2.3)), (3.0, 3.0, 3.0)),
        Series("b", ((1, 0.9), (8, None), (32, 1.5)), ((0.8, 1.0), None, (1.4, 1.6)), (4.0, 4.0, 4.0)),
    ),
    predicted="predicted by MACs",
    reference=1.0,
    doubling=True,
)


def test_whiskers_reach_from_low_to_high_and_stand_at_their_point():
    figure = line_figure(SPEED_UPS)
    first = figure.lines[0]
    (x, y), _, (last, _) = corners(first.path)
    stems = [tuple(map(float, found)) for found in re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", first.whiskers)]
    assert [stem[0] for stem in stems] == [x, last]  # none where no interval is known
    low, high = stems[0][1:]
    assert high < y < low
    per_unit = (low - high) / 0.2  # from 1.7 to 1.9
    assert (figure.reference - y) / per_unit == pytest.approx(0.8, rel=0.02)  # from 1 to 1.8
    assert first.whiskers.count("h") == 4


def test_batches_stand_at_equal_steps_of_doubling_and_lines_side_by_side():
    figure = line_figure(SPEED_UPS)
    ticks = {tick.label: tick.at for tick in figure.x_ticks}
    assert list(ticks) == ["1", "8", "32"]
    assert (ticks["8"] - ticks["1"]) / (ticks["32"] - ticks["8"]) == pytest.approx(3 / 2, rel=0.01)
    assert ticks["1"] > LEFT
    assert ticks["32"] < RIGHT
    a, b = ([x for x, _ in corners(line.path)] for line in figure.lines)
    assert a[0] < ticks["1"] < b[0]
    many = line_figure(replace(SPEED_UPS, series=(Series("a", tuple((2**n, 1.0) for n in range(12))),)))
    assert len(many.x_ticks) <= 8


def test_predictions_are_dashed_and_end_in_their_lines_marker():
    figure = line_figure(SPEED_UPS)
    assert {line.dash for line in figure.lines} == {0}
    assert [prediction.colour for prediction in figure.predictions] == [0, 1]
    for number, prediction in enumerate(figure.predictions):
        assert len({y for _, y in corners(prediction.path)}) == 1
        assert prediction.marker.endswith(MARKERS[number])
    assert figure.predicted_y > figure.lines[-1].y
    assert figure.height > figure.predicted_y
    values = [y for prediction in figure.predictions for _, y in corners(prediction.path)]
    assert all(TOP <= y <= BOTTOM for y in values)


def test_one_prediction_of_all_lines_is_drawn_once():
    same = tuple(replace(series, predicted=(2.0, 2.5, 3.0)) for series in SPEED_UPS.series)
    shared = replace(SPEED_UPS, series=same)
    assert predicted_lines(shared) == ((None, ((1, 2.0), (8, 2.5), (32, 3.0))),)
    (only,) = line_figure(shared).predictions
    assert (only.colour, only.marker) == (None, "")
    assert predicted_lines(replace(SPEED_UPS, series=same[:1])) == ((0, same[0].expected),)


def test_predictions_at_places_of_their_own_stay_apart():
    """A steep line between the points of two forms would be nobody's prediction."""
    forms = (
        Series("aligned", ((46, 1.7), (88, 5.6)), predicted=(1.8, 5.7)),
        Series("any width", ((50, 1.5), (90, 5.0)), predicted=(2.0, 9.3)),
    )
    apart = predicted_lines(replace(SPEED_UPS, series=forms))
    assert apart == ((0, ((46, 1.8), (88, 5.7))), (1, ((50, 2.0), (90, 9.3))))
    inside = (forms[0], Series("some", ((88, 5.0),), predicted=(5.7,)))
    assert predicted_lines(replace(SPEED_UPS, series=inside)) == ((None, ((46, 1.8), (88, 5.7))),)


def test_values_stand_with_their_intervals_and_predictions():
    table = values_table(SPEED_UPS)
    assert table.columns == ("batch size", "a", "b", "a, predicted by MACs", "b, predicted by MACs")
    assert table.cells == (
        ("1", "1.800 (1.700 to 1.900)", "0.9000 (0.8000 to 1.000)", "3.000", "4.000"),
        ("8", "2.000", "–", "3.000", "4.000"),
        ("32", "2.200 (2.100 to 2.300)", "1.500 (1.400 to 1.600)", "3.000", "4.000"),
    )
    assert table.note == "Shown: times. In brackets: the 95 % interval."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intervals": ((0.0, 1.0),)}, "'a' has 2 points and 1 intervals"),
        ({"predicted": (1.0, 2.0, 3.0)}, "'a' has 2 points and 3 predictions"),
        ({"intervals": ((0.0, math.inf), None)}, "not finite"),
        ({"predicted": (math.nan, None)}, "not finite"),
    ],
)
def test_intervals_and_predictions_fit_their_points(changes, message):
    with pytest.raises(ConfigError, match=message):
        Series("a", ((0, 1.0), (1, 2.0)), **changes)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 50), st.floats(0, 5), st.floats(0, 5), st.floats(0.1, 60)), min_size=1, max_size=6
    ),
    st.booleans(),
)
def test_everything_of_a_curve_stays_inside_its_figure(values, doubling):
    points = tuple((2.0**n, y) for n, (y, *_) in enumerate(values))
    bounds = tuple((max(y - down, 0.0), y + up) for y, down, up, _ in values)
    series = Series("a", points, bounds, tuple(p for *_, p in values))
    figure = line_figure(replace(SPEED_UPS, series=(series, replace(series, label="b")), doubling=doubling))
    marks = [place for line in figure.lines for place in corners(line.path + line.whiskers)]
    marks += [place for prediction in figure.predictions for place in corners(prediction.path)]
    assert all(LEFT - 10 <= x <= RIGHT + 10 <= WIDTH for x, _ in marks)
    assert all(TOP - 1 <= y <= BOTTOM + 1 for _, y in marks)
