"""Networks that write while they run: into constants, buffers and their own parameters. Nothing of the caller's changes."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from small_networks import conv, exactly_cut, kept, linear, net, noise, reasons, ticket_without
from torch import nn

from deploy_sparse.surgery import channel_groups, compact, plan_from_ticket

DEAD, ALIVE = {"a.weight": [1, 4]}, (0, 2, 3, 5)
MAPS = {"a": conv(3, 6), "c": conv(6, 4)}
X = noise(2, 3, 8, 8)
OTHERS = [noise(2, 3, 12, 9), noise(3, 3, 16, 16), noise(1, 3, 10, 11)]


def scalar(dtype=torch.float64):
    return lambda: nn.Buffer(torch.zeros((), dtype=dtype))


def shifted(self, x):
    self.h.fill_(x.shape[2] * 0.05)
    return self.c(torch.sigmoid(self.a(x) + self.h))


def counted(self, x):
    self.h.add_(1)
    return self.c(torch.sigmoid(self.a(x)))


def averaged(self, x):
    y = torch.sigmoid(self.a(x))
    self.h.copy_(y.mean())
    return self.c(y + self.h)


def test_a_number_that_the_network_keeps_of_the_size_is_no_constant():
    result = exactly_cut(net(shifted, h=scalar(), **MAPS), DEAD, X, OTHERS)
    assert kept(result, "a.weight") == ()
    assert "would depend on the size of the input" in reasons(result)


@pytest.mark.parametrize(
    ("forward", "dtype"), [(shifted, torch.float64), (counted, torch.int64), (averaged, torch.float64)]
)
def test_neither_ticket_nor_module_changes_with_the_buffers_that_the_network_writes(forward, dtype):
    factory = net(forward, h=scalar(dtype), **MAPS)
    made, module = ticket_without(factory(), DEAD), factory()
    before, hashed = {k: v.clone() for k, v in made.weights.items()}, made.hash
    own = {k: v.clone() for k, v in module.state_dict().items()}
    compact(made, factory, X)
    plan_from_ticket(made, module, X)
    channel_groups(module, X)
    assert all(torch.equal(made.weights[k], v) for k, v in before.items())
    assert made.hash == hashed
    assert all(torch.equal(module.state_dict()[k], v) for k, v in own.items())


class Remembering(nn.Module):
    """Keeps its number in a tensor that all networks of the class share."""

    number = torch.zeros((), dtype=torch.float64)

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.double()

    def forward(self, x):
        self.number.fill_(x.shape[2] * 0.05)
        return self.c(torch.relu(self.a(x) - self.number))


def test_a_number_kept_outside_the_network_is_no_constant():
    assert kept(exactly_cut(Remembering, DEAD, X, OTHERS), "a.weight") == ()


@pytest.mark.parametrize("by_size", [False, True])
def test_a_constant_that_grows_between_its_uses_counts_as_what_it_was(by_size):
    def forward(self, x):
        t = torch.zeros(1, dtype=x.dtype)
        y = torch.sigmoid(self.a(x) - t)
        t.view(1, 1).add_(0.03 * x.shape[2] if by_size else 0.3)
        return self.c(y + torch.relu(self.a(x) + t))

    result = exactly_cut(net(forward, **MAPS), DEAD, X, OTHERS)
    assert kept(result, "a.weight") == (() if by_size else ALIVE)


PUT = {
    "whole": (slice(None),) * 4,
    "rows": (slice(None), slice(None), slice(1, None)),
    "channels": (slice(None), slice(2, None)),
}
MADE = {
    "zeros": lambda y, x: torch.zeros(y.shape, dtype=x.dtype),
    "new_zeros": lambda y, x: y.new_zeros(y.shape),
    "empty": lambda y, x: torch.full_like(torch.empty(y.shape, dtype=x.dtype), 0.25),
}


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("where", PUT)
def test_what_is_put_into_part_of_a_new_tensor_is_not_lost(where, make):
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        made = MADE[make](y, x)
        made[PUT[where]] = y[PUT[where]]
        return self.d(torch.sigmoid(self.c(made)))

    result = exactly_cut(net(forward, d=conv(4, 2), **MAPS), {**DEAD, "c.weight": [2]}, X, OTHERS)
    assert kept(result, "c.weight") == (0, 1, 3)


IDS = torch.arange(14).reshape(2, 7) % 9


def words(max_norm):
    return net(
        lambda self, i: self.c(torch.relu(self.a(self.e(i)))),
        e=lambda: nn.Embedding(9, 5, max_norm=max_norm),
        a=linear(5, 6),
        c=linear(6, 4),
    )


@pytest.mark.parametrize("dead", [{"e.weight": (1, [0, 3])}, {"a.weight": (1, [0, 3])}], ids=["written", "read"])
def test_a_table_that_is_renormalised_stays_and_says_so(dead):
    assert exactly_cut(words(None), dead, IDS, [IDS[:1]]).plan.cuts
    made = ticket_without(words(1.0)(), dead)
    before = made.weights["e.weight"].clone()
    result = exactly_cut(words(1.0), dead, IDS, [IDS[:1]], made=made)
    assert torch.equal(made.weights["e.weight"], before)
    assert result.plan.cuts == ()
    assert "'e.weight' is written by aten.embedding_renorm_.default in layer 'e'" in reasons(result)


def test_other_layers_beside_a_renormalised_table_shrink():
    result = exactly_cut(words(1.0), {"a.weight": [1, 2], "a.bias": [1, 2]}, IDS, [IDS[:1]])
    assert kept(result, "a.weight") == (0, 3, 4, 5)


def standardised(self, x):
    weight = self.a.weight.data
    weight.sub_(weight.mean(0))
    return self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))


def clamped(self, x):
    self.a.weight.data.clamp_(-1, 1)
    return self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))


@pytest.mark.parametrize("forward", [standardised, clamped])
def test_a_weight_that_the_network_writes_stays_and_the_others_shrink(forward):
    result = exactly_cut(net(forward, b=conv(6, 5), **{**MAPS, "c": conv(5, 4)}), {**DEAD, "b.weight": [2]}, X, OTHERS)
    assert kept(result, "a.weight") == ()
    assert "'a.weight' is written by" in reasons(result)
    assert kept(result, "b.weight") == (0, 1, 3, 4)


@torch.library.custom_op("deploy_sparse_tests::halve_", mutates_args={"x"})
def halve_(x: torch.Tensor) -> None:
    x.mul_(0.5)


halve_.register_fake(lambda x: None)


def all_halved(self, x):
    y = torch.sigmoid(self.a(x))
    halve_(y)
    return self.c(y)


def rows_halved(self, x):
    y = torch.sigmoid(self.a(x))
    halve_(y[:, :, 1:])
    return self.c(y)


def together(self, x):
    y = torch.sigmoid(self.a(x))
    torch._foreach_mul_([y, y[:1]], [2.0, 0.5])
    return self.c(y)


@pytest.mark.parametrize("forward", [all_halved, rows_halved, together])
def test_operations_that_write_and_give_nothing_back_are_not_missed(forward):
    result = exactly_cut(net(forward, **MAPS), DEAD, X, OTHERS)
    assert kept(result, "a.weight") == ()
    assert "unknown operation" in reasons(result)


@pytest.mark.parametrize("shape", [lambda y: (0,), lambda y: y.shape], ids=["grown", "as large"])
def test_results_written_into_a_given_tensor_are_followed(shape):
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        made = x.new_zeros(shape(y))
        torch.mul(y, 2, out=made)
        return self.c(made)

    assert kept(exactly_cut(net(forward, **MAPS), DEAD, X, OTHERS), "a.weight") == ALIVE


def by_setting(self, x):
    kernel = (self.k, self.k) if type(self.k) is int else self.k
    return self.c(F.avg_pool2d(torch.sigmoid(self.a(x)), kernel[0]))


def by_shape(self, x):
    size = x.shape[2]
    size = (size, size) if type(size) is int else size
    return self.c(F.avg_pool2d(torch.sigmoid(self.a(x)), size[0] // 4))


@pytest.mark.parametrize("forward", [by_setting, by_shape])
def test_code_that_asks_for_the_very_type_of_a_number_is_followed(forward):
    assert kept(exactly_cut(net(forward, k=lambda: 2, **MAPS), DEAD, X, OTHERS), "a.weight") == ALIVE


def test_copies_of_the_network_go_at_once():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            assert x.shape[3] == 8  # other sizes fail
            return self.c(torch.sigmoid(self.a(x)))

    module = Network().double()
    made = ticket_without(module, DEAD)
    gc.collect()
    gc.disable()
    try:
        plan_from_ticket(made, module, X)
        assert [x for x in gc.get_objects() if type(x) is Network] == [module]
    finally:
        gc.enable()
