"""From the tables of a configuration to schedules in steps, and what is refused."""

import re

import pytest

from deploy_sparse.cli.catalog import load_config, load_recipe, recipes
from deploy_sparse.config import config_from
from deploy_sparse.errors import ConfigError
from deploy_sparse.sparsify.exploration import PRESETS, SoftBound
from deploy_sparse.workflow.dst_config import (
    ChaseConfig,
    DstConfig,
    SetConfig,
    channel_schedule,
    check_dst,
    exploration_of,
)

RECIPES = recipes()


def chase(name, *words):
    config, _ = load_config(load_recipe(RECIPES["chase"]), RECIPES["chase"].configs[name], list(words))
    return config


def made(kind, **tables):
    return config_from(kind, tables, source="test")


def test_without_settings_of_its_own_an_exploration_is_its_presets():
    for kind, name in ((DstConfig, "rigl"), (SetConfig, "set"), (ChaseConfig, "chase")):
        config = made(kind, fit={"epochs": 10})
        assert exploration_of(config, 37) == PRESETS[name](37, 370)


def test_settings_override_the_presets_and_shares_of_training_become_steps():
    explore = {"preset": "rigl", "interval": 7, "stop": 0.5, "growth": "random", "scope": "global", "fraction": 0.4, "final_fraction": 0.1,
               "decay": "constant", "surplus": 0.1, "surplus_until": 0.4, "final_surplus": 0.01, "gradient_batches": 3}  # fmt: skip
    found = exploration_of(made(DstConfig, fit={"epochs": 10}, explore=explore), 40)
    assert (found.interval, found.stop, found.growth, found.scope) == (7, 200, "random", "global")
    assert (found.fraction, found.final_fraction, found.decay, found.gradient_batches) == (0.4, 0.1, "constant", 3)
    assert found.soft == SoftBound(0.1, 160, 0.01)


def test_once_a_step_is_an_interval_of_set_too():
    found = exploration_of(made(SetConfig, fit={"epochs": 10}, explore={"interval": 1}), 40)
    assert (found.interval, found.offset) == (1, 0)


def test_a_surplus_of_zero_switches_a_presets_soft_bound_off():
    assert exploration_of(made(ChaseConfig, explore={"surplus": 0.0}), 40).soft is None


@pytest.mark.parametrize(
    ("name", "epoch", "first", "second", "last", "count"),
    [
        ("vgg19_bn_cifar100", 500, 7500, 15_500, 65_000, 9),
        ("resnet50_cifar100", 500, 500, 1500, 65_000, 66),
        ("resnet50_imagenet_c40", 2502, 4504, 9508, 200_160, 41),
    ],
)
def test_the_published_commands_removals(name, epoch, first, second, last, count):
    """Section 2.5 of the paper's code, and the correction at the end of it."""
    config = chase(name)
    events = channel_schedule(config, epoch).events()
    assert (events[0], events[1], events[-1], len(events)) == (first, second, last, count)
    assert exploration_of(config, epoch).interval == 1000


def test_the_published_commands_soft_bounds():
    assert exploration_of(chase("vgg19_bn_cifar100"), 500).soft == SoftBound(0.05, 65_000)
    assert exploration_of(chase("resnet50_imagenet_c40"), 2502).soft == SoftBound(0.05, 200_160, 0.005)


def test_the_long_configs_are_stretched():
    short, long = chase("resnet50_imagenet_c30"), chase("resnet50_imagenet_c30_long")
    assert (short.fit.epochs, long.fit.epochs) == (100, 150)
    assert channel_schedule(long, 2502).until == 1.5 * channel_schedule(short, 2502).until


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("rigl", ["--explore.interval", "9999"], r"explore.interval = 9999 in a training of \d+ steps"),
        ("chase", ["--channels.interval", "9999"], "channels.interval = 9999 with all channels gone by step"),
        ("rigl", ["--explore.surplus_until", "0.5"], "explore.surplus_until = 0.5 without a surplus"),
        (
            "rigl",
            ["--explore.gradient_batches", "99"],
            r"\[explore\]: gradients averaged over 99 batches every 10 steps",
        ),
        ("rigl", ["--explore.stop", "0.002", "--explore.interval", "1"], "stop to move weights after step"),
        ("chase", ["--channels.until", "0.001", "--channels.interval", "1"], "with all channels gone by step 1"),
        ("chase", ["--channels.sparsity", "0.999"], r"channel sparsity 0.999 leaves \d+ of 896 channels"),
        (
            "chase",
            ["--sparse.exclude", '["stages*"]'],
            r"no channels of 'resnet_digits' may go .* sparse.exclude = \['stages",
        ),
        (
            "rigl",
            [
                "--sparse.reestimate",
                "true",
                "--data.name",
                "synthetic",
                "--model.name",
                "torchvision/squeezenet1_1",
                "--model.arguments",
                "{classes = 10}",
            ],
            "sparse.reestimate with 'torchvision/squeezenet1_1', which has no BatchNorm",
        ),
        ("chase", ["--sparse.exclude", '["nothing"]'], "exclude pattern 'nothing' matches no"),
        ("chase", ["--explore.final_surplus", "0.2"], "a soft bound from 0.05 to 0.2"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_run(recipe, words, message):
    found = load_recipe(RECIPES[recipe])
    config, _ = load_config(found, RECIPES[recipe].configs["resnet_digits"], words)
    with pytest.raises(ConfigError, match=message) as caught:
        check_dst(config)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("recipe", "words", "fix"),
    [
        ("chase", ["--channels.until", "0.002", "--channels.interval", "1"], "raise --channels.until"),
        ("rigl", ["--explore.stop", "0.002", "--explore.interval", "1"], "raise --explore.stop"),
        ("rigl", ["--explore.interval", "9999"], r"a shorter --explore.interval, for example \d+, or a config"),
        ("chase", ["--sparse.exclude", '["stages*"]'], "^exclude fewer layers, or choose --channels.sparsity 0"),
    ],
)
def test_the_next_step_leads_somewhere(recipe, words, fix):
    found = load_recipe(RECIPES[recipe])
    config, _ = load_config(found, RECIPES[recipe].configs["resnet_digits"], words)
    with pytest.raises(ConfigError) as caught:
        check_dst(config)
    assert re.search(fix, caught.value.fix), caught.value.fix
