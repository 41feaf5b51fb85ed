"""The main job end to end: what it leaves, and that an interruption changes nothing."""

import json
import signal

import pytest
import torch
from recipe_runs import SMALL, command, finish, stop_when

from deploy_sparse import Ticket, api, load_compact, load_engine
from deploy_sparse.cli.main import main
from deploy_sparse.engine.entry import open_entry
from deploy_sparse.measure.record import read_records
from deploy_sparse.structure import Channels, Dense, density, structure_of
from deploy_sparse.surgery.plan import SurgeryPlan


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
    for number in (0, 1):
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


def test_all_tickets_start_from_the_rewind_point(whole):
    folder, _ = whole
    rewind = Ticket.load(folder / "rewind")
    for name in ("rounds/1", "tickets/1", "tickets/2"):
        assert Ticket.load(folder / name).provenance.parent == rewind.hash


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
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    assert finish(folder, "--resume") == result
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("appears", "delay"),
    [("run.json", 0.5), ("rewind", 0.0), ("rounds/1", 0.1), ("tickets/1", 0.0), ("tickets/2", 0.0), ("ticket", 0.0),
     ("compact", 0.0), ("onnx", 0.1), ("onnx/dense.onnx", 0.5), ("engines", 0.0), ("records.jsonl", 0.0)],
)  # fmt: skip
def test_stopped_or_killed_in_any_phase_ends_with_the_same_ticket(whole, tmp_path, appears, delay, number):
    folder = tmp_path / "stopped"
    stop_when(folder, appears, number, delay)
    assert finish(folder, "--resume")["ticket"] == whole[1]["ticket"]


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
    words[words.index("{widths = [8, 8, 16]}")] = '{layout = [16, "M", 16, "M"], hidden = 16}'
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
