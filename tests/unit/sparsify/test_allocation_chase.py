"""Chase towards a latency: time falls on schedule, channels go for good, and surgery cuts exactly them."""

import pytest
import torch
from allocation_samples import Times
from torch import nn

from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.allocation import LatencyBudget
from deploy_sparse.sparsify.channel_schedule import ChannelSchedule
from deploy_sparse.sparsify.chase_latency import LatencyChase
from deploy_sparse.sparsify.coupling import channel_pools, removed_channels
from deploy_sparse.sparsify.dst import initial_masks
from deploy_sparse.sparsify.exploration import Exploration, SoftBound
from deploy_sparse.sparsify.imp import dense_masks, head_of
from deploy_sparse.sparsify.widths import layer_widths
from deploy_sparse.surgery.compact import compact
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.zoo import build

WIDTHS, TOTAL, UNTIL = (16, 16, 32), 40, 30
EXAMPLE = torch.zeros(2, 1, 8, 8)


def network():
    torch.manual_seed(0)
    return build("resnet_digits", widths=WIDTHS)


def dense_widths(module):
    layers = {p: m for p, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {p: tuple(reversed(m.weight.shape[:2])) for p, m in layers.items()}


@pytest.fixture(scope="module")
def groups():
    return channel_groups(network(), (EXAMPLE,))


class Training:
    def __init__(self, groups, share=0.5, coupling="prune_skip", floor=0.2, multiple=4):
        self.model, self.taken = network(), 0
        weights, self.dense = dense_masks(self.model, head=True), dense_widths(self.model)
        self.times = Times({path: 1e-4 for path in self.dense})
        self.budget = LatencyBudget(share * self.times.network_ms(self.dense), self.times, self.dense, multiple)
        self.pools = channel_pools(weights, groups, coupling, head=head_of(self.model))
        self.layers = layer_widths(self.pools, groups, self.dense)
        moves = Exploration(
            interval=4, stop=TOTAL, scope="global", fraction=0.5, final_fraction=0.005, soft=SoftBound(0.05, UNTIL)
        )
        self.method = LatencyChase(
            initial_masks(weights, 0.2, "erk", 0), moves, self.pools, ChannelSchedule(0.5, 4, 2, UNTIL), groups, self.budget,
            floor=floor, seed=1,
        )  # fmt: skip
        self.model.train()
        self.method.start_(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

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

    def ms(self):
        gone = {n: int(removed_channels(self.method.masks, pool).sum()) for n, pool in enumerate(self.pools)}
        return self.times.network_ms({layer.path: layer.at(gone) for layer in self.layers})


def test_the_time_falls_on_schedule_and_ends_within_the_budget(groups):
    training = Training(groups)
    dense, limit, seen = training.ms(), training.budget.ms, []
    for _ in range(TOTAL):
        training.steps(1)
        share = 1 - (1 - min(1.0, training.taken / UNTIL)) ** 3
        if training.method.schedule.due(training.taken):
            assert training.ms() <= dense - share * (dense - limit) + 1e-9
        seen.append(training.ms())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] <= limit
    assert seen[-1] > 0.85 * limit  # what the multiple leaves unused
    assert len(set(seen)) > 3


def test_what_goes_stays_away_and_the_weights_budget_is_kept(groups):
    training = Training(groups).steps(10)
    before = [removed_channels(training.method.masks, pool) for pool in training.pools]
    training.steps(TOTAL - 10)
    after = [removed_channels(training.method.masks, pool) for pool in training.pools]
    assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
    assert sum(int(mask.sum()) for mask in after) > sum(int(mask.sum()) for mask in before) > 0
    alive = sum(int(training.method.masks[name].sum()) for name in training.method.names)
    room = sum(int(training.method._allowed[name].sum()) for name in training.method.names)
    assert alive == min(training.method.budget, room)


def test_surgery_cuts_the_widths_that_the_budget_paid_for(groups):
    training = Training(groups).steps(TOTAL)
    weights = {name: tensor.detach().clone() for name, tensor in training.model.state_dict().items()}
    masks = {name: mask.clone() for name, mask in training.method.masks.items()}
    ticket = Ticket(weights, masks, ModelRef("resnet_digits", {"widths": list(WIDTHS)}, (1, 8, 8)), Provenance("chase"))
    found = dense_widths(compact(ticket, network).module)
    assert training.times.network_ms(found) <= training.budget.ms


def test_a_floor_is_a_share_of_what_an_even_budget_keeps(groups):
    even = Training(groups, floor=1.0, multiple=1)
    kept = [pool.size - int(removed_channels(even.steps(TOTAL).method.masks, pool).sum()) for pool in even.pools]
    assert all(count >= low for count, low in zip(kept, even.method._floors, strict=True))
    assert max(low / pool.size for low, pool in zip(even.method._floors, even.pools, strict=True)) < 1
    free = Training(groups, floor=0.0, multiple=1)
    assert set(free.method._floors) == {1}


def test_a_budget_that_channels_inside_blocks_cannot_reach_is_refused_at_once(groups):
    with pytest.raises(ConfigError, match=r"a latency budget of .*\n.*at least .* ms"):
        Training(groups, share=0.1, coupling="internal")


def test_a_state_that_is_taken_up_goes_on_alike(groups):
    whole = Training(groups).steps(TOTAL)
    first = Training(groups).steps(14)
    state = {name: tensor.clone() for name, tensor in first.method.state().items()}
    again = Training(groups)
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.method.restore_(state)
    again.taken = 14
    again.steps(TOTAL - 14)
    assert all(torch.equal(mask, again.method.masks[name]) for name, mask in whole.method.masks.items())
