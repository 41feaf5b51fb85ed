"""Suites as files: what they may say, how a mistake is answered, and that the shipped ones hold together."""

import argparse
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from suite_samples import SMALL, small

from deploy_sparse import zoo
from deploy_sparse.cli import bench
from deploy_sparse.config import toml_text
from deploy_sparse.errors import ConfigError
from deploy_sparse.suites.config import Form, list_suites, load_suite, suites_folder
from deploy_sparse.suites.running import Selection, check


def error_of(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    return caught.value


FORMS = '[forms.half]\nstructure = "channels"\nkeep = 0.5\n'
NETWORKS = '[[networks]]\nname = "one"\nnetwork = "resnet_digits"\nforms = ["half"]\n'


def test_a_file_names_its_suite_and_leaves_the_rest_to_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'title = "Mine"\n{FORMS}{NETWORKS}')
    suite = load_suite(path)
    assert (suite.name, suite.targets, suite.batches, suite.precisions) == ("mine", ("cpu",), (1, 32), ("fp32",))
    assert suite.forms["half"].deployed == "channels"


@pytest.mark.parametrize("name", list_suites())
def test_shipped_suites_name_networks_and_inputs_that_exist(name):
    suite = load_suite(name)
    assert suite.about
    for network in suite.networks:
        shape = network.input or zoo.entry(network.network).input_shape
        zoo.check(
            network.network,
            network.arguments,
            shape,
            network.arguments.get("classes", 1000 if "/" in network.network else 10),
        )
    used = {form for network in suite.networks for form in network.forms}
    assert used == set(suite.forms), "a form that no network has is never measured"


def test_smoke_channels_and_seeds_are_shipped():
    assert {"smoke", "channels", "seeds"} <= set(list_suites())
    assert suites_folder().name == "suites"


def test_the_channels_suite_has_the_networks_and_shares_of_its_goals():
    suite = load_suite("channels")
    assert [n.network for n in suite.networks] == [
        "torchvision/resnet18",
        "torchvision/resnet50",
        "torchvision/vgg16_bn",
    ]
    assert {form.keep for form in suite.forms.values()} == {0.7, 0.5, 0.3}
    assert {(goal.of_predicted, goal.times) for goal in suite.goals} == {(0.95, None), (None, 1.25)}
    assert suite.batches == (1, 32)


def test_the_seeds_suite_has_the_papers_figures():
    suite = load_suite("seeds")
    savings = {h.saving for h in suite.headlines}
    assert {0.6493, 0.6484, 0.6023, 0.6311, 0.5775, 0.5545, 0.5375, 0.01, 0.412} <= savings
    assert {n.network for n in suite.networks} == {
        "vgg16_bn", "resnet18", "resnet50", "torchvision/resnet50", "wrn32_2", "mobilenet_v1"
    }  # fmt: skip
    for headline in suite.headlines:  # the structure has the sparsity of the headline, where the headline names one
        keeps = {round(1 - suite.forms[form].keep, 2) for form in headline.forms}
        stated = {int(word) / 100 for word in headline.claim.replace(",", " ").split() if word.isdigit()}
        assert "prune-skip" in headline.claim or keeps <= stated, headline.claim


PAGE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"


def test_the_commands_in_the_documentation_are_understood():
    page = PAGE.read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    given = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("deploy-sparse bench")]
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    parsed = [parser.parse_args(words) for words in given]
    assert len(parsed) == 4
    for options in parsed[1:]:
        suite = load_suite(options.suite)
        check(suite, Selection(batches=tuple(options.batch), only=tuple(options.only)))
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(list_suites()) <= table


def test_the_suite_in_the_documentation_is_one(tmp_path):
    page = PAGE.read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example)
    suite = load_suite(path)
    assert [form.structure for form in suite.forms.values()] == ["channels", "blocks", "folder"]
    keys = {
        key for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE) for key in re.findall(r"\w+", row)
    }
    assert set(Form.model_fields) - {"floor"} <= keys


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        load_suite("chanels")
    assert caught.value.given == "unknown suite 'chanels'"
    assert "did you mean 'channels'? " in caught.value.fix


