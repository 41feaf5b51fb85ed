"""The command line: every verb answers help, JSON and bad input; errors are one message with an exit code."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from deploy_sparse import Ticket, zoo
from deploy_sparse.cli.main import VERBS, main
from deploy_sparse.ticket import ModelRef, Provenance

ROOT = Path(__file__).resolve().parents[3]


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def ticket(tmp_path):
    torch.manual_seed(0)
    model = zoo.build("resnet_digits", widths=(4, 4, 4))
    reference = ModelRef("resnet_digits", {"widths": [4, 4, 4]}, (1, 8, 8))
    made = Ticket(model.state_dict(), {}, reference, Provenance("test"))
    return made.save(tmp_path / "ticket")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_and_json(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"deploy-sparse {verb}" in text.split("examples:")[1]
    assert "--json" in text


def test_help_lists_every_verb_and_no_words_is_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_an_unknown_verb_names_the_nearest(capsys):
    code, _, err = run(capsys, "biuld")
    assert code == 2
    assert "did you mean 'build'?" in err


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    import deploy_sparse

    assert deploy_sparse.__version__ in capsys.readouterr().out


def test_ls_lists_every_recipe_config_and_target(capsys):
    code, out, _ = run(capsys, "ls", "--json")
    listed = json.loads(out)
    assert code == 0
    assert set(listed["recipes"]) == {p.stem for p in (ROOT / "recipes").glob("*.py")}
    assert set(listed["recipes"]["imp_refill"]["configs"]) == {
        p.stem for p in (ROOT / "recipes/configs/imp_refill").glob("*.toml")
    }
    assert set(listed["targets"]) == {p.stem for p in (ROOT / "engines/targets").glob("*.toml")}


def test_cat_tells_origins_and_is_toml(capsys):
    words = ("cat", "imp_refill", "--config", "resnet_digits", "--fit.epochs", "7")
    code, out, _ = run(capsys, *words)
    assert code == 0
    parsed = tomllib.loads(out)
    assert parsed["fit"]["epochs"] == 7
    origins = {line.split(" = ")[0]: line.rpartition("# ")[2] for line in out.splitlines() if "# " in line}
    assert origins["epochs"].startswith("command line")
    assert origins["rounds"].startswith("file")
    assert origins["momentum"].startswith("default")
    rows = json.loads(run(capsys, *words, "--json")[1])
    assert rows["fit.epochs"] == {"value": 7, "origin": "command line"}


def test_cat_writes_what_is_not_set_as_comments_and_its_output_runs_unchanged(capsys, tmp_path):
    from deploy_sparse.cli.catalog import find_recipe, load_config, load_recipe, recipes
    from deploy_sparse.config import keys_of

    lines = run(capsys, "cat", "chase")[1].splitlines()
    explore = lines[lines.index("[explore]") : lines.index("[channels]")]
    assert "# interval = …                   # not set: optimizer steps between updates" in explore
    for name in recipes():
        module = load_recipe(find_recipe(name))
        plain = module.RecipeConfig()
        text = run(capsys, "cat", name)[1]
        unset = [key.split(".")[-1] for key, (_, value, _) in keys_of(module.RecipeConfig).items() if value is None]
        assert [line[2:].split(" = ")[0] for line in text.splitlines() if line.startswith("# ")] == unset
        (tmp_path / "again.toml").write_text(text)
        assert load_config(module, tmp_path / "again.toml", [])[0] == plain
    given = run(capsys, "cat", "chase", "--explore.interval", "7")[1]
    assert "interval = 7                     # command line; optimizer steps between updates" in given.splitlines()


def test_every_shipped_config_parses(capsys):
    configs = sorted((ROOT / "recipes/configs").rglob("*.toml"))
    assert configs
    for path in configs:
        code, _, err = run(capsys, "cat", path.parent.name, "--config", path.stem)
        assert (code, err) == (0, "")


def test_cp_copies_once_and_never_overwrites(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "cp", "imp_refill", "mine.py")[0] == 0
    assert (tmp_path / "mine.py").read_bytes() == (ROOT / "recipes/imp_refill.py").read_bytes()
    assert run(capsys, "cp", "imp_refill", "--config", "resnet_digits")[0] == 0
    assert (tmp_path / "resnet_digits.toml").exists()
    (tmp_path / "mine.py").write_text("precious")
    code, _, err = run(capsys, "cp", "imp_refill", "mine.py")
    assert (code, (tmp_path / "mine.py").read_text()) == (2, "precious")
    assert "mine.py already exists" in err
    (tmp_path / "mine.py").unlink()
    run(capsys, "cp", "imp_refill", "mine.py")
    assert run(capsys, "cat", "./mine.py", "--config", "resnet_digits.toml")[0] == 0  # the copy works as it is


def test_options_may_stand_before_positional_words(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "cp", "imp_refill", "--config", "resnet_digits", "mine.toml")[0] == 0
    assert (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize("text", ["def f(:", "import not_there", "x = 1", "RecipeConfig = main = undefined"])
def test_a_broken_recipe_is_the_users_error(capsys, tmp_path, text):
    recipe = tmp_path / "broken.py"
    recipe.write_text(text)
    code, _, err = run(capsys, "run", str(recipe))
    assert code == 2
    assert "broken.py" in err
    assert "defect" not in err


def test_a_run_keeps_its_own_report(capsys, small_run, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    before = (folder / "report.json").read_bytes()
    code, _, err = run(capsys, "report", str(folder / "records.jsonl"))
    assert code == 2
    assert "holds a run with a report of its own" in err
    code, out, err = run(
        capsys, "report", str(folder / "records.jsonl"), "--out", str(tmp_path / "elsewhere"), "--json"
    )
    assert (code, set(json.loads(out))) == (0, {*json.loads(run(capsys, "report", str(folder), "--json")[1])})
    assert f"the run's tables and curves come with: deploy-sparse report {folder}\n" in err
    assert (folder / "report.json").read_bytes() == before
    (folder / "report.json").write_bytes(before.replace(b"Rounds", b"Sounds"))
    code, _, err = run(capsys, "report", str(folder))
    assert code == 2
    assert "report.json is damaged" in err


def test_profile_writes_into_records_only_and_shows_what_it_measured(capsys, small_run, tmp_path):
    engines = [f"{name}={small_run[0]}/engines/{name}-cpu-*" for name in ("dense", "ticket")]
    precious = tmp_path / "precious.json"
    precious.write_text("{}")
    code, out, err = run(capsys, "profile", *engines, "--seconds", "0.05", "--out", str(precious))
    assert (code, out, precious.read_text()) == (2, "", "{}")
    assert "is no file of records" in err
    assert run(capsys, "profile", *engines, "--seconds", "0.05")[0] == 0
    code, _, err = run(capsys, "profile", f"a={small_run[0]}/engines/*")
    assert code == 2
    assert "expected: one engine" in err


def test_what_a_run_holds_is_pointed_at(capsys, small_run, tmp_path):
    for words in (["build", str(small_run[0])], ["build", str(next((small_run[0] / "engines").glob("dense-cpu-*")))]):
        code, _, err = run(capsys, *words, "--out", str(tmp_path))
        assert code == 2
        assert "name what is in it, for example" in err
    assert run(capsys, "compact", str(small_run[0]), "--out", str(tmp_path / "compact"))[0] == 0
    for name in ("run.json", "metrics.jsonl"):
        assert small_run[1]["ticket"] in run(capsys, "show", str(small_run[0] / name))[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build"], r"the following arguments are required: subject.*deploy-sparse build.*see deploy-sparse build --help"),
        (["ls", "--wrong"], r"unrecognized arguments: --wrong"),
        (["run", "--fit.epochs", "3", "imp_refill"], r"--fit.epochs stands before the recipe"),
        (["run", "imp_refill", "--seed", "99999999999999"], r"seed = '99999999999999'.*less than"),
        (["run", "imp_refill", "--deploy.batches", "[1, 1]"], r"deploy.batches = \[1, 1\].*each one once"),
        (["run", "imp_refill", "--deploy.targets", "cpu"], r"deploy.targets = 'cpu'.*a list.*'\[\"cpu\"\]'"),
        (["run", "imp_refill", "--deploy.targets", '["tensorrt"]'], r"(tensorrt|TensorRT).*not installed|no NVIDIA GPU"),
        (["run", "imp_refill", "--fit.batch_size", "5000"], r"fit.batch_size = 5000 with 1167 training images"),
        (["run", "imp_refill", "--imp.exclude", '["nothing"]'], r"'nothing' matches no convolution"),
        (["run", "imp_refill", "--model.arguments", "{widths = [0, 8, 8]}"], r"cannot be built with"),
        (["run", "imp_refil"], r"unknown recipe 'imp_refil'.*did you mean 'imp_refill'\?"),
        (["run", "./none.py"], r"recipe file ./none.py does not exist"),
        (["run", "imp_refill", "--config", "resnet_digit"], r"unknown config 'resnet_digit'.*expected: one of .*resnet_digits, .*vgg_digits, .*or the path of a TOML file.*did you mean 'resnet_digits'\?"),
        (["run", "imp_refill", "--config", "./no.toml"], r"no.toml does not exist"),
        (["run", "imp_refill", "--fit.epoch", "3"], r"unknown key 'fit.epoch' in the command line.*did you mean 'fit.epochs'\?"),
        (["run", "imp_refill", "--imp.rate", "1.5"], r"imp.rate = '1.5'.*less than 1"),
        (["run", "imp_refill", "--imp.rate", "0"], r"imp.rate = '0'.*greater than 0"),
        (["run", "imp_refill", "--model.name", "resnet"], r"unknown network 'resnet'"),
        (["run", "imp_refill", "--model.name", "resnet18"], r"'resnet18' makes an error.*images of shape \[1, 8, 8\].*in_channels"),
        (["run", "imp_refill", "--model.arguments", "{classes = 3}"], r"makes 3 classes, the data has 10.*classes=10"),
        (["run", "imp_refill", "--data.name", "digit"], r"unknown data set 'digit'.*did you mean 'digits'\?"),
        (["run", "imp_refill", "--deploy.targets", '["gpu"]'], r"unknown target 'gpu'"),
        (["run", "imp_refill", "--deploy.batches", "[1, 100000]"], r"deploy.batches holds 100000.*'cpu'.*batches from 1 to"),
        (["run", "imp_refill", "--refill.rounds", "[9]"], r"refill.rounds = \[9\].*between 1 and imp.rounds = 4"),
        (["run", "imp_refill", "--imp.rewind_epoch", "99"], r"imp.rewind_epoch = 99.*inside the training"),
        (["show", "nothing"], r"nothing is not there"),
        (["compact", "nothing", "--out", "c"], r"nothing does not exist.*deploy-sparse run"),
        (["build", "nothing"], r"nothing does not exist.*a .onnx file"),
        (["build", "nothing", "--target", "rtx-sm88"], r"unknown target 'rtx-sm88'.*did you mean 'rtx-sm8"),
        (["profile", "x"], r"'x' is no subject.*NAME=ENGINE"),
        (["profile", "a=nothing"], r"nothing does not exist"),
        (["profile", "a=x", "a=y"], r"two engines have one name"),
        (["report", "nothing.jsonl"], r"nothing.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(capsys, tmp_path, monkeypatch, words, message):
    import re

    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert re.search(message, err, re.S), err
    assert re.fullmatch(r"(.*\n)*error: [^\n]+\n  expected: [^\n]+\n  next step: [^\n]+\n", err), err
    assert "Traceback" not in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("known", [True, False])
def test_under_torchrun_the_first_process_has_time_to_report_bad_input(capsys, monkeypatch, known):
    from contextlib import nullcontext

    from deploy_sparse.cli import run as verb
    from deploy_sparse.errors import ConfigError
    from deploy_sparse.train import distributed

    class Second(distributed.World):
        def main_first(self, action):
            kind = distributed.ElsewhereError if known else ConfigError
            raise kind("bad here", expected="a", fix="b")

    waits = []
    monkeypatch.setattr(distributed, "joined", lambda: nullcontext(Second(1, 2, 1)))
    monkeypatch.setattr(verb.time, "sleep", waits.append)
    code, out, err = run(capsys, "run", "nothing")
    assert (code, out) == (2, "")
    assert err == ("" if known else "error: process 1: bad here\n")
    assert waits == [verb.TORCHRUN_GRACE_S]


def test_help_tells_torchruns_exit_code(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "run", "--help")
    assert "under torchrun\nthe exit code is torchrun's own" in capsys.readouterr().out


def test_errors_are_json_when_asked_and_tracebacks_only_with_debug(capsys):
    code, out, err = run(capsys, "show", "nothing", "--json")
    assert code == 2
    assert json.loads(out)["error"]["given"] == "nothing is not there"
    assert "Traceback" not in err
    assert "Traceback" in run(capsys, "show", "nothing", "--debug")[2]


@pytest.mark.parametrize(("library", "code", "text"), [("onnx", 2, "onnx is not installed"), ("nosuch", 1, "a defect")])
def test_a_library_that_is_not_installed_is_no_defect(capsys, monkeypatch, library, code, text):
    from deploy_sparse.cli import ls

    def missing(options):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    monkeypatch.setattr(ls, "execute", missing)
    assert main(["ls"]) == code
    err = capsys.readouterr().err
    assert text in err
    assert ("pip install onnx" in err) == (code == 2)


def test_a_defect_is_called_one(capsys, monkeypatch):
    from deploy_sparse.cli import ls

    monkeypatch.setattr(ls, "execute", lambda options: 1 / 0)
    code, _, err = run(capsys, "ls")
    assert code == 1
    assert "a defect of deploy-sparse" in err
    assert "--debug" in err


def test_show_says_what_a_ticket_is(capsys, ticket):
    code, out, _ = run(capsys, "show", str(ticket))
    assert code == 0
    assert "resnet_digits" in out
    assert json.loads(run(capsys, "show", str(ticket), "--json")[1])["hash"] == Ticket.load(ticket).hash


def test_a_flipped_bit_in_a_shown_ticket_is_an_error(capsys, ticket):
    path = ticket / "ticket.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, _, err = run(capsys, "show", str(ticket))
    assert code == 2
    assert "ticket.safetensors is damaged" in err


def test_ticket_to_compact_to_engine_to_profile_to_report(capsys, tmp_path, ticket):
    """The verbs chain: each one reads what the one before wrote."""
    assert run(capsys, "compact", str(ticket), "--out", str(tmp_path / "compact"))[0] == 0
    assert "compact network" in run(capsys, "show", str(tmp_path / "compact"))[1]
    engines = []
    for subject in ("ticket", "compact"):
        code, out, _ = run(
            capsys, "build", str(tmp_path / subject), "--out", str(tmp_path / "engines"), "--name", subject, "--json"
        )
        assert code == 0
        built = json.loads(out)
        assert built["runs_here"]
        engines.append(Path(built["engine"]).parent)
        assert "onnxruntime" in run(capsys, "show", str(engines[-1]))[1]
    records = tmp_path / "records.jsonl"
    code, out, _ = run(
        capsys, "profile", f"dense={engines[0]}", f"small={engines[1]}", "--batch", "1", "2", "--seconds", "0.1", "--out", str(records)
    )  # fmt: skip
    assert code == 0
    assert "small" in out
    assert len(records.read_text().splitlines()) == 4
    assert run(capsys, "show", str(records))[0] == 0
    code, _, err = run(capsys, "report", str(records), "--out", str(tmp_path / "report"), "--title", "Two networks")
    assert (code, err) == (0, "")  # no run, whose own report would say more
    assert "Two networks" in (tmp_path / "report" / "report.html").read_text()
    code, _, err = run(capsys, "profile", f"dense={engines[0]}", "--batch", "100000")
    assert code == 2
    assert "batch" in err


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    from deploy_sparse.cli import doctor

    assert run(capsys, "doctor")[0] == 0
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "missing" if name == "onnx" else real(name))
    code, out, _ = run(capsys, "doctor")
    assert code == 2
    assert "missing: onnx" in out


def test_a_closed_pipe_is_no_error():
    program = f"{sys.executable} -m deploy_sparse.cli.main ls | head -c 1"
    answer = subprocess.run(
        ["bash", "-o", "pipefail", "-c", program], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr
