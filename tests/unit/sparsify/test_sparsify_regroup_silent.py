"""Regroup in a whole network: what empty rows leave without a purpose is masked, and blocks read live channels only."""

import math

import pytest
import torch
from torch import nn

from deploy_sparse.sparsify.regroup import RegroupRule, regroup
from deploy_sparse.sparsify.silence import silence
from deploy_sparse.structure import Blocks, Channels, Dense, row_blocks, structure_of
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


class Net(nn.Module):
    """Stem, a residual block, a depthwise layer and a classifier."""

    def __init__(self, width=64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.two(self.one(x)))
        return self.head(torch.relu(self.depth(x)).mean(dim=(2, 3)))


NAMES = ("stem.0.weight", "one.0.weight", "two.0.weight", "depth.weight")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Net().eval()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    masks = {}
    for name in NAMES:
        scale = torch.rand(len(weights[name]), generator=torch.Generator().manual_seed(1)).reshape(-1, 1, 1, 1)
        score = weights[name].abs() * (0.2 + scale)
        masks[name] = score > score.flatten().quantile(0.7)
    masks["one.0.weight"][::4] = False  # channels nobody writes
    return model, weights, masks, channel_groups(model, torch.zeros(1, 3, 8, 8))


RULES = (
    RegroupRule(tile=16),
    RegroupRule(tile=16, columns="channel", min_nonzeros=8, empty="prune"),
    RegroupRule("code", tile=16),
    RegroupRule("budget", tile=16, columns="channel", multiple=4),
    RegroupRule("budget", tile=16, blocks="equal", columns="channel"),
    RegroupRule("paper", tile=16, blocks="equal", empty="prune"),
    RegroupRule("budget", tile=16, blocks="disjoint", columns="channel"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.rule}-{r.blocks}-{r.columns}")
def test_the_result_is_silent_valid_and_structured(network, rule):
    model, weights, masks, groups = network
    found = regroup(masks, weights, groups, rule=rule)
    again = silence(found.masks, weights, groups)
    assert all(torch.equal(again[name], mask) for name, mask in found.masks.items())
    Ticket(weights, found.masks, ModelRef("net"), Provenance("test")).validate(model)
    for report in found.layers:
        after = found.masks[report.name]
        assert isinstance(structure_of(after), Dense | Channels | Blocks)
        assert report.after == int(after.sum())
        if rule.blocks != "free" and report.blocks > 1:
            disjoint = rule.blocks == "disjoint"
            assert len(set(report.columns)) == 1 or disjoint
            assert max(report.rows) - min(report.rows) <= 1 if disjoint else math.gcd(*report.rows) >= rule.tile
    assert [report.outcome for report in found.layers][3] == "dense"  # depthwise


def test_blocks_hold_no_channel_that_nobody_writes(network):
    _, weights, masks, groups = network
    dead = ~masks["one.0.weight"].flatten(1).any(dim=1)
    for rule in (RegroupRule("budget", tile=16), RegroupRule("budget", tile=16, columns="channel", blocks="equal")):
        loud = regroup(masks, weights, groups, rule=rule, silent=False).masks
        quiet = regroup(masks, weights, groups, rule=rule).masks
        if rule.blocks == "free":
            assert not quiet["one.0.weight"][dead].any()
            assert not quiet["one.0.bias"][dead].any()
            assert not quiet["one.1.weight"][dead].any()
            assert quiet["one.1.weight"][~dead].all()
        assert "one.1.weight" not in loud
        written = quiet["one.0.weight"].flatten(1).any(dim=1)
        assert not quiet["two.0.weight"][:, ~written].any()
        # and the places are given to others
        assert row_blocks(quiet["two.0.weight"]) != row_blocks(loud["two.0.weight"] & written[None, :, None, None])


def test_norms_of_an_earlier_round_are_made_anew(network):
    """Group-aware IMP: a channel silenced before gets its norm back when its row is filled up again."""
    _, weights, masks, groups = network
    stale = masks | {"one.1.weight": torch.zeros(64, dtype=torch.bool), "other": torch.tensor([True, False])}
    rule = RegroupRule("budget", tile=16, blocks="equal", density=0.5)
    found = regroup(stale, weights | {"other": torch.zeros(2)}, groups, rule=rule).masks
    assert torch.equal(found["one.1.weight"], found["one.0.weight"].flatten(1).any(dim=1))
    assert torch.equal(found["other"], stale["other"])
