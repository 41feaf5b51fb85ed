"""A planner with made-up times, and the tickets it decides on."""

import torch
from torch import nn

from deploy_sparse.engine.target import load_target
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import formats
from deploy_sparse.tune.choice import NetworkTime
from deploy_sparse.tune.formats import choose_format

CPU = load_target("cpu")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EVEN, ODD = torch.arange(0, 32, 2), torch.arange(1, 32, 2)


def network():
    torch.manual_seed(0)
    layers = [
        layer for c in (3, 32, 32, 32) for layer in (nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()


def ticket(crossing=("9",)):
    """Disjoint blocks for three layers; those of ``crossing`` read the halves that no other layer writes."""
    masks = {}
    for path in ("3", "6", "9"):
        mask = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
        reads = (torch.arange(16), torch.arange(16, 32)) if path in crossing else (EVEN, ODD)
        for rows, columns in zip((EVEN, ODD), reads, strict=True):
            mask[rows[:, None], columns] = True
        masks[f"{path}.weight"] = mask
    return Ticket(network().state_dict(), masks, ModelRef("user factory", {}, (3, 8, 8)), Provenance("test"))


class FakeBench:
    """Says what each layer's time is, and remembers what it was asked."""

    def __init__(self, ratios):
        self.ratios_of, self.asked = ratios, []

    def __call__(self, target, batch, duration_s, cache, poll):
        self.batch = batch
        return self

    def ratios(self, forms):
        self.asked.append([str(form) for form in forms])
        return [self.ratios_of(form) for form in forms]


class FakeNetworks:
    """Says what each network's times are, by name and how often it was asked before; fails to build what it is told."""

    def __init__(self, times, fails=None):
        self.times_of, self.fails, self.built, self.asked = times, fails or {}, {}, []

    def __call__(self, target, batches, duration_s, scratch, poll):
        self.batches = batches
        return self

    def add(self, name, network):
        if name in self.fails:
            raise self.fails[name](f"no engine of {name}\nand more", expected="one", fix="none")
        self.built[name] = network

    def times(self, names):
        assert self.built.keys() >= {"dense", *names}
        self.asked.append(list(names))
        if not names:
            self.times_of("dense", 0)
        before = [sum(name in asked for asked in self.asked) - 1 for name in names]
        return tuple(
            NetworkTime(name, 1, *self.times_of(name, count)) for name, count in zip(names, before, strict=True)
        )


WON, LOST = (1.5, 1.4, 1.6), (0.9, 0.8, 0.95)


def choose(monkeypatch, ratios, networks, *, crossing=("9",), made=None, fails=None, **options):
    """The planner with made-up times: of layers by their form, of networks by name and count."""
    bench, built = FakeBench(ratios), FakeNetworks(networks, fails)
    monkeypatch.setattr(formats, "LayerBench", bench)
    monkeypatch.setattr(formats, "NetworkBench", built)
    said = []
    found, choice = choose_format(made or ticket(crossing), network, CPU, X, say=said.append, **options)
    return found, choice, bench, built, said


def with_a_cut():
    """Five channels go, as one carries constants; four where widths are multiples of 4."""
    made = ticket()
    mask = made.masks["3.weight"].clone()
    mask[:6] = False
    return Ticket(made.weights, {**made.masks, "3.weight": mask}, made.model, made.provenance)


def gains(ratios):
    return lambda form: ratios[form.path]


def packed(found):
    return found.plan.shape.packed
