"""Every emptied channel that stays says why, in few lines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from surgery_nets import channel_groups, randomised, rows_masked, silent_masks, ticket
from torch import nn

from deploy_sparse.surgery import compact

SHAPE = (3, 8, 8)
X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Body(nn.Module):
    """Convolution, live norm, sigmoid, ``what``, 1×1 convolution; ``gate`` is a squeeze-excite gate."""

    def __init__(self, what, channels=4):
        super().__init__()
        self.a, self.bn, self.c = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1)
        self.down, self.up = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.what = what
        self.double()

    def gate(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))

    def forward(self, x):
        return self.c(self.what(self, torch.sigmoid(self.bn(self.a(x)))))


def stays(factory, rows):
    made = ticket(randomised(factory()), rows_masked(factory(), {"a.weight": rows}))
    result = compact(made, factory, X)
    return result, result.plan.groups[0]


REASONS = {
    "would meet values that depend on the input in aten.mul.Tensor in the network itself": lambda net, y: net.gate(y),
    "would meet values that depend on the input in aten.where.self in the": lambda net, y: torch.where(
        y > net.up(torch.relu(net.down(y))), y, 0.1 * y
    ),
    "would meet the zero padding of aten.avg_pool2d.default in the network itself": lambda net, y: F.avg_pool2d(
        y, 3, 1, 1
    ),
    "changes from place to place before layer 'c'": lambda net, y: y * torch.arange(8),
    "would leak through the zero padding of layer 'depthwise'": lambda net, y: net.depthwise(y),
    "would depend on the number of positions in aten.sum.dim_IntList": lambda net, y: y.sum((2, 3), keepdim=True),
    "would be cast to integers by aten.to.dtype": lambda net, y: (10 * y).to(torch.int64).to(y.dtype),
    "would meet the padding of aten.pad.default": lambda net, y: F.pad(y, (1, 1)),
    "would be rounded by aten.mean.dim": lambda net, y: y.mean((2, 3), True, dtype=torch.bfloat16).to(y.dtype),
}


@pytest.mark.parametrize("reason", REASONS)
def test_lost_constant_is_reported_with_the_operation_that_lost_it(reason):
    result, group = stays(lambda: Body(REASONS[reason]), [1, 2])
    assert group.kept == (0, 1, 2, 3)
    (stay,) = [stay for stay in group.stays if stay.kind != "pinned"] or group.stays
    assert reason in stay.reason
    notes = [note for note in result.plan.notes() if note.startswith("a.weight: ") and "stay" in note]
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_constant_that_counts_in_a_product_of_activations_stays_and_says_so():
    class Net(Body):
        def forward(self, x):
            y = torch.sigmoid(self.a(x))
            return self.c(y) + (y.flatten(2).transpose(1, 2) @ y.flatten(2)).mean()

    _, group = stays(lambda: Net(None), [1, 2])
    assert group.kept == (0, 1, 2, 3)
    (stay,) = group.stays
    assert (stay.kind, stay.channels) == ("leak", (1, 2))
    assert stay.reason == "its constant counts in aten.matmul.default in the network itself"


def test_where_is_elementwise():
    def factory():
        return Body(lambda net, y: torch.where(y > 0.4, y - 0.5, 0.1 * y))

    result, group = stays(factory, [1])
    assert group.kept == (0, 2, 3)  # condition and both branches are constants
    assert result.plan.folds


@pytest.mark.parametrize(
    "leaky",
    [
        lambda y: torch.where(y > 0, y, 0.1 * y),
        lambda y: torch.where(y > 0, y, 0.0),
        lambda y: y.masked_fill(y < 0, 0.0),
        lambda y: y * (y > 0).to(y.dtype),
        lambda y: torch.where(y.mean((2, 3), keepdim=True) > 0, y, 0.1 * y),
    ],
)
def test_silent_channels_go_through_where(leaky):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x):
            return self.c(leaky(self.b(self.a(x))))

    dense = randomised(Net())
    groups = channel_groups(dense, X.float())
    assert groups[0].pinned is None
    result = compact(ticket(dense, silent_masks(dense, groups, lambda group: [0, 2])), Net)
    assert result.plan.groups[0].kept == (1, 3)


def test_where_couples_both_branches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x):
            left, right = self.a(x), self.b(x)
            return self.c(torch.where(left > right, left, right))

    group = channel_groups(Net(), X.float())[0]
    assert [p.weight.name for p in group.producers] == ["a.weight", "b.weight"]
    assert group.pinned is None


def test_leaks_of_one_cause_are_one_line_with_count_and_range():
    def factory():
        return Body(lambda net, y: F.avg_pool2d(y, 3, 1, 1), channels=16)

    result, group = stays(factory, range(1, 13))
    (stay,) = group.stays
    with torch.no_grad():
        net = randomised(factory()).eval()
        constants = torch.sigmoid(net.bn(net.a.bias.reshape(1, -1, 1, 1))).flatten()[1:13]
    assert stay.channels == tuple(range(1, 13))
    (note,) = [note for note in result.plan.notes() if "(leak)" in note]
    assert note == (
        f"a.weight: 12 of 16 channels stay (leak): constants {constants.min():.3g} to {constants.max():.3g} "
        "would meet the zero padding of aten.avg_pool2d.default in the network itself"
    )


def test_network_output_is_in_the_data_and_not_in_the_notes():
    result, _ = stays(lambda: Body(lambda net, y: y), [1])
    assert not any("network output" in note for note in result.plan.notes())
    assert result.plan.groups[-1].stays[0].reason == "network output"
    assert result.plan.summary()["groups"][-1]["stays"][0]["reason"] == "network output"


def test_channels_that_one_layer_of_a_shortcut_lets_go_are_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.double()

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    _, group = stays(Net, [0, 1])
    assert group.kept == (0, 1, 2, 3)
    (stay,) = group.stays
    assert (stay.kind, stay.channels) == ("shared", (0, 1))
    assert stay.reason == "masked in 'a', and written by other layers of the same shortcut"


class Squeezed(nn.Module):
    def __init__(self, squeeze, rest):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 2)
        self.squeeze, self.rest = squeeze, rest
        self.double()

    def forward(self, x):
        return self.fc(self.rest(self.squeeze(torch.relu(self.a(x)).mean((2, 3), keepdim=True))))


@pytest.mark.parametrize(
    ("squeeze", "said"),
    [
        (lambda y: y.squeeze(), "aten.squeeze.default in the network itself needs this size: it gives the shape [2]"),
        (
            lambda y: y.squeeze(1).squeeze(-1).squeeze(-1),
            "aten.squeeze.dim in the network itself needs this size: it gives the shape [2, 1, 1]",
        ),
        (  # the axis would come back one step later, but the sizes in between are not the dense network's
            lambda y: y.squeeze().reshape(y.shape[0], -1),
            "aten.squeeze.default in the network itself needs this size: it gives the shape [2]",
        ),
    ],
    ids=["all", "one by one", "comes back"],
)
def test_squeeze_keeps_an_axis_narrowed_to_one_channel(squeeze, said):
    result, group = stays(lambda: Squeezed(squeeze, lambda y: y), [0, 1, 3])
    assert group.kept == (0, 1, 2, 3)
    assert group.stays[0].kind == "pinned"
    assert said in group.stays[0].reason
    assert result.parity.float64.max_rel <= 1e-10
    _, two = stays(lambda: Squeezed(squeeze, lambda y: y), [0, 1])
    assert two.kept == (2, 3)  # wider than one channel, nothing vanishes
