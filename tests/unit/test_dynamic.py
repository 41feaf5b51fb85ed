"""Dynamic sparse training of a caller's own network, in a loop of the caller's own."""

import pytest
import torch
from torch import nn

import deploy_sparse
from deploy_sparse.errors import ConfigError, SurgeryError, TicketError
from deploy_sparse.sparsify.chase import Chase
from deploy_sparse.sparsify.dst import DynamicMasks
from deploy_sparse.sparsify.exploration import PRESETS, Exploration, SoftBound
from deploy_sparse.structure import density
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

STEPS = 30


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


EXAMPLE = torch.randn(2, 3, 8, 8)


def trained(model, method, kind=torch.optim.AdamW):
    optimizer = kind(model.parameters(), lr=1e-2)
    method.start_(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        nn.functional.cross_entropy(model(images), labels).backward()
        method.after_backward_(model, step)
        optimizer.step()
        method.after_step_(model, optimizer, step)
    return Ticket(model.state_dict(), method.masks, ModelRef("mine", input_shape=(3, 8, 8)), Provenance("chase"))


@pytest.mark.parametrize(("coupling", "prunable"), [("internal", 16), ("prune_skip", 28)])
def test_chase_in_a_loop_of_ones_own(coupling, prunable):
    model = network()
    method = deploy_sparse.dynamic_sparsity(
        model, EXAMPLE, steps=STEPS, density=0.15, channels=0.5, interval=4, coupling=coupling
    )
    assert isinstance(method, Chase)
    assert method.channels == prunable
    ticket = trained(model, method)
    small = deploy_sparse.compact(ticket, factory=network)
    widths = [part.weight.shape[0] for part in small.module.modules() if isinstance(part, nn.Conv2d)]
    assert sum(widths) <= 28 - prunable // 2
    assert density({name: mask for name, mask in ticket.masks.items() if mask.dim() > 1}) == pytest.approx(
        0.15, abs=1e-3
    )
    assert method.figures()["channels_left"] == 0.5


class Gated(nn.Module):
    """Layers that the tracer names and leaves alone (a layer scale), beside channels that may go."""

    def __init__(self):
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.depth, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8)
        self.wide, self.back, self.head = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.scale * self.back(torch.relu(self.wide(self.norm(self.depth(x)))))
        return self.head(x.mean(dim=(2, 3)))


def test_what_the_tracer_does_not_understand_stays_and_the_rest_goes():
    model = Gated()
    method = deploy_sparse.dynamic_sparsity(model, EXAMPLE, steps=STEPS, density=0.3, channels=0.5, interval=4)
    assert [pool.name for pool in method.pools] == ["wide.weight"]
    small = deploy_sparse.compact(trained(model, method), factory=Gated)
    assert small.module.wide.weight.shape[0] <= 16


def test_a_layer_that_shares_its_weight_cannot_lose_channels():
    model = network()
    model[3] = nn.Conv2d(16, 16, 3, padding=1)
    model.insert(4, nn.Conv2d(16, 16, 3, padding=1))
    model[4].weight = model[3].weight
    model[-1] = nn.Linear(16, 10)
    with pytest.raises((TicketError, ConfigError, SurgeryError), match=r"shares?|tied|no parameter|may go"):
        deploy_sparse.dynamic_sparsity(model, EXAMPLE, steps=STEPS, channels=0.5, interval=4).start_(model)


def test_without_channels_it_moves_weights_only():
    model = network()
    method = deploy_sparse.dynamic_sparsity(model, EXAMPLE, steps=STEPS, density=0.2, exploration="rigl", interval=5)
    assert type(method) is DynamicMasks
    first = {name: mask.clone() for name, mask in method.masks.items()}
    ticket = trained(model, method, torch.optim.SGD)
    assert any(not torch.equal(mask, first[name]) for name, mask in ticket.masks.items())
    assert density(ticket.masks) == pytest.approx(0.2, abs=1e-3)


