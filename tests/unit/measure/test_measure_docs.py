"""docs/measuring.md: its Python runs, its commands parse, and it names every field of a record."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from deploy_sparse.cli import profile as verb
from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.compare import MIN_PAIRS, REOPENING, UNSTEADY, compare
from deploy_sparse.measure.interleave import BLOCK_MS, WARMUP_MS
from deploy_sparse.measure.record import Conditions, LatencyRecord

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "measuring.md").read_text()


def test_its_python_runs(capsys):
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/measuring.md", "exec"), {})
    assert "of the MAC-predicted speed-up of 2.00×" in capsys.readouterr().out


def test_every_field_of_a_record_is_explained():
    named = set(re.findall(r"`(\w+)`", TEXT.split("## Records")[1]))
    assert {*LatencyRecord.model_fields, *Conditions.model_fields} <= named


def test_its_options_are_the_verbs():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    verb.configure(parser)
    options = {word for action in parser._actions for word in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= options
    for line in re.findall(r"^deploy-sparse profile (.*)$", TEXT, re.MULTILINE):
        assert parser.parse_args(shlex.split(line)).batch == [1, 32]


def test_its_numbers_are_the_codes():
    assert f"`--warmup` ms ({WARMUP_MS:.0f})" in TEXT
    assert f"blocks of {BLOCK_MS:.0f} ms" in TEXT
    assert f"fewer than {MIN_PAIRS} pairs" in TEXT
    assert f"more than {REOPENING:.0%}".replace("%", " %") in TEXT
    assert f"more than {UNSTEADY:.1%}".replace("%", " %") in TEXT


def test_its_message_is_the_codes(make_record):
    dense, ticket = (
        record.model_copy(update={"conditions": record.conditions.model_copy(update=way)})
        for record, way in (
            (make_record(), {"cache": "warm", "cpus": "0-1"}),
            (make_record("ticket"), {"cache": "cold", "cpus": "0"}),
        )
    )
    with pytest.raises(ConfigError) as caught:
        compare(dense, ticket)
    assert f"error: {caught.value}\n" in TEXT
