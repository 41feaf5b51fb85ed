"""Static masks hold during training: weights, momentum, biases."""

import torch
from torch import nn

from deploy_sparse.sparsify.method import Method, StaticMasks


def train_step(model, optimizer, method):
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    method.after_step_(model, optimizer)


def test_masked_entries_and_their_momentum_stay_zero():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    masks = {"weight": torch.rand(4, 3) > 0.5, "bias": torch.tensor([True, False, True, False])}
    method = StaticMasks(masks)
    method.start_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        train_step(model, optimizer, method)
        for name, parameter in model.named_parameters():
            assert bool((parameter[~masks[name]] == 0).all())
            assert bool((optimizer.state[parameter]["momentum_buffer"][~masks[name]] == 0).all())
    assert bool((model.weight[masks["weight"]] != 0).all())


def test_the_adaptive_moments_are_masked_too():
    model = nn.Linear(3, 4)
    method = StaticMasks({"weight": torch.eye(4, 3, dtype=torch.bool)})
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, method)
    state = optimizer.state[model.weight]
    off = ~torch.eye(4, 3, dtype=torch.bool)
    assert all(bool((state[key][off] == 0).all()) for key in ("exp_avg", "exp_avg_sq"))


def test_the_dense_method_changes_nothing():
    model = nn.Linear(3, 4)
    before = model.weight.detach().clone()
    Method().start_(model)
    Method().after_step_(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, before)
