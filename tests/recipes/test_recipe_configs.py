"""Every shipped config parses, builds its network for its data, and has the paper's hyper-parameters."""

import pytest

from deploy_sparse import data
from deploy_sparse.cli.catalog import load_config, load_recipe, recipes
from deploy_sparse.errors import ConfigError
from deploy_sparse.workflow import config as workflow_config
from deploy_sparse.workflow.config import rewind_epoch

RECIPES = recipes()
DST = ("chase", "rigl", "set")
LTH = tuple(name for name in RECIPES if name not in DST)
CONFIGS = [(name, config) for name, recipe in RECIPES.items() for config in recipe.configs]

# Chen et al. 2022, Table 1: (batch, weight decay), None where the cell is blank
TABLE_1 = {
    ("cifar10", "wrn32_2"): (128, 1e-4), ("cifar10", "resnet18"): (128, 1e-4), ("cifar10", "mobilenet_v1"): (128, 1e-4), ("cifar10", "vgg16_bn"): (128, 2e-4),
    ("cifar100", "wrn32_2"): (None, 2e-4), ("cifar100", "resnet18"): (None, 2e-4), ("cifar100", "mobilenet_v1"): (64, 2e-4), ("cifar100", "vgg16_bn"): (None, 5e-4),
    ("tiny-imagenet", "resnet50"): (32, 5e-4), ("imagenet", "torchvision/resnet50"): (None, 1e-4),
}  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    return {name: load_recipe(recipe) for name, recipe in RECIPES.items()}


@pytest.fixture
def no_files(monkeypatch):
    """As if every data set's files were there."""
    monkeypatch.setattr(workflow_config.data, "check_files", lambda name, folder: None)


@pytest.mark.parametrize(("recipe", "name"), CONFIGS)
def test_every_config_parses_and_builds(recipe, name, modules, no_files):
    config, _ = load_config(modules[recipe], RECIPES[recipe].configs[name], [])
    modules[recipe].check(config)


@pytest.mark.parametrize(("recipe", "name"), [pair for pair in CONFIGS if pair[0] in LTH])
def test_the_papers_configs_have_its_hyper_parameters(recipe, name, modules):
    config, _ = load_config(modules[recipe], RECIPES[recipe].configs[name], [])
    key = (config.data.name, config.model.name)
    if key not in TABLE_1:
        assert config.data.name in ("digits", "synthetic")
        return
    batch, weight_decay = TABLE_1[key]
    fit, cifar = config.fit, config.data.name.startswith("cifar")
    assert batch in (None, fit.batch_size)
    assert (fit.weight_decay, fit.lr, fit.momentum, fit.nesterov) == (weight_decay, 0.1, 0.9, False)
    assert (fit.schedule, fit.gamma, fit.warmup_epochs) == ("step", 0.1, 0)
    assert (fit.epochs, fit.milestones) == ((160, (80, 120)) if cifar else (95, (30, 60)))
    if recipe != "dense":
        assert config.imp.rate == 0.2
        assert rewind_epoch(fit, config.imp) == (8 if cifar else 5)  # 5 % of the training
        assert config.imp.rewind == "rewind"


@pytest.mark.parametrize("recipe", sorted(LTH))
def test_every_recipe_has_a_config_for_each_column_of_table_1_and_small_ones(recipe, modules):
    found = {
        (c.data.name, c.model.name) for c in (load_config(modules[recipe], f, [])[0] for f in RECIPES[recipe].configs.values())
    }  # fmt: skip
    assert set(TABLE_1) <= found
    assert {"digits", "synthetic"} <= {name for name, _ in found}


# Chase's published commands: (epochs, batch, lr, weight decay, density, S_c, β, ΔT in steps, share of training for the channels)
CHASE = {
    "vgg19_bn_cifar100": (160, 100, 0.1, 5e-4, 0.1, 0.5, 0.2, 8000, 130 / 160),
    "resnet50_cifar100": (160, 100, 0.1, 5e-4, 0.1, 0.5, 0.5, 1000, 130 / 160),
    **{f"resnet50_imagenet_{name}": (100, 512, 0.512, 1e-4, 0.1, share, 0.2, 5004, 0.8) for name, share in (("c0", 0.0), ("c30", 0.3), ("c40", 0.4))},
    **{f"resnet50_imagenet_{name}_long": (150, 512, 0.512, 1e-4, 0.1, share, 0.2, 5004, 0.8) for name, share in (("c0", 0.0), ("c30", 0.3), ("c40", 0.4))},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHASE))
def test_chases_configs_have_the_published_hyper_parameters(name, modules):
    config, _ = load_config(modules["chase"], RECIPES["chase"].configs[name], [])
    fit, channels, explore = config.fit, config.channels, config.explore
    given = (fit.epochs, fit.batch_size, fit.lr, fit.weight_decay, config.sparse.density, channels.sparsity)
    assert (*given, channels.floor, channels.interval, channels.until) == CHASE[name]
    assert (fit.momentum, fit.nesterov, explore.interval, explore.surplus) == (0.9, False, 1000, 0.05)
    assert (channels.coupling, channels.criterion, config.sparse.distribution) == ("internal", "umm", "erk")
    if "imagenet" in name:
        assert (fit.schedule, fit.warmup_epochs, fit.label_smoothing, fit.decay_norms) == ("cosine", 8, 0.1, False)
        assert (config.model.init, explore.scope, explore.final_surplus) == ("fan_in", "layer", 0.005)
    else:
        assert (fit.schedule, fit.milestones, fit.gamma, fit.warmup_epochs) == ("step", (80, 120), 0.1, 0)
        assert explore.scope is None  # the preset's: global


@pytest.mark.parametrize("recipe", DST)
def test_every_dst_recipe_has_the_references_networks_and_small_ones(recipe, modules):
    found = {
        (c.data.name, c.model.name) for c in (load_config(modules[recipe], f, [])[0] for f in RECIPES[recipe].configs.values())
    }  # fmt: skip
    wanted = {("cifar100", "vgg19_bn"), ("cifar100", "resnet50"), ("imagenet", "torchvision/resnet50")}
    assert wanted | {("digits", "resnet_digits"), ("synthetic", "resnet_synthetic")} <= found


def test_a_config_whose_data_is_missing_says_where_it_belongs(modules, tmp_path):
    config, _ = load_config(
        modules["dense"], RECIPES["dense"].configs["resnet18_cifar10"], ["--data.folder", str(tmp_path)]
    )
    with pytest.raises(ConfigError, match="cifar-10-batches-py") as caught:
        modules["dense"].check(config)
    assert str(tmp_path) in str(caught.value)


def test_describing_data_touches_no_files():
    assert data.describe("imagenet").image_shape == (3, 224, 224)
