"""The plan as a value: what it says, its JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from surgery_nets import SHAPE, Block, RandomNet, randomised, rows_masked, silent_masks, ticket
from torch import nn

from deploy_sparse.errors import SurgeryError, TicketError
from deploy_sparse.surgery import SurgeryPlan, channel_groups, compact, plan_from_ticket
from deploy_sparse.surgery._positions import positions, ranges
from deploy_sparse.surgery.notes import readable

STEPS = [Block("projection", 4), Block("depthwise", 1), Block("chain", 3, padded=False)]
X = torch.zeros(2, *SHAPE)


def factory():
    return RandomNet(STEPS, flatten=True)


@pytest.fixture(scope="module")
def dense():
    return randomised(factory())


@pytest.fixture(scope="module")
def silent(dense):
    return ticket(dense, silent_masks(dense, channel_groups(dense, X), lambda group: [0]))


def test_plan_names_every_tensor_axis_that_loses_positions(dense, silent):
    plan = plan_from_ticket(silent, dense, X)
    cuts = {(cut.name, cut.dim): cut for cut in plan.cuts}
    assert cuts["stem.0.weight", 0].kept == (1, 2, 3, 4)
    assert cuts["stem.0.weight", 0].size == 5
    assert ("stem.0.weight", 1) not in cuts  # the network's input
    assert ("fc.weight", 0) not in cuts  # the network's output
    for name in ("stem.1.weight", "stem.1.bias", "stem.1.running_mean", "stem.1.running_var"):
        assert cuts[name, 0].kept == (1, 2, 3, 4)
    assert cuts["hidden.weight", 1].kept == tuple(range(4, 12))  # 2 × 2 pixels of each of 3 channels
    assert plan.ticket == silent.hash
    assert plan.model == silent.model
    assert plan.parity is None


def test_costs_are_those_of_one_sample_reckoned_by_hand():
    def small():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))

    net = randomised(small())
    masks = silent_masks(net, channel_groups(net, X), lambda group: [0, 1])
    plan = plan_from_ticket(ticket(net, masks), net, X)
    assert plan.cost_before.macs == 64 * (4 * 27 + 2 * 4)
    assert plan.cost_after.macs == 64 * (2 * 27 + 2 * 2)
    assert (plan.cost_before.parameters, plan.cost_after.parameters) == (4 * 27 + 4 + 8 + 2, 2 * 27 + 2 + 4 + 2)


def test_neither_module_nor_ticket_is_changed(dense, silent):
    module = factory().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    digest = silent.hash
    plan_from_ticket(silent, module, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training
    assert silent.hash == digest


def test_json_round_trip_keeps_everything_and_holds_no_weights(silent):
    plan = compact(silent, factory).plan
    text = json.dumps(plan.to_json(), allow_nan=False)
    assert SurgeryPlan.from_json(json.loads(text)) == plan
    assert plan.parity is not None
    assert '"1-4"' in text


def test_folds_and_leaks_survive_the_round_trip(dense):
    plan = plan_from_ticket(ticket(dense, rows_masked(dense, {"stem.0.weight": [1], "hidden.weight": [2]})), dense, X)
    assert plan.groups[0].stays
    assert plan.folds
    assert SurgeryPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_equal_inputs_give_equal_plans(dense, silent):
    assert plan_from_ticket(silent, dense, X) == plan_from_ticket(silent, factory(), X)


@pytest.mark.parametrize(("damage", "entry"), [({"shape": 3}, "shape"), ({"ticket": None}, "ticket"), ({}, "groups")])
def test_unreadable_plan_is_refused_by_entry(dense, silent, damage, entry):
    body = plan_from_ticket(silent, dense, X).to_json() | damage
    if not damage:
        del body["groups"]
    with pytest.raises(SurgeryError, match=f"the plan's entry '{entry}' is not readable"):
        SurgeryPlan.from_json(body)


def test_ticket_that_keeps_everything_gives_the_identical_network(dense):
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    result = compact(ticket(dense, masks), factory)
    assert result.plan.cuts == ()
    assert result.plan.folds == ()
    assert result.plan.cost_before == result.plan.cost_after
    assert result.parity.float64.max_abs == 0
    state = dense.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.module.state_dict().items())


def test_partly_filled_rows_are_reported_with_the_density_left(dense):
    masks = rows_masked(dense, {"hidden.weight": [0]})
    masks["fc.weight"] = torch.ones_like(dense.fc.weight, dtype=torch.bool)
    masks["fc.weight"][0, :3] = False
    plan = plan_from_ticket(ticket(dense, masks), dense, X)
    # Column 0 goes with the folded constant of the hidden layer's dead row; 2 of 4 × 5 weights left are masked.
    assert plan.partly_filled == {"fc.weight": 0.9}
    assert "fc.weight: 90.0% of the weights left are unmasked" in plan.notes()


def test_notes_list_three_partly_filled_layers_and_sum_up_more(dense):
    names = [name for name, p in dense.named_parameters() if p.dim() > 1]
    sizes = dict(dense.named_parameters())
    masks = {name: torch.ones_like(sizes[name], dtype=torch.bool) for name in names[:4]}
    for number, mask in enumerate(masks.values(), 1):
        mask.view(-1)[:number] = False

    def filling(count):
        some = {name: masks[name] for name in names[:count]}
        return [note for note in plan_from_ticket(ticket(dense, some), dense, X).notes() if "unmasked" in note]

    assert [note.split(":")[0] for note in filling(3)] == names[:3]
    total, share = sum(mask.numel() for mask in masks.values()), {n: m.float().mean() for n, m in masks.items()}
    order = sorted(share, key=share.get)
    assert filling(4) == [
        f"4 layers are partly filled: {1 - 10 / total:.1%} of the weights left in them are unmasked, "
        f"least in {order[0]} ({share[order[0]]:.1%}), most in {order[3]} ({share[order[3]]:.1%})"
    ]


def test_the_density_of_partly_filled_layers_counts_the_weights_that_surgery_left():
    net = randomised(torch.nn.Sequential(*(torch.nn.Conv2d(a, b, 1) for a, b in ((3, 4), (4, 8), (8, 2), (2, 2)))))
    x = torch.zeros(1, 3, 4, 4)
    masks = silent_masks(net, channel_groups(net, x), lambda group: [2, 3] if group.size == 4 else [])
    masks = {**{n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters() if p.dim() > 1}, **masks}
    for name in ("0.weight", "1.weight", "2.weight", "3.weight"):
        masks[name][0, 0] = False
    masks["1.weight"][1, 0] = False
    plan = plan_from_ticket(ticket(net, masks), net, x)
    assert [layer.compact[:2] for layer in plan.layers] == [(2, 3), (8, 2), (2, 8), (2, 2)]
    (note,) = [note for note in plan.notes() if "unmasked" in note]
    assert note == (
        f"4 layers are partly filled: {1 - 5 / (6 + 16 + 16 + 4):.1%} of the weights left in them are unmasked, "
        "least in 3.weight (75.0%), most in 2.weight (93.8%)"
    )


def test_notes_write_before_and_after_with_an_arrow(dense, silent):
    plan = plan_from_ticket(silent, dense, X)
    assert f"parameters {plan.cost_before.parameters} → {plan.cost_after.parameters} (" in plan.notes()[0]
    assert (
        f"MACs of one sample {readable(plan.cost_before.macs)} → {readable(plan.cost_after.macs)} (" in plan.notes()[1]
    )


def test_tables_and_summary_speak_of_every_weight(dense, silent):
    plan = plan_from_ticket(silent, dense, X)
    columns, rows = plan.layer_table()
    assert columns == ("weight", "dense", "compact", "kept")
    assert rows[0] == ("stem.0.weight", "5×3×3×3", "4×3×3×3", "80.0%")
    assert len(rows) == sum(p.dim() > 1 for p in dense.parameters())
    summary = json.loads(json.dumps(plan.summary()))
    assert summary["parameters"] == {"before": plan.cost_before.parameters, "after": plan.cost_after.parameters}
    assert summary["groups"][-1]["stays"] == [{"kind": "pinned", "channels": 4, "reason": "network output"}]


def test_ticket_for_another_architecture_is_refused(silent):
    with pytest.raises(TicketError, match="the ticket is for another architecture"):
        plan_from_ticket(silent, RandomNet([Block("chain", 3)], flatten=False), X)


def test_multiple_below_one_is_refused(dense, silent):
    with pytest.raises(SurgeryError, match="multiple 0\n  expected: 1 or more"):
        plan_from_ticket(silent, dense, X, multiple=0)


def test_network_that_cannot_live_with_fewer_channels_keeps_them_and_says_what_it_said():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Conv2d(3, 5, 1, bias=False)
            self.c, self.d = torch.nn.Conv2d(4, 2, 1), torch.nn.Conv2d(5, 2, 1)

        def forward(self, x):
            y, z = self.a(x), self.b(x)
            if y.shape[1] != 4:
                raise ValueError("only four channels please")
            return self.c(y) + self.d(z)

    net = randomised(Net())
    result = compact(ticket(net, rows_masked(net, {"a.weight": [0], "b.weight": [1, 2]})), Net)
    first, second = result.plan.groups[:2]
    assert first.kept == (0, 1, 2, 3)
    assert first.stays[0].kind == "pinned"
    assert first.stays[0].reason.endswith("needs this size: only four channels please")
    assert second.kept == (0, 3, 4)  # the rest of the network still loses what is dead


class Idle(nn.Module):
    """Runs layers whose results nobody takes."""

    def __init__(self, idle):
        super().__init__()
        self.a, self.c, self.d = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)
        self.norm, self.e = nn.BatchNorm2d(6), nn.Conv2d(5, 3, 1)
        self.idle = idle

    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        self.idle(self, y)
        return self.c(y)


@pytest.mark.parametrize(
    ("idle", "place"),
    [
        (lambda net, y: net.e(torch.relu(net.d(y))), "aten.conv2d.default in layer 'd'"),
        (lambda net, y: net.norm(y), "aten.batch_norm.default in layer 'norm'"),
        (lambda net, y: y * torch.ones(6, 1, 1), "aten.mul.Tensor in the network itself"),
    ],
    ids=["layers", "norm", "numbers"],
)
def test_results_that_nothing_reads_keep_what_they_are_made_of_and_say_so(idle, place):
    made = ticket(randomised(Idle(idle)), rows_masked(Idle(idle), {"a.weight": [1, 4], "d.weight": [2]}), SHAPE)
    result = compact(made, lambda: Idle(idle))
    (stay,) = result.plan.groups[0].stays
    assert stay.channels == (0, 1, 2, 3, 4, 5)
    assert stay.reason.startswith(f"{place} needs this size, though nothing reads its result: ")
    assert result.plan.cuts == ()
    assert result.parity.float64.max_rel == 0


def test_positions_are_written_as_ranges():
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert positions("0-2,5,7-8") == (0, 1, 2, 5, 7, 8)
    assert ranges(()) == ""
    assert positions("") == ()
