"""Masks that move: exact resume, and calls that do not belong."""

import pytest
import torch
from dst_samples import Training, method, network

from deploy_sparse.errors import TicketError
from deploy_sparse.sparsify.exploration import SoftBound


@pytest.mark.parametrize("stop", [3, 4, 6, 11, 17, 18, 19])
@pytest.mark.parametrize(
    "options", [{"gradient_batches": 3}, {"growth": "random"}, {"soft": SoftBound(0.2, 18), "scope": "global"}]
)
def test_a_restored_method_goes_on_with_the_same_bits(stop, options):
    whole = Training(method(**options)).steps(22)
    first = Training(method(**options)).steps(stop)
    state = {name: tensor.clone() for name, tensor in first.method.state().items()}
    second = Training(method(**options))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.method.restore_(state)
    second.taken = stop
    second.steps(22 - stop)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
    assert all(torch.equal(mask, second.method.masks[name]) for name, mask in whole.masks().items())
    assert whole.method.figures() == second.method.figures()


def test_an_update_that_waits_is_restored_too():
    first = Training(method()).steps(3)
    first.step(spoil=True)
    second = Training(method())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.method.restore_(first.method.state())
    second.taken = 4
    before = second.masks()
    assert not second.method.ready(3)
    second.step()
    assert any(not torch.equal(mask, before[name]) for name, mask in second.masks().items())


def test_a_state_of_another_method_is_refused():
    training = Training(method())
    with pytest.raises(TicketError, match=r"lacks 'allowed/0\.weight'"):
        training.method.restore_({})
    with pytest.raises(TicketError, match="holds 'removed/0'"):
        training.method.restore_({**training.method.state(), "removed/0": torch.zeros(3)})


def test_a_method_trains_once():
    training = Training(method())
    with pytest.raises(TicketError, match="started twice"):
        training.method.start_(training.model)


def test_calls_that_are_forgotten_are_named():
    own, model = method(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (lambda: own.after_step_(model, optimizer, 0), lambda: own.restore_({})):
        with pytest.raises(TicketError, match="a method that was not started"):
            call()
    own.start_(model)
    with pytest.raises(TicketError, match="due after step 3 and its gradient was not seen"):
        own.after_step_(model, optimizer, 3)
