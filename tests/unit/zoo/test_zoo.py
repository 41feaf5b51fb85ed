"""The zoo's networks have the published parameter counts, and every entry builds and runs."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError


def on_meta(name, **arguments):
    with torch.device("meta"):
        return zoo.build(name, **arguments)


def counts(network):
    """All parameters, and the convolutions' weights."""
    convolutions = [m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d)]
    return sum(p.numel() for p in network.parameters()), sum(convolutions)


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions"),
    [
        ("resnet18", 11_173_962, 11_159_232),
        ("resnet50", 23_520_842, 23_447_232),
        ("wrn32_2", 1_860_522, 1_854_304),
        ("vgg16_bn", 14_728_266, 14_710_464),
        ("mobilenet_v1", 3_217_226, 3_185_088),
    ],
)
def test_published_parameter_counts(name, parameters, convolutions):
    assert counts(on_meta(name)) == (parameters, convolutions)


@pytest.mark.parametrize(
    ("name", "depth", "published"), [("resnet20", 20, 269_722), ("resnet32", 32, None), ("resnet56", 56, 853_018)]
)
def test_counts_of_the_6n_plus_2_layer_resnets(name, depth, published):
    """Stem; in each stage 2 n convolutions, whose first one widens; no parameters in any shortcut."""
    n = (depth - 2) // 6
    stages = [(16, 16), (16, 32), (32, 64)]
    convolutions = 9 * (3 * 16 + sum(c_in * width + (2 * n - 1) * width * width for c_in, width in stages))
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    total = convolutions + norms + 64 * 10 + 10
    assert counts(on_meta(name)) == (total, convolutions)
    assert published in (None, total)


def test_count_of_vgg19_bn():
    """16 convolutions with bias and BatchNorm, one Linear layer."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 256, *[512] * 8]
    convolutions = 9 * sum(c_in * c_out for c_in, c_out in pairwise(widths))
    assert counts(on_meta("vgg19_bn")) == (convolutions + 3 * sum(widths[1:]) + 512 * 10 + 10, convolutions)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_network_maps_its_input_shape_to_ten_classes(name):
    model = zoo.build(name).eval()
    assert model(torch.zeros(2, *zoo.entry(name).input_shape)).shape == (2, 10)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_network_takes_classes_and_arguments_read_from_json(name):
    arguments = json.loads(json.dumps({**zoo.entry(name).arguments, "classes": 7}))
    network = zoo.check(name, arguments, zoo.entry(name).input_shape, 7)
    assert counts(network) == counts(on_meta(name, classes=7))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "wrn32_2", "vgg16_bn", "mobilenet_v1"])
def test_the_papers_networks_take_tiny_imagenet_too(name):
    zoo.check(name, {"classes": 200}, (3, 64, 64), 200)


@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", 4), ("resnet50", 4), ("resnet20", 8), ("wrn32_2", 8), ("resnet_synthetic", 4)]
)
def test_stems_keep_the_resolution_but_for_the_synthetic_sets(name, last):
    network = on_meta(name)
    with torch.device("meta"):
        stem = network.conv1(torch.zeros(1, 3, 32, 32))
        assert stem.shape[2:] == ((16, 16) if name == "resnet_synthetic" else (32, 32))
        assert network.stages(network.bn1(stem)).shape[2:] == (last, last)


def test_bottlenecks_have_torchvisions_layout():
    network = on_meta("resnet50")
    first = network.stages[1][0]
    assert [(c.kernel_size, c.stride, c.out_channels) for c in (first.conv1, first.conv2, first.conv3)] == [
        ((1, 1), (1, 1), 128),
        ((3, 3), (2, 2), 128),
        ((1, 1), (1, 1), 512),
    ]
    assert [len(stage) for stage in network.stages] == [3, 4, 6, 3]


def test_mobilenet_alternates_depthwise_and_pointwise_convolutions():
    network = on_meta("mobilenet_v1")
    with torch.device("meta"):
        assert network.blocks(torch.zeros(1, 32, 32, 32)).shape == (1, 1024, 2, 2)
    for block in network.blocks:
        assert block.conv1.groups == block.conv1.in_channels == block.conv1.out_channels
        assert (block.conv2.kernel_size, block.conv2.groups) == ((1, 1), 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "vgg16_bn"])
def test_convolutions_start_with_the_fan_out_rule(name):
    """Standard deviation √(2 / fan-out), He et al. 2015; the largest ordinary convolution shows it within 5 %."""
    network = zoo.build(name)
    weight = max((m.weight for m in network.modules() if isinstance(m, nn.Conv2d)), key=torch.Tensor.numel)
    fan_out = weight.shape[0] * weight[0, 0].numel()
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_the_synthetic_sets_network_learns():
    torch.manual_seed(0)
    network = zoo.build("resnet_synthetic")
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_arguments_override_the_entry():
    assert zoo.build("resnet_digits", widths=(8, 8, 8), classes=3).fc.weight.shape == (3, 8)


def test_known_names():
    assert zoo.known("resnet56")
    assert not zoo.known("resnet57")
    assert not zoo.known("user factory")


def test_the_zoo_itself_imports_no_torchvision():
    program = (
        "import sys; from deploy_sparse import zoo; from deploy_sparse.errors import ConfigError\n"
        "zoo.build('resnet_digits'); assert not zoo.known('user factory')\n"
        "try: zoo.build('no such network')\n"
        "except ConfigError: print('torchvision' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_bad_names_and_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"unknown network 'resnet_digit'[\s\S]*did you mean 'resnet_digits'"):
        zoo.build("resnet_digit")
    with pytest.raises(ConfigError, match=r"or torchvision/<name> for a classifier"):
        zoo.build("efficientnet_b0")
    with pytest.raises(ConfigError, match=r"cannot be built with \{'depth': 3\}[\s\S]*arguments like .*'classes': 10"):
        zoo.build("resnet_digits", depth=3)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        zoo.build("resnet_digits", widths=(8, 0, 8))
    with pytest.raises(ConfigError, match="channel counts must be 1 or more"):
        zoo.build("vgg_digits", layout=(8, -1))
    with pytest.raises(ConfigError, match="layout item 'A'"):
        zoo.build("vgg_digits", layout=(8, "A"))
    with pytest.raises(ConfigError, match="3 stages of blocks but 2 widths"):
        zoo.build("resnet_digits", widths=(8, 8))
    with pytest.raises(ConfigError, match="block 'wide'; 'basic' and 'bottleneck' are known"):
        zoo.build("resnet_digits", block="wide")
    with pytest.raises(ConfigError, match="shortcut 'none'; 'conv' and 'pad' are known"):
        zoo.build("resnet_digits", shortcut="none")
    with pytest.raises(ConfigError, match="from 8 to 4 channels"):
        zoo.build("resnet20", widths=(8, 4, 4))
    with pytest.raises(ConfigError, match="13 strides of blocks but 2 widths"):
        zoo.build("mobilenet_v1", widths=(8, 8))
    with pytest.raises(ConfigError, match="strides, in_channels and classes must be 1 or more"):
        zoo.build("mobilenet_v1", widths=(8, 8), strides=(0,))


def test_check_names_the_images_a_network_does_not_take():
    with pytest.raises(ConfigError, match=r"'resnet20' makes an error \(.*\) of two images of shape \[1, 32, 32\]"):
        zoo.check("resnet20", {}, (1, 32, 32), 10)
    with pytest.raises(
        ConfigError,
        match=r"makes 10 classes, the data has 100\n[\s\S]*next step: .*--model.arguments '\{classes=100\}'",
    ):
        zoo.check("resnet20", {}, (3, 32, 32), 100)
