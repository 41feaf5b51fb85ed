import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.table import (
    Code,
    Table,
    count,
    escape_markdown,
    markdown,
    plain,
    ratio_and_interval,
    significant,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.012345, "0.01235"), (0.0538, "0.05380"), (1.0, "1.000"), (12.345, "12.35"), (1234.5, "1234")),
        *((99999.0, "100000"), (0.0, "0"), (-2.5, "-2.500"), (9.99996, "10.00")),
    ],
)
def test_significant_digits(value, text):
    assert significant(value) == text


@given(st.floats(1e-9, 1e12))
def test_significant_is_close_and_has_no_exponent(value):
    text = significant(value)
    assert float(text) == pytest.approx(value, rel=6e-4)
    assert "e" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (512, "512"), (12_345, "12.35k"), (999_960, "1M"), (272_474, "272.5k"), (40_551_000, "40.55M")),
        *((2_100_000_000, "2.1G"), (5.5e12, "5.5T"), (7.1e15, "7100T"), (None, "–")),
    ],
)
def test_counts(value, text):
    assert count(value) == text


def test_ratio_and_interval_share_their_decimals():
    assert ratio_and_interval(1.841, 1.79, 1.9) == ("1.84×", "1.79 to 1.90")
    assert ratio_and_interval(1.02, 1.004, 1.04) == ("1.020×", "1.004 to 1.040")
    assert ratio_and_interval(12.34, 11.0, 13.0) == ("12.3×", "11.0 to 13.0")


def test_plain_text_aligns_numbers_to_the_right():
    table = Table("t", ("name", "ms"), (("dense", 12.5), ("a longer name", 1.25), ("none", None)), "a note")
    assert plain(table).splitlines() == [
        "name              ms",
        "-------------  -----",
        "dense          12.50",
        "a longer name  1.250",
        "none               –",
        "a note",
    ]


def test_cells_of_every_kind():
    assert Table("t", ("a",) * 5, ((True, 9999, 10_000, 0.5, "x"),)).cells == (("yes", "9999", "10k", "0.5000", "x"),)


@given(st.text(), st.text())
def test_markdown_cells_cannot_break_out(first, second):
    lines = markdown(Table("t", ("a", "b"), ((first, second),))).split("\n")
    assert len(lines) == 4
    unescaped = lines[2].replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == 3
    assert "<" not in lines[2]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a_b *c*  --d", "`a_b *c*  --d`"),
        ("a | b", "`a \\| b`"),
        ("echo `x` ``y``", "``` echo `x` ``y`` ```"),
        ("a\nb", "`a b`"),
        ("", ""),
        ("a\\|b", "a\\\\\\|b"),
    ],
)
def test_code_cells_are_code_spans(text, cell):
    assert markdown(Table("t", ("a",), ((Code(text),),))).splitlines()[2] == f"| {cell} |"


@given(st.text(alphabet="a|\\` \n\r\u2028"))
def test_code_cells_cannot_break_out_either(text):
    lines = markdown(Table("t", ("a",), ((Code(text),),))).splitlines()
    assert len(lines) == 3
    assert re.sub(r"\\.", "", lines[2]).count("|") == 2


def test_markdown_escapes():
    assert escape_markdown("<b>a_b|c*\n`d`") == "&lt;b&gt;a\\_b\\|c\\* \\`d\\`"


def test_row_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"row 2 of the table 'Layers' has 1 cells(.|\n)*2, one for each of: a, b"):
        Table("Layers", ("a", "b"), ((1, 2), (1,)))
