"""Chase: channels go on time and for good, the budget stays, and the ordinary surgery cuts exactly them."""

import pytest
import torch
from torch import nn

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.channel_schedule import ChannelSchedule, floors, share_of
from deploy_sparse.sparsify.chase import Chase
from deploy_sparse.sparsify.coupling import channel_pools, remove_, removed_channels
from deploy_sparse.sparsify.dst import initial_masks
from deploy_sparse.sparsify.exploration import Exploration, SoftBound
from deploy_sparse.sparsify.imp import dense_masks, head_of
from deploy_sparse.sparsify.umm import pool_scores
from deploy_sparse.surgery.compact import compact
from deploy_sparse.surgery.cost import layer_macs
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.zoo import build

WIDTHS, TOTAL = (16, 16, 32), 40
EXAMPLE = torch.zeros(2, 1, 8, 8)
SOFT = SoftBound(0.05, 30)
SCHEDULE = ChannelSchedule(0.5, 4, 2, 30)


def network():
    torch.manual_seed(0)
    return build("resnet_digits", widths=WIDTHS)


@pytest.fixture(scope="module")
def groups():
    return channel_groups(network(), (EXAMPLE,))


class Training:
    def __init__(self, groups, coupling="prune_skip", schedule=SCHEDULE, density=0.1, floor=0.2, **options):
        self.model, self.taken = network(), 0
        weights = dense_masks(self.model, head=True)
        given = {
            "interval": 4,
            "stop": TOTAL,
            "scope": "global",
            "fraction": 0.5,
            "final_fraction": 0.005,
            "soft": SOFT,
            **options,
        }
        self.pools = channel_pools(weights, groups, coupling, head=head_of(self.model))
        macs = layer_macs(self.model.eval(), (EXAMPLE[:1],))
        first = initial_masks(weights, density, "erk", 0)
        self.method = Chase(first, Exploration(**given), self.pools, schedule, floor=floor, seed=1, macs=macs)
        self.model.train()
        self.method.start_(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def steps(self, count):
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.taken)
            images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(images), labels).backward()
            self.method.after_backward_(self.model, self.taken)
            self.optimizer.step()
            self.method.after_step_(self.model, self.optimizer, self.taken)
            self.taken += 1
        return self

    def gone(self):
        return [removed_channels(self.method.masks, pool) for pool in self.pools]

    def alive(self):
        return sum(int(self.method.masks[name].sum()) for name in self.method.names)

    def ticket(self):
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        model = ModelRef("resnet_digits", {"widths": list(WIDTHS)}, (1, 8, 8))
        return Ticket(weights, {n: m.clone() for n, m in self.method.masks.items()}, model, Provenance("chase"))


@pytest.mark.parametrize("coupling", ["internal", "prune_skip"])
def test_channels_go_by_the_schedule_for_good_and_the_budget_stays(groups, coupling):
    training = Training(groups, coupling)
    size = sum(pool.size for pool in training.pools)
    least = floors([pool.size for pool in training.pools], 0.5, 0.2)
    budget, before = training.method.budget, training.gone()
    events = SCHEDULE.events()
    for taken in range(1, TOTAL + 1):
        training.steps(1)
        now = training.gone()
        assert all(bool((old <= new).all()) for old, new in zip(before, now, strict=True))  # nobody comes back
        last = max((event for event in events if event <= taken), default=None)
        assert sum(int(g.sum()) for g in now) == (share_of(SCHEDULE.target(last), size) if last else 0)
        assert all(int((~g).sum()) >= floor for g, floor in zip(now, least, strict=True))
        if taken % 4 == 0 or taken >= 30:  # after an update of the weights, and from the end of the soft bound on
            surplus = round(SOFT.at(taken) * training.method.total)
            assert training.alive() == budget + surplus
        assert training.method.ready(taken - 1) == (taken >= 30)
        before = now
    assert sum(int(g.sum()) for g in before) == share_of(0.5, size)  # exactly
    assert training.method.figures()["channels_left"] == pytest.approx(0.5, abs=1 / size)


def test_the_channels_with_the_lowest_mean_magnitude_go(groups):
    training = Training(groups, floor=0.0).steps(1)
    masks = {name: mask.clone() for name, mask in training.method.masks.items()}
    training.steps(1)  # taken 2: the first removal
    weights = dict(training.model.named_parameters())
    # what goes is zero now, so scores are compared among what the masks left before
    scored = Training(groups, floor=0.0).steps(1)
    kept = {name: mask.clone() for name, mask in masks.items()}
    scored.method.schedule = ChannelSchedule(0.0, 4, 2, 30)
    scored.steps(1)
    weights = {name: weight.detach() for name, weight in scored.model.named_parameters()}
    scores = torch.cat([pool_scores(pool, "umm", weights, kept) for pool in scored.pools])
    gone = torch.cat(training.gone())
    assert 0 < int(gone.sum()) < len(gone)
    assert float(scores[gone].max()) <= float(scores[~gone].min())


