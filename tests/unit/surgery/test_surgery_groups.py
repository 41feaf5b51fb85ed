"""Channel groups of networks whose coupling is known."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from surgery_nets import SHAPE, Block, RandomNet, groups_by_name, randomised
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.structure import Slice
from deploy_sparse.surgery import channel_groups

X = torch.zeros(2, *SHAPE)


def names(slices):
    return [s.name for s in slices]


def test_residual_sum_couples_its_producers_and_keeps_their_norms_apart():
    groups = groups_by_name(RandomNet([Block("projection", 4)], flatten=False))
    group = groups["steps.0.body.1.0.weight"]
    assert names(p.weight for p in group.producers) == ["steps.0.body.1.0.weight", "steps.0.short.weight"]
    assert names(group.producers[0].norms) == ["steps.0.body.1.1.weight", "steps.0.body.1.1.bias"]
    assert group.producers[1].norms == ()
    assert names(group.statistics) == ["steps.0.body.1.1.running_mean", "steps.0.body.1.1.running_var"]
    assert names(group.consumers) == ["hidden.weight"]
    assert (group.size, group.pinned) == (4, None)


def test_groups_come_in_the_order_of_their_first_producer():
    net = RandomNet([Block("projection", 4), Block("chain", 3)], flatten=False)
    order = [g.name for g in channel_groups(net, X)]
    assert order == [
        "stem.0.weight",
        "steps.0.body.0.0.weight",
        "steps.0.body.1.0.weight",
        "steps.1.body.0.weight",
        "hidden.weight",
        "fc.weight",
    ]
    assert order == [g.name for g in channel_groups(randomised(net), torch.ones_like(X))]


def test_flatten_repeats_each_channel_once_per_pixel():
    groups = groups_by_name(RandomNet([Block("chain", 3)], flatten=True))
    (columns,) = groups["steps.0.body.0.weight"].consumers
    assert columns == Slice("hidden.weight", 1, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2))


def test_concatenated_groups_stay_apart_and_share_the_consumer():
    groups = groups_by_name(RandomNet([Block("concat", 2)], flatten=False))
    first, second = groups["stem.0.weight"], groups["steps.0.body.0.weight"]
    assert Slice("hidden.weight", 1, (0, 1, 2, 3, 4, -1, -1)) in first.consumers
    assert Slice("hidden.weight", 1, (-1, -1, -1, -1, -1, 0, 1)) in second.consumers


def test_depthwise_filters_belong_to_the_channels_they_pass_on():
    group = groups_by_name(RandomNet([Block("depthwise", 1, bias=True)], flatten=False))["stem.0.weight"]
    assert names(group.shared) == ["steps.0.body.0.weight", "steps.0.body.0.bias"]
    assert "steps.0.body.1.weight" in names(group.producers[0].norms)


def test_norm_after_a_sum_belongs_to_no_single_producer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.fc = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.fc(self.bn(self.a(x) + self.b(x)))

    group = groups_by_name(Net())["a.weight"]
    assert names(group.shared) == ["bn.weight", "bn.bias"]
    assert [p.norms for p in group.producers] == [(), ()]


def test_gate_per_channel_couples_and_gate_per_pixel_does_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.channel, self.pixel = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
            self.fc = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            x = x * torch.sigmoid(self.channel(x.mean((2, 3), keepdim=True)))
            return self.fc(x * torch.sigmoid(self.pixel(x)))

    groups = groups_by_name(Net())
    assert names(p.weight for p in groups["a.weight"].producers) == ["a.weight", "channel.weight"]
    assert groups["a.weight"].pinned is None
    assert groups["a.weight"].size == 4
    assert "one value serves many channels at aten.mul" in groups["pixel.weight"].pinned


def test_chunks_of_one_tensor_lose_the_same_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            left, right = self.a(x).chunk(2, dim=1)
            return self.fc(left * torch.sigmoid(right))

    group = groups_by_name(Net())["a.weight"]
    assert group.producers[0].weight.channels == (0, 1, 2, 0, 1, 2)
    assert (group.size, group.pinned) == (3, None)


def test_functional_and_shared_modules_are_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.kernel = nn.Parameter(torch.randn(2, 4, 1, 1))
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = self.shared(F.relu(self.shared(self.stem(x))))
            return F.conv2d(x * self.scale.view(1, -1, 1, 1), self.kernel)

    group = groups_by_name(Net())["stem.weight"]
    assert names(p.weight for p in group.producers) == ["stem.weight", "shared.weight"]
    assert names(group.consumers) == ["shared.weight", "kernel"]
    assert names(group.shared) == ["scale"]


class Tail(nn.Module):
    """A stem, something done to its channels, and a classifier; ``free`` is a branch nothing happens to."""

    def __init__(self, what):
        super().__init__()
        self.stem, self.fc, self.what = nn.Conv2d(3, 4, 1), nn.LazyConv2d(2, 1), what
        self.free, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)
        self.register_buffer("hidden_scale", torch.ones(1, 4, 1, 1), persistent=False)
        self.own_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.forward(X)

    def forward(self, x):
        return self.fc(self.what(self, self.stem(x))).mean((2, 3)) + self.last(self.free(x)).mean((2, 3))


PINS = {
    "unknown operation aten.cummax.default in the network itself": lambda net, x: x.cummax(1)[0],
    "unknown operation aten.fft_rfft.default in the network itself": lambda net, x: torch.fft.rfft(x, dim=1).real,
    "unknown operation aten.as_strided.default in the network itself": lambda net, x: x.as_strided(
        (2, 4, 8, 8), (256, 64, 8, 1)
    ),
    "channels are mixed by aten.cumsum.default in the network itself": lambda net, x: x.cumsum(1),
    "channels are mixed by aten.softmax.int in the network itself": lambda net, x: x.softmax(1),
    "the size is stated by aten.slice.Tensor in the network itself": lambda net, x: x[:, :2],
    "the size is stated by aten.split.Tensor in the network itself": lambda net, x: torch.split(x, 2, 1)[0],
    "the size is stated by aten.view.default in the network itself": lambda net, x: x.view(2, 4, 64)[..., None],
    "channels are picked at fixed positions by aten.index.Tensor": lambda net, x: x[:, [2, 0]],
    "channels are split unevenly by aten.chunk": lambda net, x: x.chunk(3, 1)[0],
    "the channel axis is padded by aten.pad": lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "channels are mixed by aten.mean.dim": lambda net, x: x.mean(1, keepdim=True),
    "channels meet the network input at aten.add": lambda net, x: x,
    "channels meet a constant tensor at aten.mul.Tensor": lambda net, x: (
        x * torch.arange(4, device=x.device).view(4, 1, 1)
    ),
}


@pytest.mark.parametrize("reason", PINS)
def test_what_is_not_understood_is_named_and_pinned_and_the_rest_is_free(reason):
    net = Tail(PINS[reason]) if "network input" not in reason else InputMeetsChannels()
    groups = groups_by_name(net)
    assert reason in groups["stem.weight"].pinned
    assert groups["free.weight"].pinned is None
    assert groups["fc.weight"].pinned == "network output"


class InputMeetsChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
        self.free, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.fc(self.stem(x) + x) + self.last(self.free(x))


SIZES_FROM_THE_TENSOR = {
    "slice": lambda net, x: x[:, : x.shape[1] // 2],
    "view": lambda net, x: x.view(2, x.shape[1], 64)[..., None],
    "inferred": lambda net, x: x.reshape(2, -1, 8, 8),
}


@pytest.mark.parametrize("how", SIZES_FROM_THE_TENSOR)
def test_sizes_that_the_code_takes_from_the_tensor_leave_the_channels_free(how):
    group = groups_by_name(Tail(SIZES_FROM_THE_TENSOR[how]))["stem.weight"]
    assert (group.pinned, group.size) == (None, 4)


def test_channels_chosen_one_by_one_go_from_both_halves_of_a_split():
    group = groups_by_name(Tail(lambda net, x: torch.split(x, x.size(1) // 2, 1)[0]))["stem.weight"]
    assert (group.pinned, group.size) == (None, 2)
    assert group.producers[0].weight.channels == (0, 1, 0, 1)


@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "parameter"])
def test_a_tensor_of_the_network_that_meets_channels_holds_them(buffer):
    """Whether it is saved with the state dict or not."""

    def scaled(net, x):
        return x * (net.hidden_scale if buffer else net.own_scale)

    group = groups_by_name(Tail(scaled))["stem.weight"]
    assert group.pinned is None
    name, dim, role = ("hidden_scale", 1, group.statistics) if buffer else ("own_scale", 0, group.shared)
    assert role == (Slice(name, dim, (0, 1, 2, 3)),)


def test_grouped_convolution_loses_the_same_positions_in_every_group_or_whole_groups():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    positions = groups_by_name(net)
    inputs, outputs = positions["0.weight"], positions["1.weight"]
    assert (inputs.pinned, inputs.size, inputs.producers[0].weight.channels) == (None, 2, (0, 1, 0, 1))
    assert inputs.consumers == (Slice("1.weight", 1, (0, 1)),)
    assert (outputs.pinned, outputs.size, outputs.producers[0].weight.channels) == (None, 3, (0, 1, 2, 0, 1, 2))
    (whole, _) = channel_groups(net, X, unit="heads")
    assert (whole.pinned, whole.size) == (None, 2)
    assert [part.weight.channels for part in whole.producers] == [(0, 0, 1, 1), (0, 0, 0, 1, 1, 1)]


def test_in_place_write_into_a_view_is_seen_by_later_readers_of_the_same_memory():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x, gate = self.stem(x), self.gate(x)[:, :, 1:]
            part = x[:, :, 1:]
            part.add_(gate)
            return self.fc(torch.cat([x, x], 1))

    group = groups_by_name(Net())["stem.weight"]
    assert names(p.weight for p in group.producers) == ["stem.weight", "gate.weight"]
    assert group.pinned is None
    assert group.consumers == (Slice("fc.weight", 1, (0, 1, 2, 3, 0, 1, 2, 3)),)


def test_training_flags_are_restored():
    net = RandomNet([Block("chain", 3)], flatten=False).train()
    net.stem.eval()
    before = {name: part.training for name, part in net.named_modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    channel_groups(net, X)
    assert {name: part.training for name, part in net.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_network_that_cannot_be_traced_is_refused_in_one_line():
    class Net(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(SurgeryError, match=r"the network cannot be traced: .*\n  expected: a module that runs"):
        channel_groups(Net(), X)


def test_control_flow_on_data_is_one_message_and_no_graphs(capfd):
    class Net(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(SurgeryError, match="without data-dependent control flow"):
        channel_groups(Net(), X)
    assert "".join(capfd.readouterr()) == ""


def test_what_a_traced_network_says_on_standard_error_is_heard(capsys):
    class Net(nn.Conv2d):
        def forward(self, x):
            print("from forward", file=sys.stderr)
            return super().forward(x)

    channel_groups(Net(X.shape[1], 2, 1), X)
    assert "from forward" in capsys.readouterr().err


def test_wrong_input_shape_is_refused(capfd):
    message = r"cannot be traced: it does not accept these inputs \(\[.*\]\): .*4 channels[\s\S]*batch axis first"
    with pytest.raises(SurgeryError, match=message):
        channel_groups(nn.Conv2d(4, 2, 1), X)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)).train()
    flat[2].register_buffer("calls", torch.zeros(()))
    flat[2].register_forward_pre_hook(lambda module, inputs: module.calls.add_(1))
    with pytest.raises(SurgeryError, match=r"does not accept these inputs[\s\S]*unsqueeze\(0\)"):
        channel_groups(flat, torch.rand(3, 2, 2))
    assert flat[2].calls == 0
    assert flat[2].training
    assert "".join(capfd.readouterr()) == ""
