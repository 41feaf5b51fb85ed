"""Attention as networks write it: masks that hide rows, shares, biases of any name, grouped queries, packed rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import exactly_cut, kept, linear, net, noise, reasons
from torch import nn

ALIVE = (0, 2, 3, 5)
SEQUENCE = noise(2, 7, 5)


ATTENTION = {"q": linear(5, 6), "k": linear(5, 6), "v": linear(5, 6), "o": linear(6, 4)}


def attend(self, x, mask=None):
    return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_masks_may_hide_whole_rows_from_attention(kind):
    seen = torch.ones(2, 7, 7, dtype=torch.bool)
    hidden = seen.clone()
    hidden[1], hidden[0, 3] = False, False
    given, other = (
        m if kind is torch.bool else torch.zeros(m.shape).double().masked_fill(~m, -math.inf) for m in (seen, hidden)
    )
    result = exactly_cut(net(attend, **ATTENTION), {"v.weight": [1, 4]}, (SEQUENCE, given), [(SEQUENCE, other)])
    assert result.plan.cuts == ()
    assert "leak [1, 4]: its constant is no longer known before layer 'o'" in reasons(result)


def test_attention_without_a_mask_passes_constants_on():
    result = exactly_cut(net(attend, **ATTENTION), {"v.weight": [1, 4]}, SEQUENCE, [noise(2, 9, 5)])
    assert kept(result, "v.weight") == ALIVE


def emptied(p):
    p[:, :, 0] = 0
    return p


def halved(p):
    p[:, :, 0].mul_(0.5)
    return p


SHARES = {
    "softmax": (lambda p: p, True),
    "some rows": (lambda p: p[:, 1:], True),
    "expanded": (lambda p: p[:, None].expand(-1, 1, -1, -1)[:, 0], True),
    "transposed": (lambda p: p.transpose(-2, -1), False),
    "written": (emptied, False),
    "scaled in place": (halved, False),
    "indexed": (lambda p: p[:, :, torch.zeros(p.shape[1], dtype=torch.long)], False),
}


@pytest.mark.parametrize("how", SHARES)
def test_constants_pass_shares_only_while_they_sum_to_one(how):
    change, sums_to_one = SHARES[how]

    def forward(self, x):
        return self.o(change((self.q(x) @ x.transpose(1, 2)).softmax(-1)) @ self.v(x))

    parts = {"q": linear(5, 5), "v": linear(5, 6), "o": linear(6, 4)}
    result = exactly_cut(net(forward, **parts), {"v.weight": [1, 4]}, SEQUENCE, [noise(2, 9, 5)])
    assert kept(result, "v.weight") == (ALIVE if sums_to_one else ())
    assert ("leak [1, 4]: its constant is no longer known before layer 'o'" in reasons(result)) is not sums_to_one


def heads(y):
    return y.unflatten(2, (2, -1)).transpose(1, 2)


def attend_in_heads(self, x, q):
    return self.o(
        F.scaled_dot_product_attention(heads(q), heads(self.k(x)), heads(self.v(x))).transpose(1, 2).flatten(2)
    )


DIMS = [1, 5]


HEADS = {"k": linear(8, 8), "v": linear(8, 8), "o": linear(8, 4)}


def test_rescaled_queries_take_a_bias_of_any_name_along():
    parts = {"wq": lambda: nn.Parameter(torch.zeros(8, 8)), "bq": lambda: nn.Parameter(torch.zeros(8)), **HEADS}
    factory = net(lambda self, x: attend_in_heads(self, x, F.linear(x, self.wq, self.bq)), **parts)
    rows = dict.fromkeys(("wq", "bq", "k.weight", "k.bias"), DIMS)
    result = exactly_cut(factory, rows, noise(2, 5, 8), [noise(2, 9, 8)])
    assert kept(result, "wq") == kept(result, "bq") == kept(result, "k.weight") == (0, 2, 3, 4, 6, 7)
    assert [rescale.weight for rescale in result.plan.rescales] == ["wq"]


def test_a_bias_that_queries_share_with_keys_is_not_rescaled():
    def factory():
        made = net(lambda self, x: attend_in_heads(self, x, self.q(x)), q=linear(8, 8), **HEADS)()
        made.k.bias = made.q.bias
        return made

    rows = dict.fromkeys(("q.weight", "q.bias", "k.weight", "k.bias"), DIMS)
    result = exactly_cut(factory, rows, noise(2, 5, 8), [noise(2, 9, 8)])
    assert (result.plan.cuts, result.plan.rescales) == ((), ())
    assert "product [1, 5]" in reasons(result)


@pytest.mark.parametrize("whole", [True, False])
def test_grouped_queries_lose_heads_and_dimensions(whole):
    def split(y, number):  # the number written down is the one that stays
        return y.unflatten(2, (-1, 2) if whole else (number, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = split(self.q(x), 4), split(self.k(x), 2), split(self.v(x), 2)
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    gone, fewer = ([0, 1, 2, 3], [0, 1]) if whole else ([0, 2, 4, 6], [0, 2])
    rows = {name: gone for name in ("q.weight", "q.bias")} | {"o.weight": (1, gone)}
    rows |= {f"{part}.{name}": fewer for part in "kv" for name in ("weight", "bias")}
    parts = {"q": linear(8, 8), "k": linear(8, 4), "v": linear(8, 4), "o": linear(8, 4)}
    result = exactly_cut(net(forward, **parts), rows, noise(2, 5, 8), [noise(2, 9, 8)])
    assert kept(result, "q.weight") == ((4, 5, 6, 7) if whole else (1, 3, 5, 7))
    assert kept(result, "k.weight") == kept(result, "v.weight") == ((2, 3) if whole else (1, 3))


def test_hooks_of_replaced_layers_change_their_outputs_still():
    def factory():
        made = net(lambda self, x: self.c(self.m(x, x, x)[0]), m=attention, c=linear(8, 4))()
        made.m.register_forward_hook(lambda module, inputs, found: (2 * found[0], found[1]))
        return made

    rows = {"m.out_proj.weight": [1], "m.in_proj_weight": [0, 4, 8, 12]}
    result = exactly_cut(factory, rows, noise(2, 7, 8))
    assert kept(result, "m.out_proj.weight") == (0, 2, 3, 4, 5, 6, 7)
    assert not isinstance(result.module.m, nn.MultiheadAttention)


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


def test_packed_attention_loses_values_alone_and_queries_with_keys():
    factory = net(lambda self, x: self.c(self.m(x, x, x)[0]), m=attention, c=linear(8, 4))
    values = exactly_cut(factory, {"m.in_proj_weight": [16, 20]}, noise(2, 5, 8), [noise(2, 9, 8)])
    assert set(range(24)) - set(kept(values, "m.in_proj_weight")) == {16, 20}
    assert values.module.m.out_proj.weight.shape == (8, 6)
    queries = exactly_cut(factory, {"m.in_proj_weight": [0, 4, 8, 12], "m.in_proj_bias": [0, 4, 8, 12]}, noise(2, 5, 8))
    assert set(range(24)) - set(kept(queries, "m.in_proj_weight")) == {0, 4, 8, 12}
    assert queries.module.m.out_proj.weight.shape == (8, 8)
