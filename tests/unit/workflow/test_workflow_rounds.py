"""The rounds of IMP and of the other sources, with a trainer that only writes down what it was asked for."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.config import config_from
from deploy_sparse.data import load
from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.structure import Channels, Dense, density, row_density, structure_of
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.train.runtime import CPU
from deploy_sparse.train.schedule import FitConfig
from deploy_sparse.train.tickets import DenseStage, RewindPoint
from deploy_sparse.workflow import finish, rounds
from deploy_sparse.workflow.config import ImpConfig, StudyConfig, check_imp, check_study, rewind_epoch
from deploy_sparse.workflow.finish import choose
from deploy_sparse.workflow.prepare import Work
from deploy_sparse.workflow.refilled import RefillConfig, refilled
from deploy_sparse.workflow.rounds import mask_rounds

WIDTHS = (16, 16, 32)


class Trainer:
    """Answers every training with other weights, masked, and remembers the calls."""

    def __init__(self, factory):
        self.factory, self.calls = factory, []

    def train(self, name, start, method, masks, *, keep):
        self.calls.append(SimpleNamespace(name=name, start=start, masks=dict(masks), keep=keep))
        return ticket(len(self.calls), masks)


def network():
    torch.manual_seed(0)
    return zoo.build("resnet_digits", widths=WIDTHS)


def ticket(seed, masks):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in network().state_dict().items()
    }
    weights = {name: t.abs() if name.endswith("running_var") else t for name, t in weights.items()}
    weights = {name: t * masks[name] if name in masks else t for name, t in weights.items()}
    return Ticket(weights, dict(masks), ModelRef("resnet_digits", {"widths": WIDTHS}, (1, 8, 8)), Provenance("test"))


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0)


@pytest.fixture
def study(digits):
    config = StudyConfig(fit=FitConfig(epochs=20))
    work = Work(SimpleNamespace(), config, CPU, digits, Trainer(network))
    masks = dense_masks(network())
    rewind = RewindPoint(ticket(100, {}), 3, {"momentum_buffer/fc.weight": torch.ones(1)})
    return work, DenseStage(ticket(101, {}), ticket(102, masks), rewind, ticket(103, {}))


def no_structure(found):
    pytest.fail("asked to structure masks")


def run(study, wanted, structure=no_structure, **options):
    work, dense = study
    found = list(mask_rounds(work, dense, config_from(ImpConfig, options), wanted, structure))
    return found, work.trainer.calls


def test_every_round_has_its_density_and_starts_from_the_rewind_point_with_its_optimizer(study):
    found, calls = run(study, (2, 5))
    assert [r.number for r in found] == [1, 2, 3, 4, 5]
    assert [c.name for c in calls] == [f"rounds/{n}" for n in range(1, 6)]
    for each, call in zip(found, calls, strict=True):
        assert density(each.masks) == pytest.approx(0.8**each.number, abs=1e-3)
        assert call.start is each.start is study[1].rewind
        assert call.keep == "last"
        assert each.trained.masks.keys() == each.masks.keys()


def test_the_codes_retraining_has_a_fresh_optimizer_and_the_whole_schedule(study):
    found, _ = run(study, (1,), retrain="full")
    assert (found[0].start.epoch, dict(found[0].start.memory)) == (0, {})
    assert found[0].start.ticket is study[1].rewind.ticket


def test_finetuning_goes_on_from_the_weights_of_the_round_before(study):
    found, calls = run(study, (2,), rewind="finetune")
    assert calls[0].start.ticket is study[1].last
    assert calls[1].start.ticket is found[0].trained
    assert found[1].start.ticket is found[1].trained  # where the structural ticket starts
    assert {c.start.epoch for c in calls} == {0}


@pytest.mark.parametrize("source", ["random", "magnitude", "snip", "grasp", "synflow"])
def test_one_shot_sources_prune_only_where_a_ticket_is_wanted(study, source):
    found, calls = run(study, (2, 4), source=source)
    assert [c.name for c in calls] == ["rounds/2", "rounds/4"]
    for each in found:
        assert density(each.masks) == pytest.approx(0.8**each.number, abs=5e-3)  # SynFlow in a hundred steps


def test_one_shot_magnitude_looks_at_the_trained_network_and_the_others_at_the_initial_one(study):
    _, calls = run(study, (4,), source="magnitude", distribution="uniform")
    name = "stages.0.0.conv1.weight"
    weights = study[1].last.weights[name].abs()
    kept = calls[0].masks[name]
    assert weights[kept].min() > weights[~kept].max()


def test_two_rounds_of_the_random_source_are_drawn_differently(study):
    found, _ = run(study, (1, 2), source="random")
    first, second = (r.masks["stages.0.0.conv1.weight"] for r in found)
    assert bool((second & ~first).any())


@pytest.mark.parametrize(
    "rule",
    [{}, {"coupling": "group"}, {"silent": False}, {"extra": 0.2}, {"multiple": 8, "coupling": "group"}],
    ids=["layer", "group", "rows only", "extra", "multiple"],
)
def test_group_aware_rounds_train_structural_masks_at_the_pace_of_imp(study, rule):
    """Eight rounds: neither silence hastens them nor rounding up stalls them, in the network or in one layer."""
    work, _ = study
    config = RefillConfig(**rule)
    shares = {}

    def structure(found):
        shares[found.number] = found.shares
        return refilled(work, config, found)

    found, calls = run(study, (8,), structure, group_aware=True)
    prunable = dense_masks(network())
    for each, call in zip(found, calls, strict=True):
        weights = {name: call.masks[name] for name in prunable}
        assert all(isinstance(structure_of(mask), Channels | Dense) for mask in weights.values())
        budget = sum(float(shares[each.number][n]) * m.numel() for n, m in weights.items())
        total = sum(m.numel() for m in weights.values())
        assert budget / total == pytest.approx(0.8**each.number, rel=0.15)
        assert row_density(weights) >= budget / total - 1e-9  # rounded up, never down
    last = {name: float(share) for name, share in shares[8].items() if prunable[name].numel() > 1000}
    assert max(last.values()) < 6 * min(last.values())  # drawn weights of one scale: no layer bears it all


def test_refill_scores_with_the_rounds_own_weights_under_every_criterion(study):
    work, _ = study
    found, _ = run(study, (2,))
    tickets = {
        criterion: refilled(work, RefillConfig(criterion=criterion, score_batches=1), found[-1])
        for criterion in ("l1", "survivors", "activation_l1", "activation_l2", "saliency")
    }
    shares = {name: row_density({k: m for k, m in masks.items() if m.dim() > 2}) for name, masks in tickets.items()}
    assert len(set(shares.values())) == 1  # the criterion decides which channels stay, never how many
    name = "stages.2.0.conv1.weight"
    assert len({tuple(masks[name].any(dim=(1, 2, 3)).tolist()) for masks in tickets.values()}) > 1
    groups = channel_groups(network(), (torch.zeros(2, 1, 8, 8),))
    assert len(work.groups) == len(groups)


@pytest.mark.parametrize("source", ["snip", "grasp", "synflow"])
def test_the_other_data_driven_sources_look_at_the_initial_network(study, source, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rounds, "source_masks", lambda name, model, masks, density, **rest: seen.append((model, rest)) or masks
    )
    run(study, (1,), source=source)
    ((model, rest),) = seen
    assert torch.equal(model.state_dict()["conv1.weight"], study[1].initial.weights["conv1.weight"])
    train = {
        tuple(image.flatten().tolist()) for image in study[0].data.train.read(torch.arange(len(study[0].data.train)))
    }
    for images, _ in rest["batches"]:
        assert all(tuple(image.flatten().tolist()) in train for image in images)


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({1: 0.95, 2: 0.951, 3: 0.90}, 2),  # the sparsest within the tolerance
        ({1: 0.80, 2: 0.90, 3: 0.85}, 2),  # none is: the most accurate
        ({1: 0.80, 2: 0.90, 3: 0.90}, 3),  # of equals the sparser
    ],
)
def test_the_sparsest_good_ticket_is_chosen_on_validation(study, accuracies, chosen):
    _, dense = study
    prunable = dense_masks(network())

    def made(number, kept):
        masks = {
            name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < kept
            for name, mask in prunable.items()
        }
        found = ticket(number, masks)
        return replace(found, provenance=Provenance("test", metrics={"validation_accuracy": accuracies[number]}))

    baseline = replace(dense.best, provenance=Provenance("test", metrics={"validation_accuracy": 0.955}))
    stage = replace(dense, best=baseline)
    assert choose(stage, {1: made(1, 0.8), 2: made(2, 0.5), 3: made(3, 0.3)}, 0.005) == chosen
    swapped = {1: made(1, 0.3), 2: made(2, 0.5), 3: made(3, 0.8)}  # a later round may be denser
    if chosen == 2 and accuracies[1] == 0.95:
        assert choose(stage, swapped, 0.005) == 1


def test_what_is_deployed_is_judged_on_the_test_split(study, monkeypatch, tmp_path):
    work, dense = study
    asked = {}
    monkeypatch.setattr(finish, "deliver", lambda **arguments: asked.update(arguments) or {})
    run_of = SimpleNamespace(folder=tmp_path, origin="", poll=lambda: None, console=SimpleNamespace(say=print))
    finish.deploy(replace(work, run=run_of), dense.best, None, "title", [])
    seen = []
    asked["evaluate"](lambda images: seen.append(images) or torch.zeros(len(images), 10))
    test = work.data.test
    assert torch.equal(torch.cat(seen), test.read(torch.arange(len(test))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": "lt", "rewind_epoch": 3}, "imp.rewind_epoch = 3 with imp.rewind = 'lt'"),
        ({"rewind": "finetune", "rewind_epoch": 3}, "imp.rewind_epoch = 3 with imp.rewind = 'finetune'"),
        ({"distribution": "erk"}, "imp.distribution = 'erk' with imp.source = 'imp'"),
        ({"source": "snip", "group_aware": True}, "imp.group_aware with imp.source = 'snip'"),
        ({"source": "snip", "rewind": "finetune"}, "imp.rewind = \"finetune\" with imp.source = 'snip'"),
        ({"rewind_epoch": 20}, "imp.rewind_epoch = 20 with fit.epochs = 20"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_imp(StudyConfig(), config_from(ImpConfig, options), (), "refill.rounds")


def test_milestones_without_the_step_schedule_are_refused():
    with pytest.raises(ConfigError, match=re.escape("fit.milestones = [3] with fit.schedule = 'cosine'")):
        check_study(StudyConfig(fit=FitConfig(milestones=(3,))))


@pytest.mark.parametrize(
    ("options", "epoch"),
    [({}, 1), ({"rewind_epoch": 7}, 7), ({"rewind_fraction": 0.5}, 10), ({"rewind": "lt", "rewind_epoch": 7}, 0)],
)
def test_the_rewind_epoch(options, epoch):
    assert rewind_epoch(FitConfig(epochs=20), ImpConfig(**options)) == epoch
