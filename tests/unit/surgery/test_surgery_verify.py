"""Verification finds every fault that surgery could make, and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from surgery_nets import SHAPE, Block, RandomNet, masked, randomised, rows_masked, silent_masks, ticket
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import Parity, SurgeryPlan, channel_groups, compact, verify
from deploy_sparse.surgery._weights import contribution

STEPS = [Block("projection", 4, bias=True), Block("depthwise", 1), Block("chain", 3)]
X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(7))


def factory():
    return RandomNet(STEPS, flatten=True)


@pytest.fixture(scope="module")
def pair():
    dense = randomised(factory())
    made = ticket(dense, silent_masks(dense, channel_groups(dense, X), lambda group: [0]))
    return masked(factory, made), compact(made, factory).module


def swap(tensor, first, second):
    tensor[[first, second]] = tensor[[second, first]]


def swapped_channels(module):
    swap(module.stem[0].weight, 0, 1)


def swapped_columns(module):
    swap(module.hidden.weight.t(), 0, 5)


def dropped_bias(module):
    module.steps[0].short.bias = None


def wrong_residual_index(module):
    swap(module.steps[0].short.weight, 0, 2)
    swap(module.steps[0].short.bias, 0, 2)


def stale_running_var(module):
    module.stem[1].running_var.fill_(1)


def stale_running_mean(module):
    swap(module.stem[1].running_mean, 0, 1)


def scale_off_by_little(module):
    module.steps[2].body[1].weight.mul_(1 + 1e-7)


def wrong_depthwise_filter(module):
    swap(module.steps[1].body[0].weight, 0, 1)


FAULTS = [
    swapped_channels,
    swapped_columns,
    dropped_bias,
    wrong_residual_index,
    stale_running_var,
    stale_running_mean,
    scale_off_by_little,
    wrong_depthwise_filter,
]


def test_sound_pair_passes_on_several_batch_sizes(pair):
    parity = verify(*pair, X)
    assert parity.inputs == (
        "the example inputs [2, 3, 8, 8]",
        "random inputs [2, 3, 8, 8]",
        "random inputs [1, 3, 8, 8]",
        "random inputs [3, 3, 8, 8]",
        "random inputs [2, 3, 10, 11]",
        "random inputs [2, 3, 9, 10]",
    )
    assert parity.float32.max_rel <= 1e-5
    assert parity.float64.max_rel <= 1e-10
    assert parity.float32.top1_agreement == parity.float64.top1_agreement == 1.0
    assert "top-1 agreement 100.0%" in str(parity)
    assert parity == verify(*pair, X)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_seeded_fault_is_found(pair, fault):
    dense, small = pair
    broken = copy.deepcopy(small)
    with torch.no_grad():
        fault(broken)
    with pytest.raises(SurgeryError, match=r"the compact network differs from the masked one by .* of max"):
        verify(dense, broken, X)


def test_modules_and_inputs_are_left_alone(pair):
    dense, small = copy.deepcopy(pair[0]).train(), copy.deepcopy(pair[1]).train()
    x = X.clone()
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in (dense, small)]
    verify(dense, small, x)
    assert dense.training
    assert small.training
    assert torch.equal(x, X)
    for module, before in zip((dense, small), states, strict=True):
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in module.state_dict().items())


def test_not_finite_output_is_refused(pair):
    dense, small = pair
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.fc.bias[0] = torch.inf
    with pytest.raises(SurgeryError, match=r"the compact network's output on the example inputs .* NaN or infinite"):
        verify(dense, broken, X)
    with pytest.raises(SurgeryError, match="the masked dense network's output"):
        verify(broken, small, X)


def test_other_output_shape_is_refused(pair):
    dense, small = pair
    broken = copy.deepcopy(small)
    broken.fc = nn.Linear(broken.fc.in_features, 3)
    with pytest.raises(SurgeryError, match=r"outputs have shapes \[2, 3\] on the example inputs"):
        verify(dense, broken, X)


def test_network_that_does_not_run_is_refused(pair):
    dense, small = pair
    broken = copy.deepcopy(small)
    broken.fc = nn.Linear(broken.fc.in_features + 1, 4)
    with pytest.raises(SurgeryError, match="the compact network does not run: mat1 and mat2"):
        verify(dense, broken, X)


def test_batch_size_written_into_the_network_limits_what_is_tried():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 3)

        def forward(self, x):
            return self.fc(x.reshape(2, 192))

    net = randomised(Fixed())
    assert verify(net, copy.deepcopy(net), X).inputs == (
        "the example inputs [2, 3, 8, 8]",
        "random inputs [2, 3, 8, 8]",
        "no other spatial size (the dense network does not run at [2, 3, 10, 11] or [2, 3, 16, 16] or [2, 3, 9, 10])",
    )


def test_fault_at_another_spatial_size_is_found():
    class Net(nn.Module):
        def __init__(self, per_position):
            super().__init__()
            self.fc, self.per_position = nn.Linear(3, 2), per_position

        def forward(self, x):
            return self.fc(x.sum((2, 3)) / (64 if self.per_position else x[0, 0].numel()))

    dense = randomised(Net(False))
    small = Net(True)
    small.load_state_dict(dense.state_dict())
    with pytest.raises(SurgeryError, match=r"differs from the masked one by .* on random inputs \[2, 3, 10, 11\]"):
        verify(dense, small, X)


def test_network_that_takes_multiples_only_is_compared_at_twice_the_size():
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 16, 2)

        def forward(self, x):
            tiles = x.unfold(2, 4, 4).unfold(3, 4, 4)  # [n, 3, h/4, w/4, 4, 4]
            assert x.shape[3] % 4 == 0
            return self.fc(tiles.mean((2, 3)).flatten(1))

    net = randomised(Even())
    assert verify(net, copy.deepcopy(net), X).inputs[-1] == "random inputs [2, 3, 16, 16]"


def test_network_that_is_random_in_evaluation_mode_is_named():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return nn.functional.dropout(self.b(torch.relu(self.a(x))), 0.5, training=True)

    made = ticket(randomised(Noisy()), rows_masked(Noisy(), {"a.weight": [1]}))
    with pytest.raises(SurgeryError, match="the dense network is not deterministic: run twice in evaluation mode"):
        compact(made, Noisy)


def test_refusal_speaks_of_nothing_the_caller_does_not_have(pair):
    dense, small = pair
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.fc.bias.add_(1)
    with pytest.raises(SurgeryError) as caught:
        verify(dense, broken, X)
    assert "plan" not in str(caught.value)


def folding():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 1), nn.Sigmoid(), nn.Conv2d(5, 2, 1))


def test_rounded_folds_are_told_with_both_figures():
    dense = randomised(folding())
    made = ticket(dense, rows_masked(dense, {"0.weight": [1]}))
    result = compact(made, folding)
    rounding, parity = result.parity.rounding, result.parity
    assert 1 <= rounding.numbers <= 5
    assert rounding.precision == "float32"
    reference, delivered = (copy.deepcopy(module).double() for module in (masked(folding, made), result.module))
    x = X.double()
    with torch.no_grad():
        off = float((reference(x) - delivered(x)).abs().max() / reference(x).abs().max())
    assert 0.5 < off / rounding.float64.max_rel < 2  # on other inputs than verify's own: nearly the same figure
    assert parity.float64.max_rel < 1e-14 < rounding.float64.max_rel < 1e-6
    text = f"in float64 (before {rounding.numbers} reckoned numbers were rounded to float32; {rounding.float64.max_rel:.1e}"
    assert text in str(parity)
    assert result.plan.to_json()["parity"]["rounding"]["precision"] == "float32"
    assert SurgeryPlan.from_json(result.plan.to_json()).parity == parity


def test_no_rounding_is_told_where_there_is_none(pair):
    dense = randomised(folding().double())
    result = compact(ticket(dense, rows_masked(dense, {"0.weight": [1]})), lambda: folding().double())
    assert result.plan.folds
    assert result.parity.rounding is None
    assert "rounded" not in str(result.parity)
    assert verify(*pair, X).rounding is None


def test_integer_inputs_are_taken_as_given_cut_and_repeated():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    parity = verify(net, copy.deepcopy(net), torch.tensor([[1, 2], [3, 6]]))
    assert parity.inputs == (
        "the example inputs [2, 2]",
        "one of the examples [1, 2]",
        "one more example [3, 2]",
        "shorter examples [2, 1]",
        "longer examples [2, 4]",
    )


def test_zero_output_everywhere_is_compared_absolutely():
    zero, tiny = nn.Linear(2, 2), nn.Linear(2, 2)
    for parameter in (*zero.parameters(), *tiny.parameters()):
        nn.init.zeros_(parameter)
    assert verify(zero, copy.deepcopy(zero), torch.ones(1, 2)).float64.max_rel == 0
    nn.init.constant_(tiny.bias, 1e-30)
    with pytest.raises(SurgeryError, match="differs"):
        verify(zero, tiny, torch.ones(1, 2))


def test_rounded_fold_must_be_the_rounded_exact_one():
    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))

    dense = randomised(small())
    made = ticket(dense, rows_masked(dense, {"0.weight": [1]}))
    result = compact(made, small)
    assert result.plan.folds
    assert result.parity.float64.max_rel <= 1e-10
    exact = copy.deepcopy(result.module).double()
    with torch.no_grad():
        exact[2].bias.add_(1e-3)
    with pytest.raises(SurgeryError, match=r"'2\.bias' of the compact network is not its float64 counterpart"):
        verify(masked(small, made), result.module, X, exact=exact)


def test_no_compact_network_is_returned_when_parity_fails(monkeypatch):
    where = "deploy_sparse.surgery.assemble.contribution"
    monkeypatch.setattr(where, lambda *given: 1.01 * contribution(*given))

    def small():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))

    dense = randomised(small())
    with pytest.raises(SurgeryError, match="no compact network is made"):
        compact(ticket(dense, rows_masked(dense, {"0.weight": [1]})), small)


def test_parity_is_a_value(pair):
    parity = verify(*pair, X)
    with pytest.raises(AttributeError):
        parity.inputs = ()
    assert isinstance(parity, Parity)
