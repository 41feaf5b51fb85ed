"""The network a configuration starts from, and the optimizer's keys that do not go together."""

import math

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.config import config_from
from deploy_sparse.errors import ConfigError
from deploy_sparse.workflow.config import StudyConfig, check_study
from deploy_sparse.workflow.prepare import initial_network


def built(seed=0, **model):
    return initial_network(config_from(StudyConfig, {"seed": seed, "model": model})).state_dict()


def layers(network):
    kinds = (nn.Conv2d, nn.Linear)
    return [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, kinds)]


def test_a_network_has_its_own_initial_weights_of_the_seed_by_default():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        own = zoo.build("vgg_digits").state_dict()
    found = built(5, name="vgg_digits")
    assert all(torch.equal(found[name], value) for name, value in own.items())


def test_fan_in_draws_every_convolution_and_linear_layer_and_nothing_else():
    own, found = built(name="vgg_digits"), built(name="vgg_digits", init="fan_in")
    drawn = layers(zoo.build("vgg_digits"))
    assert {name for name, value in found.items() if not torch.equal(value, own[name])} == {*drawn}
    for name in drawn:
        weight = found[name]
        fan_in = weight[0].numel()
        bound = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
        assert weight.std().item() * math.sqrt(fan_in / 2) == pytest.approx(1, abs=bound)
        assert weight.abs().max().item() > 2 * math.sqrt(2 / fan_in)  # normal; a uniform one ends at √3 deviations


def test_fan_in_is_the_seeds_too_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (built(seed, name="vgg_digits", init="fan_in") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert not torch.equal(first["classifier.2.weight"], other["classifier.2.weight"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"init": "fan_out"}}, r"model.init = 'fan_out'[\s\S]*'own' or 'fan_in'"),
        ({"fit": {"optimizer": "adamw", "momentum": 0.5}}, r"fit.momentum = 0.5 with fit.optimizer = \"adamw\""),
        ({"fit": {"betas": [0.5, 0.9]}}, r"fit.betas = \[0.5, 0.9\] with fit.optimizer = \"sgd\""),
    ],
)
def test_unusable_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check_study(config_from(StudyConfig, values))
