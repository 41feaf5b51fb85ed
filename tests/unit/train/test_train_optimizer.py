"""Optimizers: what they decay, what they remember, and how that is taken up by another training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from train_samples import CONFIG, MASKS, network, same, splits, train

from deploy_sparse.config import config_from
from deploy_sparse.errors import ConfigError, TicketError
from deploy_sparse.sparsify.method import StaticMasks
from deploy_sparse.train.loop import fit
from deploy_sparse.train.optimizer import make_optimizer, masked_memory, memory_of, set_memory_
from deploy_sparse.train.runtime import RuntimeConfig, start_runtime
from deploy_sparse.train.schedule import FitConfig, check_optimizer
from deploy_sparse.train.step import TrainStep

ADAM = CONFIG.model_copy(update={"optimizer": "adamw", "lr": 0.01})
SLOTS = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


def stepped(config, model, steps=2):
    """An optimizer that has taken steps along the same gradients on any model like this one."""
    optimizer = make_optimizer(model, config)
    for number in range(steps):
        step_(model, optimizer, number)
    return optimizer


def step_(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


class Mixed(nn.Module):
    """Norms of every kind, a norm's parameters under other names, a layer without a bias, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.batch, self.group = nn.BatchNorm2d(2), nn.GroupNorm(1, 2)
        self.layer, self.rms = nn.LayerNorm(2), nn.RMSNorm(2)
        self.instance = nn.InstanceNorm2d(2, affine=True)
        self.attention = nn.MultiheadAttention(2, 1)
        self.head = nn.Linear(2, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_can_go_without_weight_decay(optimizer):
    model = Mixed()
    config = FitConfig(optimizer=optimizer, decay_norms=False, weight_decay=0.25)
    decayed, bare = make_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.25, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    norms = {f"{norm}.{own}" for norm in ("batch", "group", "layer", "instance") for own in ("weight", "bias")}
    biases = {"conv.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    assert {names[id(p)] for p in bare["params"]} == norms | biases | {"rms.weight"}
    assert {names[id(p)] for p in decayed["params"]} == {
        *("conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight", "scale")
    }
    (everything,) = make_optimizer(model, config.model_copy(update={"decay_norms": True})).param_groups
    assert len(everything["params"]) == len(names)
    assert everything["weight_decay"] == 0.25


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_a_gradient_only_what_is_decayed_moves(optimizer):
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepping = make_optimizer(model, FitConfig(optimizer=optimizer, decay_norms=False, weight_decay=0.1, lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepping.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "4.weight"}


def test_a_network_of_nothing_but_weights_trains_without_decay_of_norms():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    stepped(FitConfig(decay_norms=False), model)
    assert make_optimizer(model, FitConfig(decay_norms=False)).param_groups[1]["params"] == []


def test_the_numbers_reach_their_optimizer():
    adam = make_optimizer(network(), FitConfig(optimizer="adamw", betas=(0.8, 0.95), lr=0.02, weight_decay=0.3))
    assert isinstance(adam, torch.optim.AdamW)
    (group,) = adam.param_groups
    assert (group["betas"], group["lr"], group["weight_decay"]) == ((0.8, 0.95), 0.02, 0.3)
    sgd = make_optimizer(network(), FitConfig(momentum=0.0))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.0, False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_group_gets_the_learning_rate(optimizer):
    config = CONFIG.model_copy(update={"optimizer": optimizer, "decay_norms": False})
    runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
    training = TrainStep(network(), config, StaticMasks(MASKS), runtime, {})
    training(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), 0, 0.125)
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.125, 0.125]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["sgd", "adamw"]), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_a_memory_taken_up_goes_on_as_if_nothing_had_happened(optimizer, decay_norms, before, after):
    config = FitConfig(optimizer=optimizer, decay_norms=decay_norms, lr=0.01)
    whole = network()
    stepped(config, whole, before + after)
    first, second = network(), network()
    memory = memory_of(first, stepped(config, first, before))
    assert memory.keys() == {f"{slot}/{name}" for slot in SLOTS[optimizer] for name, _ in first.named_parameters()}
    second.load_state_dict(first.state_dict())
    taken_up = make_optimizer(second, config)
    set_memory_(second, taken_up, memory)
    for number in range(before, before + after):
        step_(second, taken_up, number)
    assert same(second.state_dict(), whole.state_dict())


