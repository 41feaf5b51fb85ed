"""A ticket for the right network under other names: the message names what is in the way, and the cure."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from deploy_sparse import Ticket
from deploy_sparse.errors import TicketError
from deploy_sparse.ticket import ModelRef, Provenance


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def ticket_of(state, model=ModelRef("user factory")):  # noqa: B008
    weights = {name: tensor.clone() for name, tensor in state.items()}
    return Ticket(weights, {}, model, Provenance("test"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.backbone."])
def test_a_prefix_of_all_names_is_named_with_its_cure(prefix):
    prefixed = {f"{prefix}{name}": tensor for name, tensor in net().state_dict().items()}
    with pytest.raises(TicketError) as caught:
        ticket_of(prefixed).validate(net())
    assert caught.value.given.startswith(f"every name that only the ticket has begins with {prefix!r}")
    code = caught.value.fix.partition(": ")[2]
    ticket_of(eval(code, {"state_dict": prefixed})).validate(net())
    with pytest.raises(TicketError) as caught:
        ticket_of(net().state_dict()).validate(prefixed)
    assert caught.value.given.startswith(f"every name that only the network has begins with {prefix!r}")
    assert f"network.{prefix.rstrip('.')}" in caught.value.fix


def test_names_that_differ_by_more_than_a_prefix_are_another_architecture():
    state = {f"module.{name}": tensor for name, tensor in net().state_dict().items()} | {"extra": torch.ones(2)}
    with pytest.raises(TicketError, match="the ticket is for another architecture"):
        ticket_of(state).validate(net())


def test_a_factory_that_makes_a_pruned_network_is_named():
    pruned = net()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(TicketError, match=r"makes a pruned network: it holds '0\.weight_orig' and '0\.weight_mask'"):
        ticket_of(net().state_dict()).validate(pruned)


def test_the_network_is_named_where_it_has_a_name():
    other = nn.Linear(3, 4)
    with pytest.raises(TicketError) as caught:
        ticket_of(net().state_dict()).validate(other)
    assert caught.value.expected == "the network it was made from"
    with pytest.raises(TicketError) as caught:
        ticket_of(net().state_dict(), ModelRef("resnet18", {"classes": 10})).validate(other)
    assert caught.value.expected == "the network it was made from: resnet18(classes=10)"


def test_a_ticket_prints_as_one_short_line():
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[:1] = False
    made = Ticket(net().state_dict(), {"0.weight": mask}, ModelRef("user factory"), Provenance("test"))
    assert repr(made) == "Ticket(user factory, 1 of 9 tensors masked, density 75.0%)"
    assert repr(Ticket({}, {}, ModelRef("none"), Provenance("test"))) == (
        "Ticket(none, 0 of 0 tensors masked, density 100.0%)"
    )
