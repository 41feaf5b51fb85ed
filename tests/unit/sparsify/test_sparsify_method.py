"""Static masks hold during training: weights, momentum, biases, moments."""

import pytest
import torch
from torch import nn

from deploy_sparse.errors import TicketError
from deploy_sparse.sparsify.method import Method, StaticMasks


def train_step(model, optimizer, method, step=0):
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    method.after_backward_(model, step)
    optimizer.step()
    method.after_step_(model, optimizer, step)


def test_masked_entries_and_their_momentum_stay_zero():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    masks = {"weight": torch.rand(4, 3) > 0.5, "bias": torch.tensor([True, False, True, False])}
    method = StaticMasks(masks)
    method.start_(model)
    assert all(bool((p[~masks[name]] == 0).all()) for name, p in model.named_parameters())  # from the first step on
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(5):
        train_step(model, optimizer, method, step)
        for name, parameter in model.named_parameters():
            assert bool((parameter[~masks[name]] == 0).all())
            assert bool((optimizer.state[parameter]["momentum_buffer"][~masks[name]] == 0).all())
    assert bool((model.weight[masks["weight"]] != 0).all())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_whatever_an_optimizer_remembers_of_an_entry_is_masked_too(kind):
    model = nn.Linear(3, 4)
    off = ~torch.eye(4, 3, dtype=torch.bool)
    method = StaticMasks({"weight": ~off})
    method.start_(model)
    optimizer = kind(model.parameters())
    train_step(model, optimizer, method)
    state = optimizer.state[model.weight]
    kept = {key: value for key, value in state.items() if value.shape == model.weight.shape}
    assert kept
    assert all(bool((value[off] == 0).all()) and bool((value[~off] != 0).any()) for value in kept.values())
    assert float(state["step"]) == 1  # what is not per entry is left alone


def test_the_masks_stay_boolean_whatever_the_weights_precision():
    model = nn.Linear(3, 4).to(torch.bfloat16)
    mask = torch.eye(4, 3, dtype=torch.bool)
    method = StaticMasks({"weight": mask})
    method.start_(model)
    assert method.masks["weight"].dtype == torch.bool
    assert torch.equal(model.weight != 0, mask)


def test_masks_follow_the_weights_to_their_device():
    model = nn.Linear(3, 4, device="meta")
    method = StaticMasks({"weight": torch.eye(4, 3, dtype=torch.bool)})
    method.start_(model)
    assert method.masks["weight"].device == model.weight.device


def test_the_given_masks_are_not_changed():
    masks = {"weight": torch.eye(4, 3, dtype=torch.bool)}
    method = StaticMasks(masks)
    method.masks["bias"] = torch.ones(4, dtype=torch.bool)
    assert set(masks) == {"weight"}


def test_masks_of_another_network_are_refused():
    with pytest.raises(TicketError, match=r"mask 'weigth' belongs to no parameter[\s\S]*did you mean 'weight'"):
        StaticMasks({"weigth": torch.ones(4, 3, dtype=torch.bool)}).start_(nn.Linear(3, 4))
    with pytest.raises(TicketError, match=r"shape \(3, 4\), its parameter \(4, 3\)"):
        StaticMasks({"weight": torch.ones(3, 4, dtype=torch.bool)}).start_(nn.Linear(3, 4))


def test_a_mask_that_does_not_fit_leaves_the_weights_alone():
    model = nn.Linear(3, 4)
    before = model.weight.detach().clone()
    with pytest.raises(TicketError):
        StaticMasks({"weight": torch.zeros(4, 3, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)}).start_(model)
    assert torch.equal(model.weight, before)


def test_the_dense_method_changes_nothing():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    before = model.weight.detach().clone()
    method = Method()
    method.start_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    gradient = model.weight.grad.clone()
    method.after_backward_(model, 0)
    method.after_step_(model, optimizer, 0)
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, gradient)


@pytest.mark.parametrize("method", [Method(), StaticMasks({})])
def test_a_state_of_another_method_is_refused(method):
    assert method.state() == {}
    method.restore_(method.state())
    with pytest.raises(TicketError, match=r"holds mask/a for the method[\s\S]*remove the checkpoint"):
        method.restore_({"mask/a": torch.ones(1)})
