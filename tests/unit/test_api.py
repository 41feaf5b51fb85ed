"""The public calls: zoo names, targets and formats are resolved, and refused by name."""

import pytest
import torch
from torch import nn

import deploy_sparse
from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


def zoo_ticket(kept=5):
    torch.manual_seed(0)
    arguments = {"widths": [8, 8, 8]}
    weights = zoo.build("resnet_digits", **arguments).state_dict()
    rows = torch.arange(8) < kept
    name = "stages.0.0"
    masks = {
        f"{name}.conv1.weight": rows.reshape(8, 1, 1, 1).expand(8, 8, 3, 3),
        f"{name}.bn1.weight": rows,
        f"{name}.bn1.bias": rows,
    }
    return Ticket(weights, masks, ModelRef("resnet_digits", arguments, (1, 8, 8)), Provenance("by hand"))


def test_a_zoo_ticket_needs_no_factory_from_disk_to_network(tmp_path):
    folder = zoo_ticket().save(tmp_path / "ticket")
    small = deploy_sparse.compact(folder)
    assert small.module.stages[0][0].conv1.weight.shape == (5, 8, 3, 3)
    assert small.parity.float64.max_rel <= 1e-10
    small.save(tmp_path / "compact")
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(deploy_sparse.load_compact(tmp_path / "compact")(images), small.module(images))


def test_a_target_rounds_widths_up_to_what_it_likes():
    assert deploy_sparse.compact(zoo_ticket(5), target="rtx-sm89").module.stages[0][0].conv1.weight.shape[0] == 8
    assert deploy_sparse.compact(zoo_ticket(3), target="cpu").module.stages[0][0].conv1.weight.shape[0] == 4


def test_a_network_of_ones_own_needs_its_factory(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    ticket = Ticket(model.state_dict(), {}, ModelRef("user factory", input_shape=(3, 8, 8)), Provenance("by hand"))
    with pytest.raises(
        TicketError, match=r"'user factory', which is no zoo network[\s\S]*compact\(ticket, factory=…\)"
    ):
        deploy_sparse.compact(ticket)

    def factory():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    deploy_sparse.compact(ticket, factory=factory).save(tmp_path / "c")
    with pytest.raises(TicketError, match=r"load_compact\(folder, factory=…\)"):
        deploy_sparse.load_compact(tmp_path / "c")
    assert deploy_sparse.load_compact(tmp_path / "c", factory=factory)(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 6, 6)


def test_unknown_formats_and_targets_are_refused():
    with pytest.raises(ConfigError, match="format 'blocks'"):
        deploy_sparse.compact(zoo_ticket(), format="blocks")
    with pytest.raises(ConfigError, match="unknown target 'gpu'"):
        deploy_sparse.compact(zoo_ticket(), target="gpu")


def test_a_compact_network_brings_its_example_inputs_to_the_builder(tmp_path):
    engine = deploy_sparse.build_engine(deploy_sparse.compact(zoo_ticket()), "cpu", out=tmp_path)
    with engine.open() as runner:
        assert runner.run(runner.sample_inputs(2))["output"].shape == (2, 10)
