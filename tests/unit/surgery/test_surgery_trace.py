"""Networks are read from one run without memory: what is followed, what is not, and that nothing of the user's changes."""

from __future__ import annotations

import pytest
import torch
from random_masks import X, cut, factory, given, half, ticket_of
from surgery_nets import outputs, randomised, rows_masked
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import channel_groups, compact, plan_from_ticket


class Body(nn.Module):
    """A convolution, ``what`` the code does to its output, a convolution; a branch beside it that is left alone."""

    def __init__(self, what, act=torch.relu):
        super().__init__()
        self.a, self.gate, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.free, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)
        self.what, self.act = what, act
        self.register_buffer("hidden", torch.arange(1.0, 5.0).view(4, 1, 1), persistent=False)
        self.double()

    def forward(self, x):
        y, gate = self.act(self.a(x)), torch.sigmoid(self.gate(x))
        return self.c(self.what(self, y, gate)) + self.last(self.act(self.free(x)))


def emptied(what, rows=(1, 2), gate=(), act=torch.relu):
    def build():
        return Body(what, act)

    dense = randomised(build())
    masks = rows_masked(dense, {"a.weight": rows, "free.weight": [0, 3], "gate.weight": gate})
    for name, gone in (("a.bias", rows), ("free.bias", [0, 3])):
        masks[name] = torch.ones(len(dense.get_parameter(name)), dtype=torch.bool)
        masks[name][list(gone)] = False
    result = cut(ticket_of(dense, masks), build)
    assert result.module.free.out_channels == 3
    return result, result.plan.groups[0]


def add_(net, y, gate):
    y.add_(gate)
    return y


def into_a_view(net, y, gate):
    y[:, :, 1:].mul_(gate[:, :, 1:])
    return y


def into_a_crop(net, y, gate):
    y[:, :, 2:4, 2:4] = 0.0
    return y * gate


def through_a_base(net, y, gate):
    rows = y[:, :, 0]
    y.mul_(gate)
    return y + rows[:, :, None]


def twice(net, y, gate):
    y += 1.0
    y -= 1.0
    return torch.relu_(y).clamp_(max=3.0)


def copied(net, y, gate):
    made = torch.empty_like(y)
    made.copy_(y)
    return made


def assembled(net, y, gate):
    made = torch.zeros(len(y), y.shape[1], 8, 8, dtype=y.dtype)
    made[:, :, ::2] = y[:, :, ::2]
    return made


GO = {
    "into a view": into_a_view,
    "into a crop": into_a_crop,
    "twice": twice,
    "copied": copied,
    "through a base": through_a_base,
}


@pytest.mark.parametrize("how", GO)
def test_writes_in_place_are_followed(how):
    _, group = emptied(GO[how])
    assert group.kept == (0, 3)
    assert group.stays == ()


@pytest.mark.parametrize("what", [add_, assembled])
def test_writes_in_place_that_bring_live_values_keep_the_channel_exactly(what):
    emptied(what)  # equal to the masked network at any rate


def test_a_constant_written_over_part_of_a_channel_is_seen():
    """Behind the sigmoid the channel holds 0.5, then 0.5 in places and 0 in others."""
    _, group = emptied(into_a_crop, act=torch.sigmoid)
    assert group.kept == (0, 1, 2, 3)
    result, even = emptied(lambda net, y, gate: twice(net, y, gate), act=torch.sigmoid)
    assert even.kept == (0, 3)
    assert [(f.bias, f.channels) for f in result.plan.folds if f.bias == "c.bias"] == [("c.bias", 2)]


def test_buffers_outside_the_state_dict_are_cut():
    result, group = emptied(lambda net, y, gate: y * net.hidden)
    assert group.kept == (0, 3)
    assert result.module.hidden.flatten().tolist() == [1.0, 4.0]