def test_a_mistake_in_a_file_is_mended_in_that_file(tmp_path):
    problem = error_of(tmp_path, f'title = "Mine"\nsecond = 2\n{FORMS}{NETWORKS}')
    assert "unknown key 'second'" in problem.given
    assert "did you mean 'seconds'" in problem.fix
    assert problem.fix.endswith(f"mend it in {tmp_path / 'mine.toml'}")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"forms": {"half": {"structure": "channels"}}}, "keep"),
        ({"forms": {"half": {"structure": "channels", "keep": 0.5, "parts": 2}}}, "no parts with structure 'channels'"),
        ({"forms": {"half": {"structure": "folder"}}}, "path"),
        ({"forms": {"half": {"structure": "channels", "keep": 0.5, "floor": 0.1}}}, "floor only with rule 'chase'"),
        ({"forms": {"half": {"structure": "channels", "keep": 0.5, "format": "packed"}}}, "leaves no blocks to pack"),
        ({"forms": {"half": {"structure": "blocks", "keep": 0.5, "rule": "chase"}}}, "with structure 'blocks'"),
        ({"goals": [{"forms": ["half"], "over": "odd"}]}, "either of_predicted, or over with times"),
        (
            {"goals": [{"forms": ["halve"], "of_predicted": 1.0}]},
            "'halve', a form of a goal, is none. did you mean 'half'?",
        ),
        (
            {"networks": [{"name": "one", "network": "x", "forms": ["none"]}]},
            "'none', a form of network 'one', is none",
        ),
        ({"batches": [1, 1]}, "every one of the batches once"),
        ({"forms": {"dense": {"structure": "channels", "keep": 0.5}}}, "another name for the form 'dense'"),
        (
            {"headlines": [{"source": "s", "claim": "c", "network": "second", "forms": ["odd"], "timed": "t"}]},
            "'odd', a form of network 'second', for a headline, is none",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(tmp_path, change, expected):
    merged = {key: value for key, value in {**SMALL, **change}.items() if key != "name"}
    problem = error_of(tmp_path, toml_of(merged))
    assert expected in problem.expected


def test_what_decides_a_measurement_leaves_out_texts_goals_and_choices():
    before = small()
    same = small(title="Other", goals=[{"forms": ["half"], "of_predicted": 0.9}], batches=[2], targets=["rtx-sm89"])
    assert same.measured() == before.measured()
    assert same.digest != before.digest
    assert small(seconds=2.0).measured() != before.measured()
    assert small(forms={"half": {"keep": 0.4}}).measured() != before.measured()


def test_families_put_forms_of_one_kind_together():
    def family(**values):
        return Form(**values).family(4)

    assert family(structure="channels", keep=0.5) == "channels, multiples of 4"
    assert family(structure="channels", keep=0.7) == family(structure="channels", keep=0.3)
    assert family(structure="channels", keep=0.5, multiple=1) == "channels, any width"
    chase = family(structure="channels", keep=0.5, layers="inner", rule="chase", multiple=16)
    assert chase == "channels inside blocks, Chase's, multiples of 16"
    assert family(structure="blocks", keep=0.5, format="auto") == "equal blocks, fastest form"


def toml_of(values):
    """TOML with lists of tables, which the package writes none of."""
    plain = {k: v for k, v in values.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
    text = ""
    for key, value in values.items():
        if key not in plain:
            for table in value:
                text += f"[[{key}]]\n" + toml_text(table)
    simple = {k: v for k, v in plain.items() if not isinstance(v, dict)}
    tables = {k: v for k, v in plain.items() if isinstance(v, dict)}
    found = toml_text(simple) + toml_text(tables) + text
    assert tomllib.loads(found) == values
    return found
