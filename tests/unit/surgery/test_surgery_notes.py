"""Notes on a plan: what matters in few lines, counts that can be read, and why nothing went."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_nets import randomised, rows_masked, ticket
from torch import nn

from deploy_sparse import oneshot_ticket
from deploy_sparse.surgery import SurgeryPlan, plan_from_ticket
from deploy_sparse.surgery.cost import Cost
from deploy_sparse.surgery.notes import LISTED, notes_of, readable
from deploy_sparse.surgery.parts import Blueprint, Carry, Cut, Fold, GroupPlan, Stay
from deploy_sparse.ticket import ModelRef


def plan_of(*groups, cut=True, folds=(), carries=(), partly=None):
    cuts = (Cut("a.weight", 0, 4, (0, 1)),) if cut else ()
    return SurgeryPlan(
        model=ModelRef("net"),
        ticket="",
        multiple=1,
        groups=groups,
        shape=Blueprint(cuts, tuple(folds)),
        carries=tuple(carries),
        rescales=(),
        partly_filled=partly or {},
        unknown=(),
        layers=(),
        cost_before=Cost(25_557_032, 4_089_184_256),
        cost_after=Cost(860, 0),
    )


def group(number, *stays, size=8, members=()):
    return GroupPlan(f"layers.{number}.weight", size, tuple(range(size)), stays, members)


def stay(kind, count, reason):
    return Stay(kind, tuple(range(count)), reason)


def rest(plan):
    """The notes after the costs."""
    return notes_of(plan)[2:]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (977, "977"),
        (9_999, "9,999"),
        (10_000, "10k"),
        (23_349, "23.3k"),
        (999_600, "1M"),
        (25_557_032, "25.6M"),
        (4_089_184_256, "4.09G"),
        (999_950_000_000, "1T"),
        (12_345_678_901_234_567, "1.23e+04T"),
    ],
)
def test_counts_are_short(count, text):
    assert readable(count) == text


def test_costs_come_first_and_small_shares_are_not_zero():
    assert notes_of(plan_of()) == [
        "parameters 25.6M → 860 (0.0034%)",
        "MACs of one sample 4.09G → 0 (0.0%)",
    ]


def test_few_lines_are_told_one_by_one():
    groups = [group(n, stay("last", 1, "every channel is dead")) for n in range(LISTED)]
    folds = [Fold(f"{n}.weight", f"{n}.bias", n == 1, 5) for n in range(LISTED)]
    assert rest(plan_of(*groups, folds=folds)) == [
        "layers.0.weight: 1 of 8 channels stay (last): every channel is dead",
        "layers.1.weight: 1 of 8 channels stay (last): every channel is dead",
        "layers.2.weight: 1 of 8 channels stay (last): every channel is dead",
        "0.weight: constants of 5 removed columns went into 0.bias",
        "1.weight: constants of 5 removed columns went into 1.bias, which is new",
        "2.weight: constants of 5 removed columns went into 2.bias",
    ]


def test_more_of_one_cause_share_a_line():
    groups = [group(n, stay("last", 1, "every channel is dead")) for n in range(25)]
    assert rest(plan_of(*groups)) == [
        "25 groups keep 25 channels (last): every channel is dead, in layers.0.weight, layers.1.weight, "
        "layers.2.weight and 22 more"
    ]


def test_leaks_of_one_cause_in_many_layers_share_a_line_whatever_their_constants():
    subjects = ["constant 0.5", "constants -0.1 to 2e-05", "its constant", "constant -1.25e+03"]
    places = ["layer 'a.b'", "layer 'c'", "the network itself", "layer 'd'"]
    leaks = [stay("leak", n + 1, f"{subjects[n]} would meet the zero padding of {places[n]}") for n in range(4)]
    other = stay("leak", 2, "its constant would be cast to integers by aten.to.dtype in layer 'e'")
    found = rest(plan_of(*(group(n, leak) for n, leak in enumerate(leaks)), group(9, other)))
    assert found == [
        "4 groups keep 10 channels (leak): their constants would meet the zero padding of a layer, "
        "most in layers.3.weight (4)",
        "layers.9.weight: 2 of 8 channels stay (leak): its constant would be cast to integers by aten.to.dtype in "
        "layer 'e'",
    ]


def test_many_causes_are_cut_short():
    whys = "abcdef"
    groups = [group(n, stay("pinned", 8 - n, f"{why} needs it")) for n, why in enumerate(whys)]
    assert rest(plan_of(*groups)) == [
        "layers.0.weight: 8 of 8 channels stay (pinned): a needs it",
        "layers.1.weight: 7 of 8 channels stay (pinned): b needs it",
        "layers.2.weight: 6 of 8 channels stay (pinned): c needs it",
        "3 groups keep 12 channels (pinned) for 3 other reasons",
    ]


def test_carriers_are_counted_with_what_they_carry():
    groups = [
        group(n, stay("carrier", 1, f"carries the constants of {n} others through layer 'r{n}'"), members=(f"r{n}.w",))
        for n in range(1, 5)
    ]
    carries = [Carry(f"r{n}.w", 0, n) for n in range(1, 5)] + [Carry("r4.w", 7, 30), Carry("elsewhere", 0, 100)]
    assert rest(plan_of(*groups, carries=carries)) == [
        "4 groups keep 4 channels (carrier): they carry the constants of 40 removed columns, "
        "most in layers.4.weight (34)"
    ]


def test_shared_channels_have_one_line_though_every_shortcut_has_other_layers():
    groups = [
        group(n, stay("shared", n, f"masked in some of its {n} layers, but not in all (shortcut: 'c{n}')"))
        for n in range(4, 8)
    ]
    assert rest(plan_of(*groups)) == [
        "4 groups keep 22 channels (shared): they are masked in some of the layers that share them, but not in all, "
        "most in layers.7.weight (7)"
    ]


@pytest.mark.parametrize(("created", "said"), [(0, ""), (3, ", 3 of them new"), (4, ", all of them new")])
def test_many_folds_share_a_line_and_parts_of_one_weight_count_once(created, said):
    folds = [Fold(f"{n}.weight", f"{n}.bias", n < created, 1000 + n) for n in range(4)]
    folds.append(Fold("0.weight", "0.bias", created > 0, 1000))
    assert rest(plan_of(folds=folds)) == [
        f"4 biases took up the constants of 4,006 removed columns{said}, most in 3.weight (1,003)"
    ]


def test_a_network_output_is_told_where_the_group_holds_something_masked():
    head = group(0, stay("pinned", 8, "network output"), members=("fc.weight", "fc.bias"))
    pyramid = group(1, stay("pinned", 8, "network output"), members=("a.weight", "b.weight"))
    told = "layers.1.weight: 8 of 8 channels stay (pinned): network output"
    assert rest(plan_of(head, pyramid)) == []
    assert told in rest(plan_of(head, pyramid, partly={"a.weight": 0.5}))


@pytest.mark.parametrize(
    ("stays", "partly", "why"),
    [
        ([], {}, "the masks keep every weight"),
        ([], {"a.weight": 0.5}, "the masks empty no channel that may go"),
        ([("pinned", "network output")], {"a.weight": 0.5}, "the masks empty no channel that may go"),
        ([("shared", "masked in one of 2 layers")], {"a.weight": 0.5}, "the masks empty no channel that may go"),
        ([("leak", "its constant leaks")], {}, "the channels that the masks empty stay, for the reasons below"),
    ],
)
def test_nothing_cut_is_said_first_with_its_reason(stays, partly, why):
    plan = plan_of(group(0, *(stay(kind, 2, reason) for kind, reason in stays)), cut=False, partly=partly)
    assert notes_of(plan)[0] == f"nothing could be cut: {why}"
    assert not any("nothing could be cut" in note for note in notes_of(replace(plan, shape=plan_of().shape)))


KINDS = ["pinned", "leak", "carrier", "aligned", "size", "product", "last", "shared"]


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 8), st.text(max_size=8)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_no_wall_of_text_and_nobody_is_forgotten(drawn):
    groups = [group(n, stay(kind, count, reason)) for n, (kind, count, reason) in enumerate(drawn)]
    notes = rest(plan_of(*groups))
    for kind in KINDS:
        own = [(n, count) for n, (other, count, _) in enumerate(drawn) if other == kind]
        lines = [note for note in notes if f"({kind})" in note]
        assert len(lines) <= LISTED + 1
        assert bool(lines) == bool(own)


def test_a_deep_live_network_has_few_notes_of_plans_made_for_it():
    """Pruned without silencing, each of 12 blocks keeps a carrier and folds constants."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
            self.m, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x):
            return x + self.c(torch.sigmoid(self.m(self.b(torch.sigmoid(self.n(self.a(x)))))))

    net = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), *(Unit() for _ in range(12)), nn.Conv2d(8, 2, 1)))
    x = torch.zeros(1, 3, 4, 4)
    plan = plan_from_ticket(oneshot_ticket(net, x, silent=False), net, x)
    assert sum(len(group.stays) for group in plan.groups) > 12
    assert len(plan.shape.folds) >= 12
    notes = notes_of(plan)
    assert len(notes) < 10
    carriers = sum(any(stay.kind == "carrier" for stay in group.stays) for group in plan.groups)
    assert carriers == 12
    total = sum(carry.channels for carry in plan.carries)
    assert any(f"12 groups keep 12 channels (carrier): they carry the constants of {total} " in note for note in notes)


def test_notes_of_a_masked_feature_output():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return {"low": y, "out": self.b(y)}

    net = Pyramid()
    made = ticket(net, rows_masked(net, {"a.weight": [1, 2]}))
    notes = notes_of(plan_from_ticket(made, net, torch.zeros(1, 3, 4, 4)))
    assert notes[0] == "nothing could be cut: the masks empty no channel that may go"
    assert "a.weight: 8 of 8 channels stay (pinned): network output" in notes