def test_a_memory_is_a_copy_on_both_ways():
    model = network()
    optimizer = stepped(ADAM, model)
    memory = memory_of(model, optimizer)
    kept = {name: value.clone() for name, value in memory.items()}
    set_memory_(model, optimizer, memory)
    step_(model, optimizer, 7)
    assert same(memory, kept)
    assert memory["step/0.weight"].item() == 2
    assert memory_of(model, optimizer)["step/0.weight"].item() == 3
    assert memory_of(model, make_optimizer(model, ADAM)) == {}


def test_masks_reach_every_moment_and_no_counter():
    model = network()
    memory = memory_of(model, stepped(ADAM, model))
    found = masked_memory(memory, MASKS)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[f"{slot}/0.weight"] != 0, MASKS["0.weight"])
    rest = [key for key in memory if key not in ("exp_avg/0.weight", "exp_avg_sq/0.weight")]
    assert same({key: found[key] for key in rest}, {key: memory[key] for key in rest})
    assert memory["step/0.weight"].item() == 2


@pytest.mark.parametrize(
    ("config", "memory", "message"),
    [
        (ADAM, {"momentum_buffer/0.weight": torch.ones(4, 1, 3, 3)}, r"has momentum_buffer of '0.weight'[\s\S]*exp_avg, exp_avg_sq, step of this network's parameters: AdamW's"),
        (ADAM, {"exp_avg/0.weight": torch.ones(4, 1, 3, 3)}, r"has exp_avg of '0.weight'"),
        (CONFIG, {"exp_avg/0.weight": torch.ones(4, 1, 3, 3)}, r"momentum_buffer of this network's parameters: SGD's"),
        (CONFIG, {"momentum_buffer/9.weight": torch.ones(1)}, r"has momentum_buffer of '9.weight'"),
    ],
)  # fmt: skip
def test_a_memory_of_something_else_is_refused(tmp_path, config, memory, message):
    with pytest.raises(TicketError, match=message):
        train(tmp_path, config=config, memory=memory)


def test_the_rest_of_an_adamw_training_from_its_kept_epoch_is_the_training_itself(tmp_path):
    whole = train(tmp_path / "whole", config=ADAM)
    model = network()
    model.load_state_dict(whole.early)
    options = {"seed": 3, "start_epoch": 1, "checkpoints": tmp_path / "rest", "memory": whole.early_memory}
    assert same(fit(model, splits(), ADAM, StaticMasks(MASKS), **options).last, whole.last)
    assert not same(train(tmp_path / "sgd").last, whole.last)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer = 'adam'[\s\S]*'sgd' or 'adamw'"),
        ({"betas": [0.9, 1.0]}, r"betas.1 = 1.0[\s\S]*less than 1"),
        ({"betas": [0.9]}, r"betas.1"),
    ],
)
def test_unusable_numbers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from(FitConfig, values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FitConfig(betas=(0.8, 0.9)), r'fit.betas = \[0.8, 0.9\] with fit.optimizer = "sgd"[\s\S]*only with fit.optimizer = "adamw"'),
        (FitConfig(optimizer="adamw", momentum=0.5), r'fit.momentum = 0.5 with fit.optimizer = "adamw"[\s\S]*only with fit.optimizer = "sgd"'),
    ],
)  # fmt: skip
def test_numbers_of_the_other_optimizer_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config)
    check_optimizer(FitConfig(optimizer="adamw", betas=(0.8, 0.9), nesterov=False))
    check_optimizer(FitConfig(momentum=0.5))
