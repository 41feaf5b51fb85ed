"""The main job end to end: what it leaves, and that an interruption changes nothing."""

import io
import json
import re
import shutil
import signal

import pytest
import torch
from recipe_runs import SMALL, command, finish, finish_afresh, stop_when

from deploy_sparse import Ticket, api, load_compact, load_engine
from deploy_sparse.artifact import sha256_file
from deploy_sparse.cli.catalog import find_config, find_recipe, load_config, load_recipe
from deploy_sparse.cli.main import main
from deploy_sparse.engine.entry import open_entry
from deploy_sparse.measure.record import read_records
from deploy_sparse.sparsify.imp import prune_lowest
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.structure import Channels, Dense, density, structure_of
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.surgery.plan import SurgeryPlan
from deploy_sparse.train.console import Console
from deploy_sparse.train.run import open_run
from deploy_sparse.train.tensors import copy_state


@pytest.fixture
def whole(small_run):
    return small_run


def test_everything_promised_is_there_and_verifies(whole):
    folder, result = whole
    ticket = Ticket.load(folder / "ticket")
    assert ticket.hash == result["ticket"]
    assert SurgeryPlan.load(folder / "compact").ticket == ticket.hash
    for entry in (folder / "engines").iterdir():
        open_entry(entry)
    records = read_records(folder / "records.jsonl")
    assert {(r.subject, r.batch, r.status) for r in records} == {("dense", 1, "timed"), ("ticket", 1, "timed")}
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["result"]["ticket"] == ticket.hash
    for name in ("report.md", "report.html", "report.json", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert not [p for p in folder.rglob(".tmp-*")]


def test_the_rounds_have_the_densities_of_the_paper(whole):
    folder, _ = whole
    for number in (0, 1, 2):
        masks = Ticket.load(folder / f"rounds/{number}").masks
        assert density(masks) == pytest.approx(0.8**number, abs=1e-3)


def test_the_ticket_has_whole_channels_only_and_masked_weights_are_zero(whole):
    folder, result = whole
    assert result["refill_round"] in (1, 2)
    ticket = Ticket.load(folder / "ticket")
    weights = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 1}
    assert all(isinstance(structure_of(mask), Channels | Dense) for mask in weights.values())
    assert any(isinstance(structure_of(mask), Channels) for mask in weights.values())
    for name, mask in ticket.masks.items():
        assert bool((ticket.weights[name][~mask] == 0).all())


class Entered(Exception):
    """Raised instead of training, with what training would have started from."""


def entering_fit(small_run, tmp_path, monkeypatch, missing):
    """The state dict and the masks with which the stage ``missing`` of a copied run starts to train."""
    folder = tmp_path / "copy"
    shutil.copytree(small_run[0], folder)
    shutil.rmtree(folder / missing)

    def entered(model, data, config, method, **options):
        raise Entered(copy_state(model), method.masks)

    monkeypatch.setattr("deploy_sparse.train.tickets.fit", entered)
    recipe = find_recipe("imp_refill")
    module = load_recipe(recipe)
    config, _ = load_config(module, find_config(recipe, "resnet_digits"), SMALL)
    console = Console(io.StringIO())
    with (
        pytest.raises(Entered) as caught,
        open_run(
            folder, "imp_refill", config.model_dump(mode="json"), resume=True, command="again", console=console
        ) as run,
    ):
        module.main(config, run)
    return folder, *caught.value.args


@pytest.mark.parametrize("stage", ["rounds/1", "tickets/2"])
def test_every_training_starts_from_the_rewound_weights_and_batchnorm(whole, tmp_path, monkeypatch, stage):
    folder, state, masks = entering_fit(whole, tmp_path, monkeypatch, stage)
    rewind = Ticket.load(folder / "rewind")
    assert all(torch.equal(state[name], weight) for name, weight in rewind.weights.items())
    assert not torch.equal(state["bn1.running_mean"], torch.zeros(16))  # BatchNorm is rewound too, not reset
    assert masks.keys() == Ticket.load(whole[0] / stage).masks.keys()


def test_each_round_is_scored_with_its_own_mask_and_its_own_trained_weights(whole):
    folder, _ = whole
    groups = channel_groups(api.zoo_factory(Ticket.load(folder / "dense").model, "")(), (torch.zeros(2, 1, 8, 8),))
    for number in (1, 2):
        trained, before = Ticket.load(folder / f"rounds/{number}"), Ticket.load(folder / f"rounds/{number - 1}")
        expected = prune_lowest(before.weights, before.masks, 0.2)
        assert all(torch.equal(trained.masks[name], mask) for name, mask in expected.items())
        filled = refill(trained.masks, trained.weights, groups, coupling="group", multiple=4)
        found = Ticket.load(folder / f"tickets/{number}").masks
        assert found.keys() == filled.keys()
        assert all(torch.equal(found[name], mask) for name, mask in filled.items())


