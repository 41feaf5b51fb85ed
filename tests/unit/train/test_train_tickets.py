"""Trainings as stages of a run: rewinding of weights, BatchNorm and optimizer, and what is taken up again."""

import io
import json
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_samples import CONFIG, MASKS, StopAfter, network, same, splits

from deploy_sparse.errors import ArtifactError, ConfigError, Interrupted
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.train.console import Console
from deploy_sparse.train.rewind import RewindPoint
from deploy_sparse.train.run import open_run
from deploy_sparse.train.runtime import RuntimeConfig, start_runtime
from deploy_sparse.train.tickets import TicketTrainer

DENSE = {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}


def opened(folder, poll=lambda *saved: None):
    return open_run(folder, "toy", {}, resume=True, command="again", console=Console(io.StringIO()), poll=poll)


def trainer(run, config=CONFIG, **runtime):
    return TicketTrainer(
        run,
        method="toy",
        factory=network,
        model=ModelRef("user factory"),
        data=splits(),
        fit=config,
        runtime=start_runtime(RuntimeConfig(device="cpu", threads=1, **runtime)),
        seed=3,
        config={"epochs": config.epochs},
    )


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The dense stage of a finished run, and its folder."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    with opened(folder) as run:
        return trainer(run).dense(Method(), DENSE, rewind_epoch=1), folder


def test_the_dense_stage_leaves_its_start_its_rewind_point_and_its_ends(stage):
    dense, folder = stage
    assert same(dense.initial.weights, network().state_dict())
    assert dense.rewind.epoch == 1
    assert not torch.equal(dense.rewind.ticket.weights["1.running_mean"], torch.zeros(4))
    assert dense.rewind.memory.keys() == {f"momentum_buffer/{n}" for n, _ in network().named_parameters()}
    for name, ticket in (("initial", dense.initial), ("dense", dense.best), ("rounds/0", dense.last)):
        assert Ticket.load(folder / name).hash == ticket.hash
    found = RewindPoint.load(folder / "rewind")
    assert (found.ticket.hash, found.epoch) == (dense.rewind.ticket.hash, 1)
    assert same(found.memory, dense.rewind.memory)


def test_the_console_calls_the_dense_training_dense(tmp_path):
    said = io.StringIO()
    with open_run(tmp_path / "run", "toy", {}, resume=False, command="again", console=Console(said)) as run:
        dense = trainer(run).dense(Method(), DENSE, rewind_epoch=1)
        trainer(run).train("rounds/1", dense.rewind, Method(), DENSE, keep="last")
        rows = [json.loads(line)["training"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line.split(": ")[0] for line in said.getvalue().splitlines()} == {"dense", "rounds/1"}
    assert rows == ["rounds/0"] * 3 + ["rounds/1"] * 2
    assert (tmp_path / "run" / "rounds" / "0").is_dir()


def test_training_on_from_the_rewind_point_is_the_dense_training_itself(stage, tmp_path):
    """Algorithm 1 without pruning: t - i epochs from epoch i, with its optimizer, at its place in schedule and data."""
    dense, _ = stage
    with opened(tmp_path / "run") as run:
        again = trainer(run).train("rounds/1", dense.rewind, Method(), DENSE, keep="last")
        epochs = [json.loads(line)["epoch"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert same(again.weights, dense.last.weights)
    assert epochs == [1, 2]
    assert again.provenance.parent == dense.rewind.ticket.hash
    assert again.provenance.metrics["first_epoch"] == 1


def test_a_fresh_optimizer_and_the_whole_schedule_is_another_training(stage, tmp_path):
    dense, _ = stage
    with opened(tmp_path / "run") as run:
        make = partial(trainer(run).train, method=Method(), masks=DENSE, keep="last")
        rest = make("rest", dense.rewind)
        whole = make("whole", replace(dense.rewind, epoch=0, memory={}))
        no_momentum = make("no-momentum", replace(dense.rewind, memory={}))
        initial = make("initial", RewindPoint(dense.initial))
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["training"] == "whole"] == [0, 1, 2]
    assert not same(rest.weights, no_momentum.weights)
    assert not same(rest.weights, whole.weights)
    assert same(initial.weights, dense.last.weights)  # from the initialisation it is the dense training


def test_masked_momentum_stays_zero_and_masks_hold(stage, tmp_path):
    dense, _ = stage
    with opened(tmp_path / "run") as run:
        for ema in (0.0, 0.9):
            making = trainer(run, CONFIG.model_copy(update={"ema": ema}))
            for keep in ("last", "best"):
                ticket = making.train(f"{keep}-{ema}", dense.rewind, StaticMasks(MASKS), MASKS, keep=keep)
                assert bool((ticket.weights["0.weight"][~MASKS["0.weight"]] == 0).all())


def test_an_interrupted_run_ends_with_the_same_tickets(stage, tmp_path):
    dense, _ = stage
    hashes = []
    for polls in (5, 9, 4, 10_000):
        try:
            with opened(tmp_path / "run", StopAfter(polls)) as run:
                making = trainer(run)
                found = making.dense(Method(), DENSE, rewind_epoch=1)
                ticket = making.train("rounds/1", found.rewind, StaticMasks(MASKS), MASKS, keep="last")
                hashes.append((found.best.hash, found.last.hash, found.initial.hash, ticket.hash))
        except Interrupted:
            pass
    with opened(tmp_path / "whole") as run:
        ticket = trainer(run).train("rounds/1", dense.rewind, StaticMasks(MASKS), MASKS, keep="last")
    assert hashes == [(dense.best.hash, dense.last.hash, dense.initial.hash, ticket.hash)]


def test_a_stage_of_another_start_or_other_masks_is_refused(stage, tmp_path):
    dense, _ = stage
    with opened(tmp_path / "run") as run:
        making = trainer(run)
        making.train("rounds/1", dense.rewind, StaticMasks(MASKS), MASKS, keep="last")
        message = r"was made from another rewind point or other masks[\s\S]*remove .*rounds/1"
        for start, masks in (
            (replace(dense.rewind, epoch=0), MASKS),
            (RewindPoint(dense.initial, 1), MASKS),
            (dense.rewind, DENSE),
        ):
            with pytest.raises(ArtifactError, match=message):
                making.train("rounds/1", start, StaticMasks(masks), masks, keep="last")


def test_a_rewind_point_whose_halves_do_not_belong_together_is_refused(stage, tmp_path):
    dense, _ = stage
    dense.rewind.save(tmp_path / "rewind")
    other = RewindPoint(dense.initial, 1, dense.rewind.memory)
    other.save(tmp_path / "other")
    (tmp_path / "rewind_memory").rename(tmp_path / "away")
    with pytest.raises(ArtifactError, match=r"rewind_memory does not exist"):
        RewindPoint.load(tmp_path / "rewind")
    (tmp_path / "other_memory").rename(tmp_path / "rewind_memory")
    with pytest.raises(ArtifactError, match=r"rewind_memory belongs to another rewind point"):
        RewindPoint.load(tmp_path / "rewind")


def test_a_damaged_memory_is_found(stage, tmp_path):
    dense, _ = stage
    dense.rewind.save(tmp_path / "rewind")
    file = tmp_path / "rewind_memory" / "memory.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"memory.safetensors is damaged"):
        RewindPoint.load(tmp_path / "rewind")


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 300),
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(width=32, allow_nan=False), max_size=5)),
)
def test_a_rewind_point_survives_the_disk(tmp_path_factory, epoch, memory):
    ticket = Ticket({"w": torch.ones(2)}, {}, ModelRef("user factory"), Provenance("toy"))
    point = RewindPoint(ticket, epoch, {name: torch.tensor(values) for name, values in memory.items()})
    folder = tmp_path_factory.mktemp("points") / "rewind"
    point.save(folder)
    found = RewindPoint.load(folder)
    assert (found.ticket.hash, found.epoch) == (ticket.hash, epoch)
    assert same(found.memory, point.memory)


