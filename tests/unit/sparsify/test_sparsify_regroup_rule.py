"""A rule that cannot be followed is refused with what to write instead."""

import re

import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.regroup import RegroupRule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "papr"}, "rule = 'papr'\n  expected: one of paper, code, budget\n  next step: did you mean 'paper'? "),
        ({"columns": "taps"}, "columns = 'taps'\n  expected: one of position, channel"),
        ({"blocks": "same"}, "blocks = 'same'\n  expected: one of free, equal, disjoint"),
        ({"tile": 48}, "tile = 48\n  expected: one of 16, 32, 64"),
        ({"empty": "drop"}, "empty = 'drop'\n  expected: one of dense, prune"),
        ({"parts": -1}, "parts = -1\n  expected: 0 or more"),
        ({"min_nonzeros": -2}, "min_nonzeros = -2\n  expected: 0 or more"),
        ({"min_columns": -2}, "min_columns = -2\n  expected: 0 or more"),
        ({"multiple": 0}, "multiple = 0\n  expected: 1 or more"),
        ({"min_rows": 4}, "min_rows = 4\n  expected: 8 or more[\\s\\S]*min_rows = 32, one tile"),
        ({"rule": "budget", "density": 1.2}, "density = 1.2\n  expected: above 0 and at most 1"),
        ({"rule": "code", "ratio": 0.0}, "ratio = 0.0\n  expected: above 0\n  next step: 1.5, the published value"),
        ({"blocks": "disjoint"}, "disjoint blocks of single positions[\\s\\S]*columns = \"channel\""),
        ({"density": 0.5}, "density = 0.5 with rule = 'paper'\n  expected: density only with rule = 'budget'"),
        ({"ratio": 2.0}, "ratio = 2.0 with rule = 'paper'[\\s\\S]*leave ratio out, or choose rule = 'code'"),
        ({"rule": "code", "min_nonzeros": 3}, "min_nonzeros = 3 with rule = 'code'"),
        ({"blocks": "disjoint", "columns": "channel", "multiple": 8}, "multiple = 8 with disjoint blocks"),
        ({"blocks": "disjoint", "columns": "channel", "min_nonzeros": 8}, "min_nonzeros = 8 with disjoint blocks"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given, message):
    with pytest.raises(ConfigError, match=re.escape(message) if "[\\s" not in message else message):
        RegroupRule(**given)


def test_published_values_are_the_defaults():
    rule = RegroupRule()
    assert (rule.rule, rule.columns, rule.blocks, rule.tile, rule.ratio) == ("paper", "position", "free", 32, 1.5)
