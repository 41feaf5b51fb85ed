"""Stages without a dense training, with masks the method chose, and with BatchNorm statistics measured anew."""

import json
from dataclasses import replace

import pytest
import torch
from test_train_tickets import DENSE, opened, trainer
from torch import nn
from train_samples import CONFIG, MASKS, Moving, StopAfter, network, same, splits

from deploy_sparse.data.batches import train_batches
from deploy_sparse.errors import ArtifactError, ConfigError, Interrupted
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.ticket import Ticket
from deploy_sparse.train import loop
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.tickets import RewindPoint

ADAM = CONFIG.model_copy(update={"optimizer": "adamw", "lr": 0.01, "decay_norms": False})


@pytest.fixture
def falling(monkeypatch):
    """Validation accuracies that fall from epoch to epoch."""
    monkeypatch.setattr(loop, "accuracy", lambda model, *_, **__: 1.0 - int(model[1].num_batches_tracked) / 100)


def test_the_initial_stage_is_the_network_itself_and_the_start_of_the_dense_training(tmp_path):
    with opened(tmp_path / "run") as run:
        first = trainer(run).initial()
        whole = trainer(run).train("whole", first, Method(), DENSE, keep="last")
        again = trainer(run).initial()
        dense = trainer(run).dense(Method(), DENSE, rewind_epoch=1)
        last = trainer(run).initial()
    assert same(first.ticket.weights, network().state_dict())
    assert (first.epoch, dict(first.memory), first.ticket.masks) == (0, {}, {})
    assert len({point.ticket.hash for point in (first, again, last)} | {dense.initial.hash}) == 1
    assert Ticket.load(tmp_path / "run" / "initial").hash == first.ticket.hash
    assert same(whole.weights, dense.last.weights)


def test_the_dense_stage_leaves_the_initial_one_too(tmp_path):
    with opened(tmp_path / "run") as run:
        dense = trainer(run).dense(Method(), DENSE, rewind_epoch=0)
        assert trainer(run).initial().ticket.hash == dense.initial.hash


def test_an_initial_stage_of_another_configuration_is_refused(tmp_path):
    with opened(tmp_path / "run") as run:
        trainer(run).initial()
        with pytest.raises(ArtifactError, match=r"initial is a ticket of another configuration"):
            trainer(run, CONFIG.model_copy(update={"epochs": 2})).initial()


def test_masks_that_the_method_chose_are_those_of_the_kept_weights(tmp_path, falling):
    with opened(tmp_path / "run") as run:
        start = trainer(run).initial()
        best = trainer(run).train("best", start, Moving(5), None, keep="best")
        last = trainer(run).train("last", start, Moving(5), None, keep="last")
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert trainer(run).train("best", start, Moving(5), None, keep="best").hash == best.hash  # loaded
    assert best.provenance.metrics["best_epoch"] == 1
    for ticket, other in ((best, last), (last, best)):
        assert bool((ticket.weights["0.weight"][~ticket.masks["0.weight"]] == 0).all())
        assert bool((ticket.weights["0.weight"][~other.masks["0.weight"]] != 0).any())
    assert all(row["moved"] > 0 for row in rows)


@pytest.mark.parametrize("config", [CONFIG, ADAM], ids=["sgd", "adamw"])
def test_an_interrupted_run_of_moving_masks_ends_with_the_same_ticket(tmp_path, falling, config):
    def ticket(run):
        making = trainer(run, config)
        return making.train("moving", making.initial(), Moving(5), None, keep="best").hash

    with opened(tmp_path / "whole") as run:
        whole = ticket(run)
    for polls in (4, 5, 5):  # three trainings of a few steps; the other polls are between stages
        with pytest.raises(Interrupted), opened(tmp_path / "run", StopAfter(polls)) as run:
            ticket(run)
    with opened(tmp_path / "run") as run:
        assert ticket(run) == whole


