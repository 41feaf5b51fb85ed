"""The rounds of IMP and of the other sources, with a trainer that only writes down what it was asked for."""

from types import SimpleNamespace

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.config import config_from
from deploy_sparse.data import load
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.structure import Channels, Dense, density, row_density, structure_of
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.train.runtime import CPU
from deploy_sparse.train.schedule import FitConfig
from deploy_sparse.train.tickets import DenseStage, RewindPoint
from deploy_sparse.workflow.config import ImpConfig, StudyConfig, rewind_epoch
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
    rewind = RewindPoint(ticket(100, {}), 3, {"fc.weight": torch.ones(1)})
    return work, DenseStage(ticket(101, {}), ticket(102, masks), rewind, ticket(103, {}))


def no_structure(found, *, silent):
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
    assert (found[0].start.epoch, dict(found[0].start.momentum)) == (0, {})
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


@pytest.mark.parametrize("coupling", ["layer", "group"])
def test_group_aware_rounds_train_structural_masks_at_the_pace_of_imp(study, coupling):
    work, _ = study
    rule = RefillConfig(coupling=coupling)
    found, calls = run(
        study, (4,), lambda found, *, silent: refilled(work, rule, found, silent=silent), group_aware=True
    )
    prunable = dense_masks(network())
    for each, call in zip(found, calls, strict=True):
        weights = {name: call.masks[name] for name in prunable}
        assert all(isinstance(structure_of(mask), Channels | Dense) for mask in weights.values())
        assert row_density(weights) == pytest.approx(0.8**each.number, abs=0.09)  # a channel in 16 is 0.06
    assert density({n: calls[-1].masks[n] for n in prunable}) < density({n: calls[0].masks[n] for n in prunable})


def test_refill_scores_with_the_rounds_own_weights_under_every_criterion(study):
    work, _ = study
    found, _ = run(study, (2,))
    tickets = {
        criterion: refilled(work, RefillConfig(criterion=criterion, score_batches=1), found[-1], silent=True)
        for criterion in ("l1", "survivors", "activation_l1", "activation_l2", "saliency")
    }
    shares = {name: row_density({k: m for k, m in masks.items() if m.dim() > 2}) for name, masks in tickets.items()}
    assert len(set(shares.values())) == 1  # the criterion decides which channels stay, never how many
    name = "stages.2.0.conv1.weight"
    assert len({tuple(masks[name].any(dim=(1, 2, 3)).tolist()) for masks in tickets.values()}) > 1
    groups = channel_groups(network(), (torch.zeros(2, 1, 8, 8),))
    assert len(work.groups) == len(groups)


@pytest.mark.parametrize(
    ("options", "epoch"),
    [({}, 1), ({"rewind_epoch": 7}, 7), ({"rewind_fraction": 0.5}, 10), ({"rewind": "lt", "rewind_epoch": 7}, 0)],
)
def test_the_rewind_epoch(options, epoch):
    assert rewind_epoch(FitConfig(epochs=20), ImpConfig(**options)) == epoch