def test_it_leaves_the_network_as_it_was():
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deploy_sparse.dynamic_sparsity(model, EXAMPLE, steps=STEPS, channels=0.5, interval=4)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_settings_are_taken():
    own = Exploration(3, 20, growth="random")
    assert deploy_sparse.dynamic_sparsity(network(), EXAMPLE, steps=STEPS, exploration=own).exploration == own
    found = deploy_sparse.dynamic_sparsity(network(), EXAMPLE, steps=STEPS, exploration="set", epoch=6, exclude="0.*")
    assert found.exploration == PRESETS["set"](6, STEPS)
    assert "0.weight" not in found.masks
    chase = deploy_sparse.dynamic_sparsity(network(), EXAMPLE, steps=STEPS, channels=0.25, interval=4, until=0.5)
    assert (chase.schedule.sparsity, chase.schedule.interval, chase.schedule.offset, chase.schedule.until) == (
        0.25,
        4,
        2,
        15,
    )


def test_a_training_continues_exactly_when_weights_are_loaded_after_the_start():
    def made():
        torch.manual_seed(1)
        model = network()
        method = deploy_sparse.dynamic_sparsity(model, EXAMPLE, steps=STEPS, density=0.15, channels=0.5, interval=4)
        method.start_(model)
        return model, method, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def steps(model, method, optimizer, some):
        for step in some:
            generator = torch.Generator().manual_seed(step)
            images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            method.after_backward_(model, step)
            optimizer.step()
            method.after_step_(model, optimizer, step)

    whole = made()
    steps(*whole, range(STEPS))
    first = made()
    steps(*first, range(13))
    second = made()
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    second[1].restore_(first[1].state())
    steps(*second, range(13, STEPS))
    assert all(torch.equal(tensor, whole[0].state_dict()[name]) for name, tensor in second[0].state_dict().items())
    assert not first[1].ready(12)
    assert second[1].ready(STEPS - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exploration": "riggl"}, "did you mean 'rigl'"),
        ({"exploration": "rigl-itop"}, "updates every 4000 steps until step 30, in a training of 30"),
        ({"interval": 30}, "updates every 30 steps until step 30, in a training of 30"),
        ({"exploration": "mest"}, "updates every 1000 steps until step 24"),  # the end of its soft bound is no growth
        ({"steps": 1, "interval": 4}, "steps 1"),
        ({"steps": "30"}, "steps '30'"),
        ({"steps": 30.5}, "steps 30.5"),
        ({"interval": 0}, "interval 0"),
        ({"epoch": -1, "exploration": "set"}, "epoch -1"),
        ({"exploration": 3}, "unknown exploration 3"),
        ({"distribution": "global", "interval": 4}, "unknown distribution 'global'"),
        ({"coupling": "typo", "interval": 4}, "unknown coupling 'typo'"),  # also without channels
        ({"criterion": "uum", "interval": 4}, "did you mean 'umm'"),
        ({"seed": 2**32, "interval": 4}, "seed 4294967296"),
        (
            {"exploration": Exploration(4, 30, soft=SoftBound(0.1, 31))},
            "a soft bound until step 31 in a training of 30",
        ),
        ({"until": 1.5, "interval": 4, "channels": 0.5}, "until 1.5"),
        ({"until": 0.0, "interval": 4, "channels": 0.5}, "until 0.0"),
        ({"until": 0.03, "interval": 4, "channels": 0.5}, "more than one removal"),
        ({"density": 0.0, "interval": 4}, "density 0.0"),
        ({"channels": 1.0, "interval": 4}, "channel sparsity 1.0"),
        ({"channels": 0.5, "interval": 4, "criterion": "l1"}, "unknown channel score 'l1'"),
        ({"channels": 0.5, "interval": 4, "coupling": "inside"}, "coupling 'inside'"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        deploy_sparse.dynamic_sparsity(network(), EXAMPLE, **{"steps": STEPS, **options})