def test_a_rewind_epoch_behind_the_end_is_refused_before_training(tmp_path):
    with opened(tmp_path / "run") as run, pytest.raises(ConfigError, match="starts at epoch 3"):
        trainer(run).dense(Method(), DENSE, rewind_epoch=3)


def test_the_board_gets_what_metrics_get(stage, tmp_path, monkeypatch):
    dense, _ = stage
    rows = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder

        def add_scalar(self, name, value, step):
            rows.append((self.folder, name, value, step))

        def close(self):
            pass

    monkeypatch.setattr("deploy_sparse.train.runtime.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with opened(tmp_path / "run") as run:
        trainer(run, tensorboard=True).train("rounds/1", dense.rewind, Method(), DENSE, keep="last")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    folder = str(tmp_path / "run" / "tensorboard" / "rounds/1")
    names = ("loss", "validation_accuracy", "learning_rate")
    assert rows == [(folder, name, row[name], row["epoch"]) for row in logged for name in names]


def kept(folder):
    return [path.name for path in folder.glob("checkpoints/*/step-*")]


def test_checkpoints_are_there_until_their_stage_is_saved(tmp_path):
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    seen = set()
    with opened(tmp_path / "run", poll=lambda *saved: seen.update(kept(tmp_path / "run"))) as run:
        dense = trainer(run, config).dense(Method(), DENSE, rewind_epoch=1)
        assert not (run.folder / "checkpoints").exists()
        trainer(run, config).train("rounds/1", dense.rewind, StaticMasks(MASKS), MASKS, keep="last")
        assert not (run.folder / "checkpoints").exists()
    assert seen


def test_a_run_killed_between_a_stage_and_its_checkpoints_sweeps_them_on_resume(tmp_path):
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    polls = []

    def poll(*saved):
        polls.append(1)
        if (tmp_path / "run" / "rounds" / "0").exists():
            raise Interrupted("stopped", signal_number=15, fix="go on")

    with pytest.raises(Interrupted), opened(tmp_path / "run", poll=poll) as run:
        trainer(run, config).dense(Method(), DENSE, rewind_epoch=1)
    assert polls
    assert kept(tmp_path / "run")
    before = Ticket.load(tmp_path / "run" / "rounds" / "0").hash
    other = tmp_path / "run" / "checkpoints" / "rounds-1"
    other.mkdir()
    with opened(tmp_path / "run") as run:
        assert trainer(run, config).dense(Method(), DENSE, rewind_epoch=1).last.hash == before
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [other]
