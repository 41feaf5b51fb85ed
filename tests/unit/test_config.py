"""Configurations are strict, and every message names the key, what it accepts and the nearest name."""

import json
import subprocess
import sys
import tomllib
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

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


class Late(Config):
    sparsity: float | None = Field(None, description="share that goes")
    until: float = 0.8


class Tabled(Whole):
    channels: Late = Late()
    arguments: dict[str, Any] = Field({})


class Listed(Config):
    parts: tuple[Late, ...] = ()


class Many(Config):
    tile: Literal[16, 32] = 32
    kind: Literal["16", "auto"] | None = None
    name: str = "a"
    on: bool = False
    limit: int | None = None
    counts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    words: tuple[str, ...] = ()
    rates: tuple[float, ...] | None = None
    arguments: dict[str, Any] = Field({})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tile", "16"], {"tile": 16}),
        (["--kind", "16"], {"kind": "16"}),
        (["--name", "16"], {"name": "16"}),
        (["--name=true"], {"name": "true"}),
        (["--on", "true"], {"on": True}),
        (["--limit", "4"], {"limit": 4}),
        (["--arguments.classes", "12"], {"arguments": {"classes": 12}}),
        (["--arguments.rate=0.5"], {"arguments": {"rate": 0.5}}),
        (["--arguments.on", "true"], {"arguments": {"on": True}}),
        (["--arguments.blocks", "[1, 2]"], {"arguments": {"blocks": [1, 2]}}),
        (["--arguments.deep.shortcut", "pad"], {"arguments": {"deep": {"shortcut": "pad"}}}),
        (["--arguments.code", '"12"'], {"arguments": {"code": "12"}}),
        (["--arguments.day", "2020-01-01"], {"arguments": {"day": "2020-01-01"}}),
        (["--arguments.text", "1\nb = 2"], {"arguments": {"text": "1\nb = 2"}}),
        (["--arguments.rate", "nan"], {"arguments": {"rate": "nan"}}),
    ],
)
def test_text_of_the_command_line_becomes_what_the_field_holds(words, expected):
    made = config_from(Many, parse_overrides(words))
    assert made.model_dump() == Many(**expected).model_dump()
    for value in made.arguments.values():
        assert type(value) in (int, float, bool, list, dict, str)


def test_text_in_a_file_stays_text():
    assert config_from(Many, {"arguments": {"code": "12"}}).arguments == {"code": "12"}
    with pytest.raises(ConfigError, match="tile = '16'"):
        config_from(Many, {"tile": "16"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile", "17"], r"tile = 17 [\s\S]*expected: 16 or 32"),
        (["--tile", "big"], r"tile = 'big'"),
        (["--counts", "3"], r"a list[\s\S]*--counts '\[1, 2\]'"),
        (["--words", "cpu"], r"a list[\s\S]*--words '\[\"cpu\"\]'"),
        (["--rates", "0.1"], r"a list[\s\S]*--rates '\[0.1, 0.2\]'"),
        (["--counts", '["a"]'], r"counts.0 = 'a'[\s\S]*a whole number[\s\S]*--counts '\[1, 2\]'"),
    ],
)
def test_refused_text_gets_an_example_of_the_fields_own_type(words, message):
    with pytest.raises(ConfigError, match=message):
        config_from(Many, parse_overrides(words), source="the command line")


def recipe_configs():
    from deploy_sparse.cli.catalog import load_recipe, recipes

    return {name: load_recipe(recipe).RecipeConfig for name, recipe in recipes().items()}


def test_every_default_of_every_recipe_can_be_said_on_the_command_line():
    for name, kind in recipe_configs().items():
        plain, keys = kind(), keys_of(kind)
        given = {key: value for key, (_, value, _) in keys.items() if value is not None}  # TOML has no null
        assert given, name
        for key, value in given.items():
            text = value if isinstance(value, str) else json.dumps(value)
            assert config_from(kind, parse_overrides([f"--{key}", text])) == plain, (name, key)
        words = [w for k, v in given.items() for w in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]
        assert config_from(kind, parse_overrides(words)) == plain, name


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


TOP = "one of seed, names, arguments, or a key of fit, channels"
FIT, CHANNELS = "one of fit.epochs, fit.rate", "one of channels.sparsity, channels.until"


