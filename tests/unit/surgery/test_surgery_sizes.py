"""What surgery builds into a network holds at every input size the network takes, not only at the traced one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from surgery_nets import masked, outputs, randomised, rows_masked, ticket
from torch import nn

from deploy_sparse.surgery import compact, plan_from_ticket

TRACED = (3, 12, 12)
SIZES = [(2, 18, 24), (1, 7, 9), (4, 12, 13)]


class Net(nn.Module):
    """Convolution, live norm, ``act``, ``reduce`` to ``[n, 6]``, Linear: all in float64."""

    def __init__(self, reduce, act=torch.sigmoid, norm=True):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(6, 4)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.reduce, self.act = reduce, act
        self.double()

    def forward(self, x):
        return self.fc(self.reduce(self.act(self.norm(self.conv(x)))))


def cut(factory, rows=(1, 4)):
    made = ticket(randomised(factory()), rows_masked(factory(), {"conv.weight": list(rows)}), TRACED)
    return made, compact(made, factory)


def worst(factory, made, module):
    dense, off = masked(factory, made), 0.0
    for batch, height, width in SIZES:
        generator = torch.Generator().manual_seed(height)
        x = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
        reference = outputs(dense, x)
        off = max(off, float((outputs(module, x) - reference).abs().max() / reference.abs().max()))
    return off


def crop(y):
    return y[:, :, 1:-1, 1:-1]


def scaled(y, number):
    return y.mean((2, 3)) / number


DEPENDENT = {
    "sum": lambda y: y.sum((2, 3)),
    "sum of one axis": lambda y: y.mean(3).sum(2),
    "mean behind a border": lambda y: F.pad(y, (1, 2, 0, 1), value=0.25).mean((2, 3)),
    "largest behind a border": lambda y: F.pad(y, (1, 1, 1, 1), value=0.25).amax((2, 3)),
    "sum over height": lambda y: y.sum((2, 3)) / y.shape[2],
    "one number": lambda y: scaled(y, y.shape[2]),
    "rounded number": lambda y: scaled(y, y.shape[3] // 8),
    "number in a tensor": lambda y: y.mean((2, 3)) * torch.tensor(float(y.shape[2]), dtype=torch.float64),
    "batch": lambda y: scaled(y, y.shape[0]),
    "padding at some sizes": lambda y: F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2)).mean((2, 3)),
    "picked position": lambda y: torch.cat([y, 2 * y], 3).mean(2)[:, :, 12],
    "zero by the size": lambda y: torch.relu(y.mean((2, 3)) - y.shape[2] / 12),
}
SAME = {
    "mean": lambda y: y.mean((2, 3)),
    "largest": lambda y: y.amax((2, 3)),
    "pooled": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "mean behind its own border": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect").mean((2, 3)),
    "cropped": lambda y: crop(y).mean((2, 3)),
    "a written number": lambda y: scaled(y, 7.5),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_constant_that_depends_on_the_size_stays_in_the_network(case):
    def factory():
        return Net(DEPENDENT[case])

    made, result = cut(factory)
    assert worst(factory, made, result.module) < 1e-12
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    (stay,) = result.plan.groups[0].stays
    assert (stay.kind, stay.channels) == ("leak", (1, 4))
    assert result.parity.inputs[-2:] == ("random inputs [2, 3, 14, 15]", "random inputs [2, 3, 13, 14]")


@pytest.mark.parametrize("case", SAME)
def test_constant_that_is_the_same_at_every_size_is_folded(case):
    def factory():
        return Net(SAME[case])

    made, result = cut(factory)
    assert worst(factory, made, result.module) < 1e-12
    assert result.plan.groups[0].kept == (0, 2, 3, 5)
    assert result.plan.folds


@pytest.mark.parametrize("case", ["mean", "cropped", "sum", "sum over height", "one number"])
def test_zero_stays_zero_at_every_size(case):
    def factory():
        return Net({**SAME, **DEPENDENT}[case], act=torch.relu, norm=False)

    made, result = cut(factory)
    assert result.plan.groups[0].kept == (0, 2, 3, 5)
    assert worst(factory, made, result.module) < 1e-12


def test_network_of_one_size_folds_what_holds_at_that_size():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 144, 4)
            self.double()

        def forward(self, x):
            return self.fc((torch.sigmoid(self.conv(x)) / x.shape[2]).flatten(1))

    _, result = cut(Fixed)
    assert result.plan.groups[0].kept == (0, 2, 3, 5)
    assert "no other spatial size (the dense network does not run at" in result.parity.inputs[-1]


def test_operations_that_happen_at_some_sizes_only_stop_folds():
    class Net2(Net):
        def forward(self, x):
            y = self.act(self.norm(self.conv(x)))
            if x.shape[2] > 12:
                y = self.conv(y[:, :3]) + y
            return self.fc(y.mean((2, 3)))

    net = Net2(None)
    made = ticket(randomised(net), rows_masked(net, {"conv.weight": [1]}), TRACED)
    plan = plan_from_ticket(made, net, torch.zeros(2, *TRACED, dtype=torch.float64))
    assert plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    assert "at other input sizes, where the network runs other operations" in plan.groups[0].stays[0].reason


def test_sequences_of_other_lengths_are_tried():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Linear(3, 6), nn.Linear(6, 4)
            self.double()

        def forward(self, x):  # [n, tokens, 3]
            return self.fc(torch.sigmoid(self.conv(x)).mean(1) / x.shape[1])

    net = Tokens()
    made = ticket(randomised(net), rows_masked(net, {"conv.weight": [1]}))
    plan = plan_from_ticket(made, net, torch.zeros(2, 5, 3, dtype=torch.float64))
    assert "would depend on the size of the input in aten.div.Tensor" in plan.groups[0].stays[0].reason


STEPS = {
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "border": lambda y: F.pad(y, (1, 0, 1, 0), value=0.3),
    "crop": crop,
    "max": lambda y: F.max_pool2d(y, 3, 1, 1),
    "average": lambda y: F.avg_pool2d(y, 3, 1),
    "average padded": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "height": lambda y: y * (y.shape[2] / 10),
    "number": lambda y: torch.tanh(y * 1.7 + 0.1),
    "ramp": lambda y: y * torch.arange(y.shape[3], dtype=y.dtype),
    "where": lambda y: torch.where(y > 0.4, y, 0.1 * y),
    "beside": lambda y: torch.cat([y, 1 - y], 2),
    "gate": lambda y: y * y.mean((2, 3), keepdim=True),
}
ENDS = {"sum": DEPENDENT["sum"], "mean": SAME["mean"], "largest": SAME["largest"], "pooled": SAME["pooled"]}


@settings(
    phases=(Phase.explicit, Phase.generate),
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    st.sampled_from(sorted(ENDS)),
    st.sampled_from([torch.sigmoid, torch.relu, F.leaky_relu]),
    st.sets(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_random_reductions_hold_at_every_size_and_say_why_channels_stay(steps, end, act, rows, seed):
    def reduce(y):
        for step in steps:
            y = STEPS[step](y)
        return ENDS[end](y)

    def factory():
        return Net(reduce, act)

    made = ticket(randomised(factory(), seed), rows_masked(factory(), {"conv.weight": sorted(rows)}), TRACED)
    result = compact(made, factory)
    assert worst(factory, made, result.module) < 1e-11
    group = result.plan.groups[0]
    explained = {channel for stay in group.stays for channel in stay.channels}
    assert rows & set(group.kept) <= explained
    assert "no longer known" not in str(result.plan.notes())  # the cause itself was carried
