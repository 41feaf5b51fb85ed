"""Numbers and orders that follow the width of a tensor: surgery keeps the width, or what the code does with it fits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from random_masks import X, cut, ticket_of
from surgery_nets import randomised
from torch import nn

from deploy_sparse.surgery import channel_groups

WIDTH = 6


class Net(nn.Module):
    """Six channels, what the code does to them, and a branch beside it that always shrinks."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.what = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, 4, 1), what
        self.depthwise, self.kernel = nn.Parameter(torch.ones(WIDTH, 1, 3, 3)), nn.Parameter(torch.ones(4, 3, 1, 1))
        self.c, self.d = nn.LazyConv2d(2, 1), nn.Conv2d(4, 2, 1)
        self.double()
        self.forward(X)

    def forward(self, x):
        return self.c(self.what(self, torch.relu(self.a(x)))) + self.d(torch.relu(self.b(x)))


def emptied(what, gone):
    """Rows and biases of ``gone``: behind the ReLU these channels are zero. Also the group's own channels."""

    def factory():
        return Net(what)

    dense = randomised(factory())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for name, rows in (("a", gone), ("b", [1])):
        masks[f"{name}.weight"][list(rows)] = masks[f"{name}.bias"][list(rows)] = False
    result = cut(ticket_of(dense, masks), factory)
    assert result.module.b.out_channels == 3
    return result, result.plan.groups[0]


FOLLOWS = {
    "over": lambda net, y: y / y.shape[1],
    "times": lambda net, y: y * y.shape[1],
    "plus": lambda net, y: y + y.shape[1],
    "alpha": lambda net, y: torch.add(y, y, alpha=y.shape[1]),
    "value": lambda net, y: torch.addcmul(y, y, y, value=y.shape[1]),
    "root": lambda net, y: y * y.shape[1] ** -0.5,
    "math": lambda net, y: y / math.sqrt(y.size(1)),
    "power": lambda net, y: y ** (1 + 1 / y.shape[1]),
    "bound": lambda net, y: y.clamp(max=y.shape[1] / 5),
    "a tensor": lambda net, y: y * torch.tensor(float(y.shape[1])),
    "a tensor like it": lambda net, y: y * y.new_full((), y.shape[1]),
    "mean by hand": lambda net, y: y.sum(1, keepdim=True) / y.shape[1],
    "norm by hand": lambda net, y: y * torch.rsqrt(y.pow(2).sum(1, keepdim=True) / y.shape[1] + 0.1),
    "positions": lambda net, y: y * torch.arange(y.shape[1]).view(-1, 1, 1),
    "ramp": lambda net, y: y * torch.linspace(0, 1, y.shape[1], dtype=y.dtype, device=y.device).view(-1, 1, 1),
}


@pytest.mark.parametrize("how", FOLLOWS)
def test_a_number_that_follows_the_width_never_changes_the_function(how):
    _, group = emptied(FOLLOWS[how], [1, 4])
    assert group.kept == (0, 1, 2, 3, 4, 5) or (group.kept == (0, 2, 3, 5) and how in ("root", "math", "over", "times"))
    assert group.stays or group.kept == (0, 2, 3, 5)  # what stays says why


MOVED = {
    "roll": (lambda net, y: y.roll(1, 1), [5], 6),
    "shuffle, a product": (lambda net, y: F.channel_shuffle(y, 2), [1, 4], 4),
    "shuffle, no product": (lambda net, y: F.channel_shuffle(y, 2), [0, 4], 6),
    "flipped": (lambda net, y: y.flip(1), [0, 4], 4),
    "repeated": (lambda net, y: y.repeat(1, 2, 1, 1), [0, 4], 4),
    "interleaved": (lambda net, y: y.repeat_interleave(2, 1), [0, 4], 4),
    "unfolded": (lambda net, y: y.unfold(1, 2, 2).sum(-1), [1], 6),
}


@pytest.mark.parametrize("how", MOVED)
def test_channels_that_change_places_go_only_where_the_order_holds(how):
    what, gone, left = MOVED[how]
    result, _ = emptied(what, gone)
    assert result.module.a.out_channels == left


def test_gated_linear_units_lose_value_and_gate_together():
    result, group = emptied(lambda net, y: F.glu(y, 1), [0, 3])
    assert group.size == 3
    assert result.module.a.out_channels == 4
    assert result.module.c.in_channels == 2
    _, apart = emptied(lambda net, y: F.glu(y, 1), [0, 4])
    assert apart.kept == (1, 2)  # zero times any gate is zero, half a value is a value


FUNCTIONAL = {
    "depthwise by shape": (lambda net, y: F.conv2d(y, net.depthwise, padding=1, groups=y.shape[1]), [1, 4], 4),
    "depthwise by number": (lambda net, y: F.conv2d(y, net.depthwise, padding=1, groups=6), [1, 4], 6),
    "grouped": (lambda net, y: F.conv2d(y, net.kernel, groups=2), [1, 4], 4),
    "grouped, a whole group": (lambda net, y: F.conv2d(y, net.kernel, groups=2), [0, 1, 2], 6),
    "group norm": (lambda net, y: F.group_norm(y, 2), [1, 4], 6),
    "instance norm": (lambda net, y: F.instance_norm(y), [1, 4], 4),
    "layer norm": (lambda net, y: F.layer_norm(y.movedim(1, -1), (y.shape[1],)).movedim(-1, 1), [1, 4], 6),
}


@pytest.mark.parametrize("how", FUNCTIONAL)
def test_functional_layers_read_their_sizes_from_the_call(how):
    what, gone, left = FUNCTIONAL[how]
    result, group = emptied(what, gone)
    assert result.module.a.out_channels == left
    assert bool(group.stays) == (left == WIDTH)


def test_orders_that_cannot_change_are_pinned_by_name():
    group = channel_groups(Net(MOVED["roll"][0]), X)[0]
    assert group.pinned == "channels are moved by aten.roll.default in the network itself"
    shuffled = channel_groups(Net(MOVED["shuffle, a product"][0]), X)[0]
    assert (shuffled.pinned, shuffled.size) == (None, 3)