def test_compact_network_engine_and_masked_network_agree_on_the_test_set(whole):
    folder, _ = whole
    ticket = Ticket.load(folder / "ticket")
    dense = api.zoo_factory(ticket.model, "")().eval()
    dense.load_state_dict(ticket.masked_weights())
    images = torch.randn(16, 1, 8, 8)
    expected = dense(images)
    assert (load_compact(folder / "compact")(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    entry = next((folder / "engines").glob("ticket-cpu-*"))
    with load_engine(entry) as runner:
        output = torch.from_numpy(runner.run({"input": images.numpy()})["output"])
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_reported_numbers_are_the_recorded_ones(whole, capsys):
    folder, result = whole
    assert main(["report", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["timed"] == result["timed"]
    assert again["verdicts"] == result["verdicts"]


def test_rendering_again_gives_the_same_bytes(whole, tmp_path, capsys):
    folder, _ = whole
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_show_tells_the_result(whole, capsys):
    folder, result = whole
    assert main(["show", str(folder)]) == 0
    assert result["ticket"] in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(whole):
    folder, result = whole
    before = {p: sha256_file(p) for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    assert finish(folder, "--resume") == result
    assert before == {p: sha256_file(p) for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}


@pytest.mark.parametrize(
    ("appears", "number", "delay", "code"),
    [("checkpoints/rounds-0", signal.SIGTERM, 0.0, 143), ("tickets/1", signal.SIGINT, 0.05, 130)],
)
def test_a_stopped_run_says_how_to_go_on_and_ends_with_the_same_ticket(whole, tmp_path, appears, number, delay, code):
    folder = tmp_path / "stopped"
    answer = stop_when(folder, appears, number, delay)
    assert answer.returncode == code, answer.stderr
    assert f"stopped by {number.name}" in answer.stderr
    assert "--resume" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert finish(folder, "--resume")["ticket"] == whole[1]["ticket"]


PHASES = [
    ("run.json", 0.5), ("rewind", 0.0), ("rounds/1", 0.1), ("tickets/1", 0.0), ("tickets/2", 0.0), ("ticket", 0.0),
    ("compact", 0.0), ("onnx", 0.1), ("onnx/dense.onnx", 0.5), ("engines", 0.0), ("records.jsonl", 0.0),
]  # fmt: skip


def same_outcome(folder, whole, tmp_path):
    """The ticket is the undisturbed run's, and everything promised is complete; both by a process that starts afresh."""
    result = finish_afresh(folder, "--resume")
    assert result["ticket"] == whole[1]["ticket"]
    assert [row[:2] for row in result["timed"]["rows"]] == [["dense", "cpu"], ["ticket", "cpu"]]
    assert {(r.subject, r.status) for r in read_records(folder / "records.jsonl")} == {
        ("dense", "timed"),
        ("ticket", "timed"),
    }
    assert (folder / "report.html").exists()
    assert not list(folder.rglob(".tmp-*"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert (
        len(lines) == len(set(lines)) == 3 + 4 * 2
    )  # epochs of the dense training, and after the rewind point of four others, each once


@pytest.mark.parametrize(("appears", "delay"), [("tickets/2", 0.0)])
def test_killed_without_warning_ends_with_the_same_outcome(whole, tmp_path, appears, delay):
    folder = tmp_path / "stopped"
    assert stop_when(folder, appears, signal.SIGKILL, delay).returncode == -signal.SIGKILL
    same_outcome(folder, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("appears", "delay"), PHASES)
def test_stopped_or_killed_in_any_phase_ends_with_the_same_outcome(whole, tmp_path, appears, delay, number):
    folder = tmp_path / "stopped"
    answer = stop_when(folder, appears, number, delay)
    if (appears, number) != ("records.jsonl", signal.SIGTERM):  # nothing is left to stop by then
        assert answer.returncode == (-9 if number == signal.SIGKILL else 143), answer.stderr
    same_outcome(folder, whole, tmp_path)


def resumed(whole, tmp_path, capsys, change, *more):
    """Change something in a copy of the finished run, continue it, and return (exit code, JSON or message)."""
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    change(folder)
    words = [
        "run",
        "imp_refill",
        "--config",
        "resnet_digits",
        "--out",
        str(folder),
        *SMALL,
        *more,
        "--resume",
        "--json",
        "--quiet",
    ]
    code = main(words)
    captured = capsys.readouterr()
    return folder, code, json.loads(captured.out) if code == 0 else captured.err


def test_a_compact_network_of_another_ticket_is_refused(whole, tmp_path, capsys):
    def swap(folder):
        shutil.rmtree(folder / "compact")
        api.compact(Ticket.load(folder / "rounds/1"), target="cpu").save(folder / "compact")

    folder, code, message = resumed(whole, tmp_path, capsys, swap)
    assert code == 2
    assert "was made from ticket" in message
    assert f"remove {folder / 'compact'} and continue" in message


def test_a_ticket_of_another_stage_is_refused(whole, tmp_path, capsys):
    def swap(folder):
        shutil.rmtree(folder / "tickets/1")
        shutil.copytree(folder / "tickets/2", folder / "tickets/1")

    folder, code, message = resumed(whole, tmp_path, capsys, swap)
    assert code == 2
    assert "was made from another rewind point or other masks" in message
    assert f"remove {folder / 'tickets/1'} and continue with" in message


def test_records_of_other_engines_or_none_are_measured_again(whole, tmp_path, capsys):
    def forge(folder):
        path = folder / "records.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        engine = read_records(path)[1].hashes["engine"]
        path.write_text(lines[0] + lines[1].replace(engine, "0" * 64))

    folder, code, result = resumed(whole, tmp_path, capsys, forge)
    assert code == 0
    assert "0" * 64 not in (folder / "records.jsonl").read_text()
    assert len(result["timed"]["rows"]) == 2


def test_deployment_may_change_when_a_run_is_continued(whole, tmp_path, capsys):
    folder, code, result = resumed(whole, tmp_path, capsys, lambda folder: None, "--deploy.batches", "[1, 2]")
    assert code == 0
    assert result["ticket"] == whole[1]["ticket"]
    assert [row[2] for row in result["timed"]["rows"]] == ["1", "1", "2", "2"]
    assert json.loads((folder / "run.json").read_text())["config"]["deploy"]["batches"] == [1, 2]


@pytest.mark.parametrize(
    "stage",
    ["rewind", "compact", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "rounds/1", "ticket"))],
)
def test_following_the_advice_for_a_damaged_stage_mends_the_run(whole, tmp_path, capsys, stage):
    def flip(folder):
        path = next((folder / stage).glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    folder, code, message = resumed(whole, tmp_path, capsys, flip)
    assert code == 2
    advised = re.search(r"remove (\S+)", message.split("next step")[1])[1]
    shutil.rmtree(advised)
    assert finish(folder, "--resume")["ticket"] == whole[1]["ticket"]


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_run_file_can_be_removed(whole, tmp_path, capsys, content):
    folder, code, message = resumed(whole, tmp_path, capsys, lambda folder: (folder / "run.json").write_text(content))
    assert code == 2
    assert "run.json is damaged" in message
    assert "what is finished is found again" in message
    if content == "{":
        (folder / "run.json").unlink()
        assert finish(folder, "--resume")["ticket"] == whole[1]["ticket"]


def test_a_failed_continuation_of_a_finished_run_keeps_its_result(whole, tmp_path, capsys):
    def damage(folder):
        (folder / "records.jsonl").write_text("no record")

    folder, code, _ = resumed(whole, tmp_path, capsys, damage)
    assert code == 2
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["result"]["ticket"]) == ("finished", whole[1]["ticket"])


def test_another_configuration_does_not_continue_the_run(whole, capsys):
    folder, _ = whole
    words = ["run", "imp_refill", "--config", "resnet_digits", "--out", str(folder), *SMALL, "--resume"]
    assert main([*words, "--seed", "5"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    assert main(words[:-1]) == 2
    assert "already holds a run of imp_refill" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plain_network_runs_too(tmp_path):
    words = command(tmp_path / "vgg")
    words[words.index("resnet_digits")] = "vgg_digits"
    words[words.index("[1, 2]")] = "[2]"  # the round that narrows so small a network
    words[words.index("{widths = [16, 16, 32]}")] = '{layout = [16, "M", 16, "M"], hidden = 16}'
    import subprocess

    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    plan = SurgeryPlan.load(tmp_path / "vgg" / "compact")
    assert plan.cost_after.macs < plan.cost_before.macs


@pytest.mark.slow
def test_a_recipe_file_runs_by_itself(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    recipe = Path(__file__).resolve().parents[2] / "recipes" / "imp_refill.py"
    answer = subprocess.run(
        [sys.executable, str(recipe), "--out", str(tmp_path / "run"), *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "report.html").exists()
