"""Configurations are strict, and every message names the key, what it accepts and the nearest name."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from deploy_sparse.config import (
    Config,
    config_from,
    differences,
    flatten,
    keys_of,
    parse_overrides,
    read_toml,
    toml_text,
)
from deploy_sparse.errors import ConfigError


class Fit(Config):
    epochs: int = Field(3, ge=1, description="passes")
    rate: float = Field(0.2, gt=0, lt=1)


class Whole(Config):
    seed: int = 0
    names: tuple[str, ...] = ()
    fit: Fit = Fit()


def test_command_line_beats_file_beats_default():
    made = config_from(Whole, {"seed": 4, "fit": {"epochs": 7}}, parse_overrides(["--fit.epochs", "9"]))
    assert (made.seed, made.fit.epochs, made.fit.rate) == (4, 9, 0.2)


@pytest.mark.parametrize("words", [["--fit.epochs=9"], ["--fit.epochs", "9"]])
def test_overrides_in_both_spellings(words):
    assert parse_overrides(words) == {"fit": {"epochs": "9"}}


def test_lists_and_dashes_in_overrides():
    assert config_from(Whole, parse_overrides(["--names", '["a", "b"]'])).names == ("a", "b")
    assert parse_overrides(["--a-b", "1"]) == {"a_b": "1"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"sed": 1}, r"unknown key 'sed' in f.toml[\s\S]*did you mean 'seed'\?"),
        (
            {"fit": {"epoch": 1}},
            r"unknown key 'fit.epoch'[\s\S]*one of fit.epochs, fit.rate[\s\S]*did you mean 'fit.epochs'\?",
        ),
        ({"fit": {"rate": 1.0}}, r"fit.rate = 1.0 in f.toml[\s\S]*less than 1"),
        ({"fit": {"rate": 0}}, r"fit.rate = 0[\s\S]*greater than 0"),
        ({"fit": {"rate": float("nan")}}, r"fit.rate = nan[\s\S]*a finite number"),
        ({"fit": {"epochs": "many"}}, r"fit.epochs = 'many'[\s\S]*a whole number[\s\S]*--fit.epochs 3"),
        ({"names": "a"}, r"names = 'a'[\s\S]*a list"),
        ({"fit": 3}, r"fit = 3 in f.toml[\s\S]*expected"),
    ],
)
def test_bad_values_name_the_key_and_what_it_accepts(layer, message):
    with pytest.raises(ConfigError, match=message):
        config_from(Whole, layer, source="f.toml")


def test_a_missing_value_and_a_stray_word_are_refused():
    with pytest.raises(ConfigError, match=r"--seed has no value[\s\S]*--seed VALUE"):
        parse_overrides(["--seed"])
    with pytest.raises(ConfigError, match="'seed' is no option"):
        parse_overrides(["seed", "3"])
    with pytest.raises(ConfigError, match="each key given once"):
        parse_overrides(["--fit", "1", "--fit.epochs", "2"])


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(tmp_path / "bad.toml")


def test_keys_carry_type_default_and_description():
    assert keys_of(Whole)["fit.epochs"] == ("int", 3, "passes")


_values = st.recursive(
    st.integers(-(2**40), 2**40)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\ é\n'),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
_names = st.text("abc_", min_size=1, max_size=4)


@given(st.dictionaries(_names, _values | st.dictionaries(_names, _values | st.dictionaries(_names, _values))))
def test_toml_text_round_trips(values):
    assert tomllib.loads(toml_text(values)) == values


def test_differences_list_every_changed_key():
    old, new = {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}}
    assert differences(old, new) == ["b.c: 2 -> 3", "b.d: absent -> 4"]
    assert dict(flatten(new)) == {"a": 1, "b.c": 3, "b.d": 4}