def test_chosen_masks_of_another_start_are_refused(tmp_path):
    with opened(tmp_path / "run") as run:
        start = trainer(run).initial()
        trainer(run).train("moving", start, Moving(), None, keep="last")
        for other in (replace(start, epoch=1), RewindPoint(replace(start.ticket, masks=DENSE))):
            with pytest.raises(ArtifactError, match=r"was made from another rewind point"):
                trainer(run).train("moving", other, Moving(), None, keep="last")


def masked_ticket(run):
    """A ticket whose weights behind the masks are not zero, and statistics of its own."""
    ticket = trainer(run).train("t", trainer(run).initial(), StaticMasks(MASKS), MASKS, keep="last")
    weight = torch.where(MASKS["0.weight"], ticket.weights["0.weight"], 3.0)
    return replace(ticket, weights={**ticket.weights, "0.weight": weight})


@pytest.mark.parametrize("count", [1, 2, None, 100])
def test_reestimated_statistics_are_those_of_the_masked_network_on_plain_images(tmp_path, count):
    with opened(tmp_path / "run") as run:
        ticket = masked_ticket(run)
        found = trainer(run).reestimated("reestimated", ticket, batches=count)
    images = [part for part, _ in train_batches(splits().train, CONFIG.batch_size, seed=3, epoch=0)][:count]
    model = network()
    model.load_state_dict(ticket.masked_weights())
    with torch.no_grad():
        seen = [model[0](part) for part in images]
    torch.testing.assert_close(found.weights["1.running_mean"], torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    torch.testing.assert_close(found.weights["1.running_var"], torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0))
    assert int(found.weights["1.num_batches_tracked"]) == len(images) == min(count or 3, 3)
    changed = {name for name, value in found.weights.items() if not torch.equal(value, ticket.weights[name])}
    assert changed <= {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert {"1.running_mean", "1.running_var"} <= changed
    assert same(found.masks, ticket.masks)


def test_a_reestimated_ticket_says_where_it_is_from_and_how_good_it_is(tmp_path):
    with opened(tmp_path / "run") as run:
        ticket = masked_ticket(run)
        found = trainer(run).reestimated("reestimated", ticket, batches=None)
        again = trainer(run).reestimated("reestimated", ticket, batches=None)
    assert found.provenance.parent == ticket.hash
    model = network()
    model.load_state_dict(found.masked_weights())
    expected = accuracy(model, splits().validation)
    assert found.provenance.metrics == {**ticket.provenance.metrics, "validation_accuracy": expected}
    assert again.hash == found.hash == Ticket.load(tmp_path / "run" / "reestimated").hash


def test_what_cannot_be_reestimated_is_refused(tmp_path):
    with opened(tmp_path / "run") as run:
        ticket = masked_ticket(run)
        with pytest.raises(ConfigError, match="from no batch"):
            trainer(run).reestimated("reestimated", ticket, batches=0)
        trainer(run).reestimated("reestimated", ticket, batches=1)
        with pytest.raises(ArtifactError, match=r"reestimated was made from another ticket[\s\S]*remove "):
            trainer(run).reestimated("reestimated", replace(ticket, masks={}), batches=1)

        def plain():
            model = network()
            model[1] = nn.Identity()
            return model

        bare = replace(trainer(run), factory=plain)
        weights = {name: value for name, value in ticket.weights.items() if not name.startswith("1.")}
        with pytest.raises(ConfigError, match="without BatchNorm"):
            bare.reestimated("bare", replace(ticket, weights=weights), batches=None)


def test_a_reestimation_can_be_stopped_and_made_again(tmp_path):
    with opened(tmp_path / "run") as run:
        ticket = masked_ticket(run)
        whole = trainer(run).reestimated("whole", ticket, batches=None)
    with pytest.raises(Interrupted), opened(tmp_path / "run", StopAfter(2)) as run:
        trainer(run).reestimated("stopped", ticket, batches=None)
    with opened(tmp_path / "run") as run:
        assert trainer(run).reestimated("stopped", ticket, batches=None).hash == whole.hash
