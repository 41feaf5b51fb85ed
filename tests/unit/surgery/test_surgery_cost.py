"""Multiply-accumulates by weight: reckoned by hand on small layers, equal in sum to the whole network's on real ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.surgery.cost import cost_of, layer_macs

IMAGES = 3


@pytest.mark.parametrize("name", [*zoo.ZOO, "torchvision/resnet50", "torchvision/mobilenet_v2"])
def test_the_layers_come_to_the_whole_network(name):
    with torch.device("meta"):
        network = zoo.build(name).eval()
        inputs = (torch.zeros(IMAGES, *zoo.entry(name).input_shape),)
        macs, (whole, _) = layer_macs(network, inputs), cost_of(network, inputs)
    assert sum(macs.values()) == whole.macs
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert list(macs) == [f"{layer}.weight" for layer in layers]
    assert min(macs.values()) > 0


def test_the_published_cost_of_resnet_50():
    with torch.device("meta"):
        network = zoo.build("torchvision/resnet50").eval()
        macs = layer_macs(network, (torch.zeros(1, 3, 224, 224),))
    assert macs["conv1.weight"] == 112 * 112 * 64 * 3 * 49
    assert 2 * sum(macs.values()) == pytest.approx(8.2e9, rel=0.005)  # the DST papers count a multiply-add as two


class Net(nn.Module):
    """A layer of every kind; one called twice, one weight in two layers, one read by a function, one never called."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 5, 3)
        self.twice = nn.Linear(5, 5)
        self.shared = nn.Linear(5, 5, bias=False)
        self.shared.weight = self.twice.weight
        self.function = nn.Linear(5, 7)
        self.unused = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.ones(7, 2))
        self.norm = nn.LayerNorm((4, 8, 8))

    def forward(self, x):  # [n, 4, 8, 8]
        x.mul_(2)
        y = self.depthwise(self.grouped(self.plain(self.norm(x))))  # [n, 6, 4, 4]
        y = self.line(self.up(y).flatten(2))  # [n, 5, 62]
        y = self.shared(self.twice(self.twice(y.transpose(1, 2))))  # [n, 62, 5]
        y = F.linear(y, self.function.weight) @ self.table  # [n, 62, 2]
        return y @ y.transpose(1, 2)  # no weight


def test_costs_are_those_of_one_sample_reckoned_by_hand():
    torch.manual_seed(0)
    network, images = Net().eval(), torch.ones(IMAGES, 4, 8, 8)
    macs = layer_macs(network, (images,))
    assert macs == {
        "table": 62 * 7 * 2,
        "plain.weight": 16 * 6 * 4 * 9,
        "grouped.weight": 16 * 6 * 2 * 9,
        "depthwise.weight": 16 * 6 * 9,
        "up.weight": 16 * 6 * 4 * 4,  # every input pixel meets the whole kernel
        "line.weight": 62 * 5 * 4 * 3,
        "twice.weight": 3 * 62 * 5 * 5,
        "function.weight": 62 * 5 * 7,
        "unused.weight": 0,
    }
    assert torch.equal(images, torch.ones(IMAGES, 4, 8, 8))  # the network doubled a copy
    assert cost_of(network, (images,))[0].macs == sum(macs.values()) + 62 * 62 * 2


def test_counting_leaves_no_gradient_and_takes_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x, y, scale):
            return (self.a(x) + self.b(y)) * scale

    network = Two().eval()
    assert layer_macs(network, (torch.ones(5, 3), torch.ones(5, 2), 2.0)) == {"a.weight": 12, "b.weight": 8}
    assert all(parameter.grad is None for parameter in network.parameters())


def test_attention_counts_the_same_in_either_mode():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    inputs = (torch.randn(1, 6, 16),)
    found = layer_macs(layer.eval(), inputs)
    assert found == layer_macs(layer.train(), inputs)
    assert found["self_attn.in_proj_weight"] == 6 * 16 * 48
    assert found["self_attn.out_proj.weight"] == 6 * 16 * 16
    assert cost_of(layer.eval(), inputs)[0].macs >= sum(found.values())  # and products of two activations
    assert torch.backends.mha.get_fastpath_enabled()  # left as it was


def test_a_view_of_a_parameter_may_be_passed_to_a_submodule():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.token.expand(x.shape[0], -1)) + x

    module = Token()
    assert cost_of(module, (torch.randn(1, 6),))[0].macs == 36
    assert all(p.requires_grad for p in module.parameters())
