"""Two real processes over gloo train as one: equal results, exact resume, close to one process, one voice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_samples import CONFIG, MASKS, network, splits, train
from two_processes import no_batchnorm, stopping

from deploy_sparse.errors import Interrupted, RunError
from deploy_sparse.sparsify.method import StaticMasks
from deploy_sparse.train import distributed
from deploy_sparse.train.distributed import ALONE, joined, poll_together, world
from deploy_sparse.train.loop import fit

HERE = Path(__file__).parent


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **more}


def command(folder):
    return ["-m", "deploy_sparse.cli.main", "run", str(HERE / "two_processes.py"), "--out", str(folder), "--json"]


def started(count, folder, *more):
    """[(standard output, standard error)] and [what each process found] of ``count`` processes that all ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(count)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, *command(folder), *more], env=env, text=True, **pipes))
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, answers
    return answers, [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The run folder of two processes, and what :func:`started` gives."""
    folder = tmp_path_factory.mktemp("together") / "run"
    return folder, *started(2, folder)


def test_processes_hold_the_same_weights_masks_and_memory(together):
    _, _, (first, second) = together
    assert first["digest"] == second["digest"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("polls", [8, 16])
def test_a_stop_of_one_process_stops_both_and_a_resume_ends_with_the_same_bits(together, polls):
    _, _, found = together
    saved = "saved at step 7"
    assert [part[f"stop-{polls}"][0] for part in found] == ["Interrupted", "Interrupted"]
    assert saved in found[0][f"stop-{polls}"][1]
    assert saved in found[1][f"stop-{polls}"][1]
    assert {part[f"resumed-{polls}"] for part in found} == {found[0]["digest"]}


def test_a_moving_average_resumes_exactly_too(together):
    _, _, found = together
    digests = {part[key] for part in found for key in ("averaged", "averaged-resumed")}
    assert len(digests) == 1
    assert digests != {found[0]["digest"]}


def test_moving_masks_under_adamw_resume_exactly_and_are_the_same_everywhere(together):
    _, _, found = together
    assert [part["moving-stop"][0] for part in found] == ["Interrupted", "Interrupted"]
    assert "saved at step 6" in found[0]["moving-stop"][1]
    assert len({part[key] for part in found for key in ("moving", "moving-resumed")}) == 1


def test_chase_stopped_among_its_removals_resumes_exactly_and_is_the_same_everywhere(together):
    _, _, found = together
    assert [part["chase-stop"][0] for part in found] == ["Interrupted", "Interrupted"]
    assert "saved at step 4" in found[0]["chase-stop"][1]  # removals are after steps 1, 3, 5, 7
    assert len({part[key] for part in found for key in ("chase", "chase-resumed")}) == 1


def test_masks_that_differ_between_processes_end_the_training_after_its_first_epoch(together):
    folder, _, (first, second) = together
    assert first["apart"] == second["apart"]
    (kind, text), rows = first["apart"]
    assert (kind, rows) == ("RunError", 0)
    assert text.startswith("the masks after epoch 0 differ between processes")
    assert not (folder / "apart").exists()  # no checkpoint of it


def test_two_processes_end_close_to_one(together, tmp_path):
    """The mean gradient is the same but for rounding; BatchNorm sees half a batch, which moves weights a little."""
    _, _, (found, _) = together
    options = {"seed": 3, "checkpoints": tmp_path / "plain"}
    alone = fit(no_batchnorm(), splits(), CONFIG, StaticMasks(MASKS), **options).last
    for name, weight in alone.items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), weight, atol=1e-5, rtol=1e-4)
    start, one = network().state_dict(), train(tmp_path / "batchnorm", keep_epoch=None).last
    moved = {name: (one[name] - start[name]).norm() for name in ("0.weight", "4.weight")}
    for name, distance in moved.items():
        assert (torch.tensor(found["batchnorm"][name]) - one[name]).norm() < 0.6 * distance


def test_evaluation_is_shared_and_every_process_gets_the_whole_answer(together):
    _, _, found = together
    assert len({*found[0]["accuracy"], *found[1]["accuracy"]}) == 1


def test_processes_talk(together):
    _, _, (first, second) = together
    assert first["agree"] == second["agree"] == {"rank": 0, "text": "ä"}
    assert first["gather"] == second["gather"] == [["", 0], ["x", 1]]
    assert first["numbers"] == second["numbers"] == [True, False, 5, 3]
    assert (first["called"], second["called"]) == (1, 0)


def test_errors_of_the_first_process_end_the_others(together):
    _, _, (first, second) = together
    assert first["errors"][:2] == [["ArtifactError", "damaged here"]] * 2
    assert second["errors"][:2] == [["ElsewhereError", "damaged here"]] * 2
    assert first["errors"][2] == second["errors"][2] == ["RunError", "the numbers differ between processes (0, 1)"]


def test_only_the_first_process_writes_and_prints(together):
    folder, ((out, news), (silent_out, silence)), _ = together
    assert json.loads(out) == {"folder": str(folder), "processes": 2}
    assert "said by the recipe" in news
    assert silent_out == ""
    assert "said by the recipe" not in silence
    assert "rounds/1" not in silence
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["training"], row["epoch"]) for row in rows] == [("rounds/0", e) for e in (0, 1, 2)] + [
        ("rounds/1", e) for e in (1, 2)
    ]
    description = json.loads((folder / "run.json").read_text())
    assert (description["status"], description["processes"]) == ("finished", 2)
    assert description["command"].startswith("torchrun --nproc-per-node 2 -m deploy_sparse.cli.main run")


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with joined() as me:
        assert me is world() is ALONE
        assert (me.main, me.agree("x"), me.gather(1), me.any(True), me.most(3), me.sum(4)) == (
            True,
            "x",
            [1],
            True,
            3,
            4,
        )
        me.check_same("a", "b")


def test_a_lost_process_is_one_message(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with (
        pytest.raises(RunError, match=r"another of the 2 processes ended \(\[gloo/pair.cc\] closed\)[\s\S]*--resume"),
        joined(),
    ):
        raise RuntimeError("[gloo/pair.cc] closed\nmore")
    with pytest.raises(RuntimeError, match="a defect"), joined():
        raise RuntimeError("a defect")
    assert world() is ALONE


def test_a_stop_of_another_process_is_raised_here_with_its_signal(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: type("Other", (), {"most": lambda self, number: 2})())
    with pytest.raises(Interrupted, match=r"another process was stopped by SIGINT: all saved") as caught:
        poll_together(lambda *saved: None, "all saved")
    assert caught.value.exit_code == 130


@pytest.mark.slow
def test_three_processes_resume_exactly_too(tmp_path):
    """Sums of three depend on their order, which must not depend on where a training was resumed."""
    _, found = started(3, tmp_path / "run", "--batch_size", "12", "--backwards", "true", "--stops", "[4, 10]")
    for part in found:
        assert "saved at step 3" in part["stop-4"][1]
        assert "saved at step 3" in part["stop-10"][1]
    assert {part[key] for part in found for key in ("digest", "resumed-4", "resumed-10")} == {found[0]["digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_every_process_and_resume_ends_the_same(together, tmp_path, number):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command(tmp_path / "run")]
    process = subprocess.Popen(start, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does: torchrun and its processes
    _, news = process.communicate(timeout=120)
    assert process.returncode != 0
    assert news.count("next step: torchrun --nproc-per-node 2") == 1, news
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    subprocess.run([*start, "--resume"], env=environment(), check=True, capture_output=True)
    resumed = json.loads((tmp_path / "run" / "process-1.json").read_text())
    assert resumed["digest"] == together[2][0]["digest"]


def test_the_toy_recipe_alone_is_stopped_and_resumed_too(tmp_path):
    from train_samples import StopAfter

    whole = stopping(tmp_path / "whole", StopAfter(10_000), CONFIG)
    with pytest.raises(Interrupted):
        stopping(tmp_path / "parts", StopAfter(7), CONFIG)
    assert stopping(tmp_path / "parts", StopAfter(10_000), CONFIG) == whole