@pytest.mark.parametrize(
    ("key", "expected", "meant"),
    [
        ("channel.sparsity", CHANNELS, "channels.sparsity"),
        ("chanels.sparsty", CHANNELS, "channels.sparsity"),
        ("sparsity", CHANNELS, "channels.sparsity"),
        ("channel.wholly_unlike", CHANNELS, "channels"),
        ("channnels", CHANNELS, "channels"),
        ("fit.sparsity", CHANNELS, "channels.sparsity"),
        ("fit.epoch", FIT, "fit.epochs"),
        ("epochs", FIT, "fit.epochs"),
        ("fit.wholly_unlike", FIT, None),
        ("fit.seed", TOP, "seed"),
        ("argument.classes", TOP, "arguments"),
        ("wholly_unlike", TOP, None),
        ("wholly.unlike.this", TOP, None),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_one_and_its_table(key, expected, meant):
    with pytest.raises(ConfigError) as problem:
        config_from(Tabled, parse_overrides([f"--{key}", "3"]), source="the command line")
    hint = f"did you mean '{meant}'? " if meant else ""
    assert (problem.value.given, problem.value.expected, problem.value.fix) == (
        f"unknown key '{key}' in the command line",
        expected,
        f"{hint}mend the key",
    )


def test_an_unknown_table_without_keys_and_an_unknown_key_in_a_list_are_refused():
    with pytest.raises(ConfigError, match=r"unknown key 'channel' in[\s\S]*did you mean 'channels'\?"):
        config_from(Tabled, {"channel": {}})
    with pytest.raises(ConfigError, match=r"unknown key 'parts.0.untl' in[\s\S]*did you mean 'parts.until'\?"):
        config_from(Listed, {"parts": [{"untl": 0.5}]})


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
    | st.text('ab"\\ é\n\x7f\x00\U0001f3ab', max_size=6),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
_names = st.text("abc_", min_size=1, max_size=4) | st.text("a. +/[]\"'=#é\U0001f3ab", max_size=4)


@given(st.dictionaries(_names, _values | st.dictionaries(_names, _values | st.dictionaries(_names, _values))))
def test_toml_text_round_trips(values):
    assert tomllib.loads(toml_text(values)) == values


def test_toml_text_writes_what_is_not_set_as_comments_when_asked():
    values = {"a": None, "b": 1, "c": {"d": None, "e": {"f": 2, "g": None}}}
    text = toml_text(values, unset=True)
    assert text.split("\n") == ["# a = …", "b = 1", "", "[c]", "# d = …", "", "[c.e]", "f = 2", "# g = …", ""]
    assert tomllib.loads(text) == tomllib.loads(toml_text(values)) == {"b": 1, "c": {"e": {"f": 2}}}
    assert "…" not in toml_text(values)


def test_differences_list_every_changed_key():
    old, new = {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}}
    assert differences(old, new) == ["b.c: 2 -> 3", "b.d: absent -> 4"]
    assert dict(flatten(new)) == {"a": 1, "b.c": 3, "b.d": 4}


class Range(Config):
    low: int = 1
    high: int = 2

    @model_validator(mode="after")
    def _ordered(self):
        if self.low > self.high:
            raise ValueError("low <= high")
        return self


class Paired(Config):
    seed: int = 0
    by: Range = Range()
    ways: tuple[Range, ...] = ()
    only: bool = False

    @model_validator(mode="after")
    def _fits(self):
        if self.only and self.seed:
            raise ValueError("seed only without only")
        return self


@pytest.mark.parametrize(
    ("values", "given", "expected", "fix"),
    [
        ({"seed": 3, "only": True}, "the file has keys that do not go together", "seed only without only",
         "change one of them"),
        ({"by": {"low": 5}}, "by.low = 5 in the file", "low <= high", "change --by.low VALUE"),
        ({"by": {"low": 5, "high": 4}}, "by.low = 5, by.high = 4 in the file", "low <= high",
         "change --by.low VALUE or --by.high VALUE"),
        ({"ways": [{"low": 5}]}, "ways.0.low = 5 in the file", "low <= high", "change --ways.0.low VALUE"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(values: dict[str, Any], given: str, expected: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(Paired, values, source="the file")
    assert (caught.value.given, caught.value.expected, caught.value.fix) == (given, expected, fix)


def test_files_are_utf_8_whatever_the_locale(tmp_path) -> None:
    (tmp_path / "a.toml").write_bytes('text = "für"\n'.encode())
    code = "import sys; from deploy_sparse.config import read_toml; print(ascii(read_toml(sys.argv[1])))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.toml"], env=plain, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'text': 'f\\xfcr'}\n"