def test_the_last_removal_grows_its_weights_again_even_where_no_update_follows(groups):
    training = Training(groups, schedule=ChannelSchedule(0.5, 4, 2, 39), soft=None, stop=30)
    training.steps(39)
    assert training.alive() == training.method.budget
    assert sum(int(g.sum()) for g in training.gone()) == share_of(0.5, sum(pool.size for pool in training.pools))


def test_removed_positions_never_grow_again(groups):
    training = Training(groups, growth="random").steps(TOTAL)
    for pool, gone in zip(training.pools, training.gone(), strict=True):
        for part in pool.parts:
            channels = torch.tensor(part.channels)
            rows = (channels >= 0) & gone[channels.clamp(min=0)]
            parameter = training.model.get_parameter(part.name).movedim(part.dim, 0)
            assert bool((parameter[rows] == 0).all())


@pytest.mark.parametrize("coupling", ["internal", "prune_skip"])
def test_the_ordinary_surgery_cuts_the_removed_channels_exactly(groups, coupling):
    training = Training(groups, coupling).steps(TOTAL)
    small = compact(training.ticket(), network, (torch.randn(4, 1, 8, 8),), multiple=1)
    assert small.parity is not None  # raised otherwise
    sizes = dict(small.module.named_parameters())
    for pool, gone in zip(training.pools, training.gone(), strict=True):
        for rows in pool.writers:
            dense = len([c for c in rows.channels if c < 0]) + int((~gone).sum())
            assert sizes[rows.name].shape[0] <= dense  # channels that died by themselves may go too
    left = sum(training.method.masks[name].sum() for name in training.method.names)
    assert left == training.method.budget
    share = small.plan.cost_after.macs / small.plan.cost_before.macs
    assert share <= training.method.figures()["supported_flops"] + 1e-6
    assert share < 0.9


def test_without_channels_to_remove_it_is_dynamic_sparse_training_alone(groups):
    none = ChannelSchedule(0.0, 4, 2, 30)
    training = Training(groups, schedule=none).steps(TOTAL)
    assert set(training.method.masks) == set(training.method.names)  # biases and norms get no masks
    assert training.method.figures()["channels_left"] == 1.0
    assert training.method.figures()["supported_flops"] == 1.0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("stop", [1, 9, 14, 30, 33])
def test_a_restored_chase_goes_on_with_the_same_bits(groups, stop, scope):
    whole = Training(groups, scope=scope, gradient_batches=2).steps(TOTAL)
    first = Training(groups, scope=scope, gradient_batches=2).steps(stop)
    second = Training(groups, scope=scope, gradient_batches=2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.method.restore_({name: tensor.clone() for name, tensor in first.method.state().items()})
    second.taken = stop
    second.steps(TOTAL - stop)
    assert whole.ticket().hash == second.ticket().hash
    assert whole.method.figures() == second.method.figures()


def test_layer_by_layer_the_budget_is_spread_over_what_is_left(groups):
    training = Training(groups, scope="layer").steps(TOTAL)
    assert training.alive() == training.method.budget


def test_a_layer_whose_weights_all_went_with_channels_gets_new_ones(groups):
    training = Training(groups, density=0.004, floor=0.0).steps(TOTAL)
    assert all(bool(training.method.masks[name].any()) for name in training.method.names)
    assert training.alive() == training.method.budget


def test_where_less_is_left_than_the_budget_all_of_it_is_used(groups):
    training = Training(groups, density=0.9).steps(TOTAL)
    removed = {name: torch.ones_like(mask) for name, mask in training.method.masks.items()}
    for pool, gone in zip(training.pools, training.gone(), strict=True):
        remove_(removed, pool, gone)
    assert all(torch.equal(training.method.masks[name], removed[name]) for name in training.method.names)
    assert training.alive() < training.method.budget


@pytest.mark.parametrize(
    ("options", "message"),
    [({"criterion": "uum"}, "did you mean 'umm'"), ({"floor": 1.5}, "floor ratio 1.5")],
)
def test_nonsense_is_refused(groups, options, message):
    weights = dense_masks(network(), head=True)
    pools = channel_pools(weights, groups, "internal")
    with pytest.raises(ConfigError, match=message):
        Chase(initial_masks(weights, 0.2, "erk", 0), Exploration(4, TOTAL), pools, SCHEDULE, **options)


def test_a_network_without_channels_to_remove_is_refused():
    weights = {"weight": torch.ones(3, 4, dtype=torch.bool)}
    with pytest.raises(ConfigError, match="without channels that may go"):
        Chase(weights, Exploration(4, TOTAL), (), SCHEDULE)
