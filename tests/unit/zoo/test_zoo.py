"""The zoo's networks have the published parameter counts, and every entry builds and runs."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.errors import ConfigError


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("vgg16_bn", 14_728_266)])
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in zoo.build(name).parameters()) == parameters


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_network_maps_its_input_shape_to_ten_classes(name):
    model = zoo.build(name).eval()
    assert model(torch.zeros(2, *zoo.entry(name).input_shape)).shape == (2, 10)


def test_arguments_override_the_entry():
    assert zoo.build("resnet_digits", widths=(8, 8, 8), classes=3).fc.weight.shape == (3, 8)


def test_bad_names_and_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"unknown network 'resnet_digit'[\s\S]*did you mean 'resnet_digits'"):
        zoo.build("resnet_digit")
    with pytest.raises(ConfigError, match=r"cannot be built with \{'depth': 3\}"):
        zoo.build("resnet_digits", depth=3)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        zoo.build("resnet_digits", widths=(8, 0, 8))
    with pytest.raises(ConfigError, match="channel counts must be 1 or more"):
        zoo.build("vgg_digits", layout=(8, -1))
    with pytest.raises(ConfigError, match="layout item 'A'"):
        zoo.build("vgg_digits", layout=(8, "A"))
    with pytest.raises(ConfigError, match="3 stages of blocks but 2 widths"):
        zoo.build("resnet_digits", widths=(8, 8))
