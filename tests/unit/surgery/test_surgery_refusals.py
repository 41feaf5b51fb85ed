"""What surgery is given besides sound networks and masks: refused by name, or handled and said."""

from __future__ import annotations

import copy

import pytest
import torch
from random_masks import X, cut, factory, given, half, ticket_of
from surgery_nets import randomised
from torch import nn

from deploy_sparse.api import oneshot_ticket
from deploy_sparse.errors import DeploySparseError, SurgeryError, TicketError
from deploy_sparse.surgery import channel_groups, compact, plan_from_ticket


def test_a_mask_for_an_unknown_parameter_is_refused_with_the_nearest_name():
    made = given(randomised(factory()), {"3.weigth": torch.ones(4, 6, 3, 3, dtype=torch.bool)})
    with pytest.raises(TicketError, match=r"mask '3\.weigth' belongs to no weight[\s\S]*did you mean '3\.weight'"):
        compact(made, factory, X)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(6, 4, 3, 3, dtype=torch.bool), r"mask '3\.weight' has shape \(6, 4, 3, 3\)"),
        (torch.ones(4, 6, 3, 3), r"mask '3\.weight' has dtype torch\.float32"),
        (torch.zeros(4, 6, 3, 3, dtype=torch.bool), r"'3\.weight' has no channel left"),
    ],
    ids=["shape", "dtype", "all dead"],
)
def test_a_mask_that_does_not_fit_its_weight_is_refused_by_name(mask, said):
    with pytest.raises(TicketError, match=said):
        plan_from_ticket(given(randomised(factory()), {"3.weight": mask}), factory(), X)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.c, self.free, self.last = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)
        self.double()

    def forward(self, x):
        return self.c(self.b(self.a(x))) + self.last(self.free(x))


def test_where_masks_together_leave_no_channel_one_stays_and_says_so():
    dense = randomised(Depthwise())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    masks["a.weight"][:2] = False
    masks["b.weight"][2:] = False
    masks["free.weight"][1] = masks["free.bias"][1] = False
    result = cut(ticket_of(dense, masks), Depthwise)
    (group,) = [group for group in result.plan.groups if group.name == "a.weight"]
    assert len(group.kept) == 1
    assert [stay.kind for stay in group.stays] == ["last"]
    assert any(note.startswith("a.weight: 1 of 4 channels stay (last)") for note in result.plan.notes())
    assert result.module.free.weight.shape[0] == 4


def test_a_layer_that_starts_at_zero_counts_and_one_that_was_masked_does_not():
    dense = randomised(factory())
    with torch.no_grad():
        dense[0].weight.zero_()
        dense[3].weight.zero_()
    result = cut(ticket_of(dense, {}), factory)
    assert result.plan.cuts == ()
    masks = {"3.weight": torch.ones_like(dense[3].weight, dtype=torch.bool)}
    masks["3.weight"][:, 1:] = False
    result = cut(ticket_of(dense, masks), factory)
    assert result.plan.cost_after.macs < result.plan.cost_before.macs


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1).double(), nn.Conv2d(4, 2, 1).double()

    def forward(self, x):
        x = self.a(x)
        return self.b(x if x.sum() > 0 else -x)


class Reading(Deciding):
    def forward(self, x):
        return self.b(self.a(x) * x.mean().item())


@pytest.mark.parametrize("network", [Deciding, Reading])
@pytest.mark.parametrize(
    "call",
    [
        lambda module: channel_groups(module, X),
        lambda module: compact(given(module, {}), type(module), X),
        lambda module: plan_from_ticket(given(module, {}), module, X),
        lambda module: oneshot_ticket(module, X, "channels", 0.5),
    ],
    ids=["groups", "compact", "plan", "oneshot"],
)
def test_control_flow_on_data_is_refused_in_one_message(network, call, capfd):
    with pytest.raises(SurgeryError, match=r"cannot be traced[\s\S]*without data-dependent control flow"):
        call(randomised(network()))
    assert "".join(capfd.readouterr()) == ""


def test_control_flow_on_sizes_and_flags_is_followed():
    class Network(Deciding):
        def forward(self, x):
            x = self.a(x)
            return self.b(torch.relu(x) if x.shape[2] > 4 and not self.training else x)

    result = cut(half(randomised(Network())), Network)
    assert result.module.a.weight.shape[0] == 2


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (X[:, :2], r"does not accept these inputs \(\[2, 2, 8, 8\]\)"),
        (X[0, 0], r"does not accept these inputs \(\[8, 8\]\)"),
        ((X, X), r"does not accept these inputs \(\[2, 3, 8, 8\] and \[2, 3, 8, 8\]\)"),
        ((), r"does not accept these inputs \(no tensor\)"),
        (X.float(), r"the example inputs are float32, the weights float64[\s\S]*\.to\(torch\.float64\)"),
        (torch.ones(2, 3, 8, 8, dtype=torch.int64), r"the example inputs are int64 [\s\S]*\.to\(torch\.float64\)$"),
    ],
    ids=["channels", "rank", "too many", "none", "precision", "integers"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda module, inputs: compact(ticket_of(module, {}), factory, inputs),
        channel_groups,
        lambda module, inputs: oneshot_ticket(module, inputs, "channels", 0.5),
    ],
    ids=["compact", "groups", "oneshot"],
)
def test_inputs_that_the_network_does_not_take_are_refused(inputs, said, call):
    with pytest.raises(SurgeryError, match=said):
        call(randomised(factory()), inputs)


def test_a_refusal_leaves_the_network_as_it_was():
    dense = randomised(factory()).train()
    dense[1].eval()
    state, modes = copy.deepcopy(dense.state_dict()), [part.training for part in dense.modules()]
    with pytest.raises(SurgeryError):
        channel_groups(dense, X[:, :2])
    channel_groups(dense, X)
    assert [part.training for part in dense.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())


PARAMETRIZED = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("what", PARAMETRIZED)
def test_a_parametrized_weight_is_named_or_followed_and_never_lost(what):
    def make():
        network = factory()
        PARAMETRIZED[what](network[3])
        return network

    dense = make().eval()
    with torch.no_grad():
        dense[0].weight.copy_(randomised(factory())[0].weight)
    try:
        result = cut(half(dense), make)
    except DeploySparseError as refusal:
        said = str(refusal)
    else:
        said = " ".join([*result.plan.notes(), *result.plan.unknown])
        assert result.module[7].weight.shape[1] < 4 or "layer '3'" in said  # the rest shrinks, or what stays is named
        if result.module[0].weight.shape[0] < 6:
            return
    assert "3.parametrizations" in said or "layer '3" in said
