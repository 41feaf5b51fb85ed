"""Layers that write into one shortcut and lost different channels: all write the union, or each leaves its zeros out."""

from __future__ import annotations

import pytest
import torch
from surgery_nets import masked, outputs, randomised, rows_masked, ticket
from torch import nn

from deploy_sparse import compact as compact_by_name
from deploy_sparse.errors import ConfigError
from deploy_sparse.surgery import SurgeryPlan, compact, load_compact

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Shortcut(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1, bias=bias), nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3, padding=1)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.norm(self.branch(x))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + torch.tanh(self.branch(x))))


ROWS = {"stem.weight": [0, 1, 2, 6], "branch.weight": [2, 3, 4, 5, 6]}


def both(factory, rows=ROWS):
    made = ticket(randomised(factory()), rows_masked(factory(), rows))
    reference = outputs(masked(factory, made), X)
    found = {}
    for how in ("union", "spread"):
        found[how] = compact(made, factory, X, shortcuts=how)
        off = (outputs(found[how].module, X) - reference).abs().max() / reference.abs().max()
        assert float(off) <= 1e-12
    return found["union"], found["spread"]


def test_union_keeps_what_any_layer_writes():
    union, _ = both(Shortcut)
    stem = next(g for g in union.plan.groups if g.name == "stem.weight")
    assert union.module.stem.weight.shape[0] == union.module.branch.weight.shape[0] == len(stem.kept) == 7
    assert set(range(8)) - set(stem.kept) <= {2, 6}  # dead in both; one of them carries their constant
    assert union.plan.shape.spreads == ()


def test_spread_leaves_rows_of_zeros_out():
    union, spread = both(Shortcut)
    module = spread.module
    assert module.stem.weight.shape[0] == 4 + 1  # the rows that write, and one of zeros for all the others
    assert module.branch.weight.shape[0] == 3 + 1
    assert module.stem.out_channels == module.branch.out_channels == 7
    assert module.branch.weight.shape[1] == module.norm.num_features == 7
    assert spread.plan.cost_after.macs < union.plan.cost_after.macs
    assert "spread over 7 channels" in repr(module.branch)


def test_rows_of_zeros_with_different_biases_are_told_apart():
    _, spread = both(lambda: Shortcut(bias=True))
    biases = spread.module.branch.bias
    assert len(biases.unique()) == len(biases)
    assert spread.module.branch(torch.randn(1, 8, 4, 4, dtype=torch.float64)[:, :7]).shape[1] == 7


def test_linear_layers_spread_along_the_last_axis():
    _, spread = both(Tokens)
    assert "spread over" in repr(spread.module)


def test_a_spread_network_is_saved_trained_and_exported(tmp_path):
    _, spread = both(Shortcut)
    spread.save(tmp_path / "compact")
    loaded = load_compact(tmp_path / "compact", Shortcut)
    assert torch.equal(outputs(loaded, X), outputs(spread.module, X))
    assert SurgeryPlan.from_json(spread.plan.to_json()) == spread.plan
    loaded.train()(X).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    again = torch.export.export(spread.module, (X,)).module()(X)
    assert torch.allclose(again, outputs(spread.module, X), atol=1e-12)


def test_masks_that_agree_need_no_spreading():
    rows = {"stem.weight": [1, 2], "branch.weight": [1, 2]}
    union, spread = both(lambda: Shortcut(), rows)
    assert spread.plan.cost_after.macs <= union.plan.cost_after.macs


@pytest.mark.parametrize(("option", "known"), [("norms", "exact, leave"), ("shortcuts", "union, spread")])
def test_unknown_choices_are_refused(option, known):
    made = ticket(randomised(Shortcut()), {})
    with pytest.raises(ConfigError, match=f"{option} 'both'") as problem:
        compact_by_name(made, factory=Shortcut, **{option: "both"})
    assert known in str(problem.value)
