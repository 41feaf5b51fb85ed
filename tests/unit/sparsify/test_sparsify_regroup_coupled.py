"""Layers that write into one residual stream divide their rows alike, where the rule asks for it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from deploy_sparse.api import oneshot_ticket
from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.regroup import RegroupRule, regroup
from deploy_sparse.structure import row_blocks
from deploy_sparse.surgery import compact
from deploy_sparse.surgery.graph import channel_groups

WRITERS = ("stem.weight", "one.2.weight", "two.2.weight")
RULES = (
    RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, multiple=16),
    RegroupRule(blocks="disjoint", columns="channel", parts=2, tile=16),
    RegroupRule("paper", "channel", "equal", parts=4, tile=16),
    RegroupRule("code", "channel", "equal", parts=2, tile=16, ratio=0.2),
)


def branch():
    parts = [nn.Conv2d(64, 48, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(48, 64, 1, bias=False)]
    return nn.Sequential(*parts, nn.BatchNorm2d(64))


class Net(nn.Module):
    """Two residual blocks on one stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.one, self.two = branch(), branch()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.one(x))
        return self.head(torch.relu(x + self.two(x)).mean(dim=(2, 3)))


def network():
    torch.manual_seed(0)
    return Net().eval()


@cache
def found(rule, dense=()):
    model = network()
    weights = {name: x.detach() for name, x in model.named_parameters() if x.dim() > 1 and name != "head.weight"}
    masks = {name: x.abs() > x.abs().flatten().quantile(0.6) for name, x in weights.items()}
    groups = channel_groups(model, torch.zeros(2, 32, 6, 6))
    return regroup(masks, weights, groups, rule=rule, silent=False, dense=dense)


def rows_of(mask):
    return sorted(block.rows for block in row_blocks(mask))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule}-{rule.blocks}")
def test_layers_of_one_stream_have_the_same_groups_of_rows(rule):
    alone = [rows_of(found(rule).masks[name]) for name in WRITERS]
    assert len({str(rows) for rows in alone}) > 1  # each for itself they differ
    result = found(replace(rule, coupling="group"))
    divided = [rows_of(result.masks[name]) for name in WRITERS]
    assert divided[0] == divided[1] == divided[2]
    assert len(divided[0]) > 1
    inner = "one.0.weight"
    assert torch.equal(result.masks[inner], found(rule).masks[inner])  # writes channels of its own


def test_densities_stay_what_the_rule_asks_for():
    for coupling in ("layer", "group"):
        rule = RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, coupling=coupling)
        result = found(rule)
        assert [result.masks[name].float().mean() for name in WRITERS] == [0.5] * 3


def test_coupled_layers_keep_less_magnitude_but_nearly_as_much():
    kept = {}
    for coupling in ("layer", "group"):
        rule = RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, coupling=coupling)
        result = found(rule)
        weights = {name: x.detach() for name, x in network().named_parameters()}
        kept[coupling] = sum(float((weights[name].abs() * result.masks[name]).sum()) for name in WRITERS)
    assert 0.9 * kept["layer"] < kept["group"] <= kept["layer"]


def test_a_stream_of_coupled_layers_needs_no_look_up_of_rows():
    left = {}
    for coupling in ("layer", "group"):
        rule = RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, multiple=16, coupling=coupling)
        ticket = oneshot_ticket(network(), torch.randn(2, 32, 6, 6), "blocks", 0.5, rule=rule)
        made = compact(ticket, network, torch.randn(2, 32, 6, 6), format="packed")
        assert len(made.plan.shape.packs) >= 4
        writers = [name.removesuffix(".weight") for name in WRITERS]
        restored = [p.module for p in made.plan.shape.packs if p.packing.restores and p.module in writers]
        left[coupling] = [*restored, *made.plan.shape.spreads]
    assert left["group"] == []
    assert left["layer"]


@pytest.mark.parametrize("parts", [4, 0])
def test_layers_that_never_run_as_blocks_do_not_limit_how_the_others_are_divided(parts):
    """A first layer, whose three input channels are no four blocks, and one that nothing was pruned from."""
    torch.manual_seed(0)
    model = Net().eval()
    model.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    weights = {name: x.detach() for name, x in model.named_parameters() if x.dim() > 1 and name != "head.weight"}
    masks = {name: x.abs() > x.abs().flatten().quantile(0.75) for name, x in weights.items()}
    groups = channel_groups(model, torch.zeros(2, 3, 6, 6))
    rule = RegroupRule(blocks="disjoint", columns="channel", parts=parts, tile=16, coupling="group")
    if not parts:
        masks[WRITERS[2]] = torch.ones_like(masks[WRITERS[2]])
    made = regroup(masks, weights, groups, rule=rule, silent=False).masks
    assert [float(made[name].float().mean()) for name in WRITERS[1:]] == [0.25, 0.25 if parts else 1.0]
    assert not parts or rows_of(made[WRITERS[1]]) == rows_of(made[WRITERS[2]])


def test_dense_layers_and_missing_groups():
    rule = RegroupRule("budget", "channel", "equal", parts=2, density=0.5, tile=16, coupling="group")
    assert bool(found(rule, dense=("stem.weight",)).masks["stem.weight"].all())
    with pytest.raises(ConfigError, match="without channel groups"):
        regroup({"w": torch.ones(32, 8) > 0}, {"w": torch.ones(32, 8)}, rule=rule)
    with pytest.raises(ConfigError, match="coupling = 'group' with free blocks"):
        RegroupRule(coupling="group")
    with pytest.raises(ConfigError, match="one of layer, group"):
        RegroupRule(blocks="equal", coupling="none")