UNKNOWN = {
    "aten.cummax.default": lambda net, y, gate: y.cummax(1)[0],
    "aten.fft_rfft.default": lambda net, y, gate: torch.fft.irfft(torch.fft.rfft(y, dim=1), n=4, dim=1),
    "aten.topk.default": lambda net, y, gate: y.topk(4, 1)[0],
    "aten.as_strided.default": lambda net, y, gate: y.as_strided(y.shape, y.stride()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_keeps_what_reaches_it_and_nothing_else(name):
    result, group = emptied(UNKNOWN[name])
    assert result.plan.unknown[0] == f"unknown operation {name} in the network itself"
    assert group.kept == (0, 1, 2, 3)
    assert (group.stays[0].kind, group.stays[0].reason) == ("pinned", result.plan.unknown[0])
    assert any(result.plan.unknown[0] in note for note in result.plan.notes())


def test_the_module_may_lie_on_meta_and_gives_the_plan_of_the_real_one():
    made = half(randomised(factory()))
    with torch.device("meta"):
        shell = factory()
    plan = plan_from_ticket(made, shell, X)
    assert plan == plan_from_ticket(made, factory(), X)
    assert plan.cost_after.macs < plan.cost_before.macs
    assert channel_groups(shell, X) == channel_groups(factory(), X)
    assert all(p.is_meta for p in shell.parameters())


class Watched(nn.Module):
    """Holds every kind of thing that tracing must leave alone."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.c = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.width, self.sizes, self.plain = 4, (4, 8), torch.ones(1)
        self.calls = 0
        self.double()

    def forward(self, x):
        self.calls += 1
        x = torch.relu(self.norm(self.a(x))).reshape(len(x), self.width, self.sizes[1], self.sizes[1])
        y = x.flatten(2).transpose(1, 2)
        return self.c(x + self.attention(y, y, y)[0].transpose(1, 2).unflatten(2, (8, 8)))


def facts(module):
    plain = {
        (path, name): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_")
    }
    tensors = {name: (id(t), t._version) for name, t in module.state_dict(keep_vars=True).items()}
    hooks = [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in module.modules()]
    return plain, tensors, hooks, [type(part) for part in module.modules()]


@pytest.mark.parametrize(
    "call",
    [
        lambda module, made: channel_groups(module, X),
        lambda module, made: plan_from_ticket(made, module, X),
        lambda module, made: compact(made, lambda: module, X),
    ],
    ids=["groups", "plan", "compact"],
)
def test_the_users_module_is_left_untouched(call):
    module = randomised(Watched()).train()
    module.norm.eval()
    module.a.weight.requires_grad_(False)
    seen = []
    module.c.register_forward_hook(lambda part, inputs, output: seen.append(type(part)))
    made = half(module)
    seen.clear()
    before = facts(module)
    numbers = {name: type(value) for name, value in vars(module).items()}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    call(module, made)
    assert facts(module) == before
    assert {name: type(value) for name, value in vars(module).items()} == numbers
    assert type(module.width) is int
    assert [type(n) for n in module.sizes] == [int, int]
    assert module.training
    assert not module.norm.training
    assert module.c.training
    assert not module.a.weight.requires_grad
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    seen.clear()
    module(X)
    assert (module.calls, seen) == (before[0]["", "calls"] + 1, [nn.Conv2d])


def test_no_global_hook_or_mode_is_left_behind():
    before = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    fast = torch.backends.mha.get_fastpath_enabled()
    channel_groups(factory(), X)
    with pytest.raises(SurgeryError):
        channel_groups(factory(), X[:, :2])
    after = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    assert after == before
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert type(torch.zeros(2, 3).shape[0]) is int


def test_tracing_draws_no_random_numbers():
    made = half(randomised(factory()))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compact(made, factory, X)
    assert torch.equal(torch.get_rng_state(), before)


DATA_DEPENDENT = {
    "branch": lambda net, y, gate: y if y.sum() > 0 else -y,
    "item": lambda net, y, gate: y * y.mean().item(),
    "loop": lambda net, y, gate: y * len(range(int(y.abs().max()))),
    "parameter": lambda net, y, gate: y if net.c.weight.sum() > 0 else -y,
}


@pytest.mark.parametrize("how", DATA_DEPENDENT)
def test_data_dependent_control_flow_is_refused_by_name(how):
    module = randomised(Body(DATA_DEPENDENT[how]))
    with pytest.raises(SurgeryError) as caught:
        plan_from_ticket(given(module, {}), module, X)
    assert caught.value.given.startswith("the network cannot be traced: ")
    assert "without data-dependent control flow" in str(caught.value)


def test_the_operation_that_reads_values_and_its_layer_are_named():
    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Deciding(), nn.Conv2d(4, 2, 1)).double()
    with pytest.raises(SurgeryError, match=r"looks at the values of a tensor \(aten\.\w+\.default\) in layer '1'"):
        channel_groups(network, X)


def test_decisions_about_sizes_flags_and_tables_are_followed():
    class Deciding(Body):
        def forward(self, x):
            y = self.act(self.a(x))
            if x.shape[2] > 4 and not self.training and self.flags.any() and self.rate < 1:
                y = y * 2
            return self.c(y) + self.last(self.act(self.free(x)))

    def build():
        network = Deciding(None)
        network.register_buffer("flags", torch.tensor([False, True]))
        network.register_buffer("rate", torch.tensor(0.5))
        return network

    dense = randomised(build())
    result = cut(half(dense), build)
    assert result.module.a.out_channels == 2
    assert not torch.equal(outputs(result.module, X), outputs(dense, X))
