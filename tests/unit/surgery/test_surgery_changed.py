"""A compact network that was changed after its proof is saved without it, and printed things stay short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import conv, net, noise, ticket_without

from deploy_sparse import artifact
from deploy_sparse.cli.main import main
from deploy_sparse.surgery import SurgeryPlan, compact, load_compact

X = noise(2, 3, 8, 8)
FACTORY = net(lambda self, x: self.c(torch.sigmoid(self.a(x))), a=conv(3, 6), c=conv(6, 4))


@pytest.fixture
def made():
    return compact(ticket_without(FACTORY(), {"a.weight": [1, 4]}), FACTORY, X)


def trained(module):
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(X).square().mean().backward()
    optimizer.step()
    module.eval()


def one_number(module):
    module.c.bias.data[0] += 1e-9


def cast(module):
    module.float()


@pytest.mark.parametrize("change", [trained, one_number, cast])
def test_changed_weights_are_saved_without_a_parity_and_say_so(made, change, tmp_path):
    change(made.module)
    folder = made.save(tmp_path / "small", program=False)
    assert artifact.read_json(folder / "plan.json")["parity"] is None
    plan = SurgeryPlan.load(folder)
    assert plan.parity is None
    assert plan.notes()[-1] == plan.unverified
    assert "the weights were changed after the comparison" in plan.unverified
    assert replace(plan, parity=made.parity, unverified="") == made.plan
    loaded = load_compact(folder, FACTORY)
    assert all(torch.equal(x, made.module.state_dict()[name]) for name, x in loaded.state_dict().items())


def untouched(module):
    """Nothing."""


def moved_about(module):
    module.train()
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("change", [untouched, moved_about])
def test_weights_that_are_what_they_were_keep_their_parity(made, change, tmp_path):
    change(made.module)
    plan = SurgeryPlan.load(made.save(tmp_path / "small", program=False))
    assert (plan.parity, plan.unverified) == (made.parity, "")


@pytest.mark.parametrize("verb", ["show", "inspect"])
def test_the_command_line_tells_that_weights_were_changed(made, tmp_path, capsys, verb):
    trained(made.module)
    folder = made.save(tmp_path / "small", program=False)
    assert main([verb, str(folder)]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("not compared with the ticket's network: the weights were changed after")


def test_plan_and_blueprint_print_as_one_short_line(made):
    assert repr(made.plan) == (
        "SurgeryPlan(user factory, 1 of 2 channel groups narrower, 52 → 36 parameters, 2,688 → 1,792 MACs)"
    )
    assert repr(made.plan.shape) == "Blueprint(cuts: 3, folds: 1)"
    assert repr(compact(ticket_without(FACTORY(), {}), FACTORY, X).plan.shape) == "Blueprint()"
