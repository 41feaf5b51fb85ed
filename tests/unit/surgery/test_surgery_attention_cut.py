"""Attention loses whole heads, dimensions of every head, or both, in the forms that networks write it in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from random_masks import X, cut, ticket_of
from surgery_nets import outputs, randomised
from torch import nn

from deploy_sparse.surgery import channel_groups, load_compact
from deploy_sparse.surgery.layers import NarrowAttention

HEADS, DIMS = 3, 4
WIDTH = HEADS * DIMS


class Tokens(nn.Module):
    """Patches as tokens, attention with a shortcut around it, the mean of the tokens."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 2)
        self.construct()
        self.double()

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attend(x)).mean(1))


class Fused(Tokens):
    """One layer for queries, keys and values; the code reads its sizes from attributes."""

    def construct(self):
        self.num_heads, self.head_dim, self.scale = HEADS, DIMS, DIMS**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def mix(self, q, k, v):
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v

    def attend(self, x):
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))


class Sdpa(Fused):
    """Divides by the root of the head size by itself."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class ScaledSdpa(Fused):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class ScaledByShape(Fused):
    """The scale follows the tensor's own size."""

    def mix(self, q, k, v):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class DividedByShape(Fused):
    def mix(self, q, k, v):
        return (q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)).softmax(-1) @ v


class Einsum(Fused):
    def mix(self, q, k, v):
        weights = torch.einsum("nhld,nhsd->nhls", q * self.scale, k).softmax(-1)
        return torch.einsum("nhls,nhsd->nhld", weights, v)


class Separate(Tokens):
    """Three layers, the head size given by division."""

    def construct(self):
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def attend(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Multihead(Tokens):
    def construct(self):
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


FUSED = [Fused, Sdpa, ScaledSdpa, ScaledByShape, DividedByShape, Einsum]
PROJECTION = {Multihead: "attention.out_proj.weight"}


def emptied(network, heads=(), dims=(), live=False):
    """The dense network, and a ticket that empties rows of whole heads and the same dimensions of every head."""
    dense = randomised(network())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    grid = torch.ones(HEADS, DIMS, dtype=torch.bool)
    grid[list(heads)] = False
    grid[:, list(dims)] = False
    flat = grid.flatten()
    if network is Separate:
        rows = {f"{name}.{part}": flat for name in "qkv" for part in ("weight", "bias")}
    else:
        stem = "attention.in_proj_" if network is Multihead else "qkv."
        rows = {f"{stem}{part}": flat.repeat(3) for part in ("weight", "bias")}
    for name, keep in rows.items():
        if not (live and name.endswith("bias")):
            masks[name][~keep] = False
    if not live:
        masks[PROJECTION.get(network, "proj.weight")][:, ~flat] = False
    return dense, ticket_of(dense, masks)


def widths(network, module):
    if network is Separate:
        return module.q.out_features, module.k.out_features, module.v.out_features, module.proj.in_features
    if network is Multihead:
        rows = module.attention.in_proj_weight.shape[0] // 3
        return (rows,) * 3 + (module.attention.out_proj.in_features,)
    return (module.qkv.out_features // 3,) * 3 + (module.proj.in_features,)


@pytest.mark.parametrize("network", [*FUSED, Separate, Multihead])
@pytest.mark.parametrize(("heads", "dims"), [((1,), ()), ((), (0, 2)), ((0,), (3,))], ids=["heads", "dims", "both"])
def test_heads_and_dimensions_go_exactly(network, heads, dims):
    _, made = emptied(network, heads, dims)
    result = cut(made, network)
    left = (HEADS - len(heads)) * (DIMS - len(dims))
    assert widths(network, result.module) == (left,) * 4
    if network in FUSED:
        assert (result.module.num_heads, result.module.head_dim) == (HEADS - len(heads), DIMS - len(dims))
        assert result.module.scale == DIMS**-0.5  # a plain number is no size
    if network is Separate:
        assert result.module.heads == HEADS - len(heads)
    if network is Multihead:
        assert result.module.attention.num_heads == HEADS - len(heads)


@pytest.mark.parametrize("network", [Sdpa, ScaledByShape, DividedByShape, Separate])
def test_queries_make_up_for_a_scale_that_follows_the_head_size(network):
    dense, made = emptied(network, dims=(0, 2))
    result = cut(made, network)
    weight, queries = ("q.weight", WIDTH) if network is Separate else ("qkv.weight", WIDTH)
    (rescale,) = result.plan.rescales
    assert (rescale.weight, rescale.rows) == (weight, tuple(range(queries)))
    assert rescale.factor == pytest.approx(math.sqrt(2 / 4), rel=1e-15)
    kept = [head * DIMS + dim for head in range(HEADS) for dim in (1, 3)]
    for part in ("weight", "bias"):
        name = weight.removesuffix("weight") + part
        before, after = dense.get_parameter(name).detach(), result.module.get_parameter(name)
        assert torch.allclose(after[:6], before[kept] * math.sqrt(0.5), rtol=1e-15, atol=0)
        assert network is Separate or torch.equal(after[6:12], before[[WIDTH + row for row in kept]])


@pytest.mark.parametrize("network", [Fused, ScaledSdpa, Einsum, Multihead])
def test_a_scale_of_its_own_needs_no_making_up(network):
    _, made = emptied(network, dims=(0, 2))
    assert cut(made, network).plan.rescales == ()


@pytest.mark.parametrize("network", [Sdpa, Separate])
def test_whole_heads_leave_the_scale_alone(network):
    _, made = emptied(network, heads=(2,))
    assert cut(made, network).plan.rescales == ()


def test_dimensions_that_differ_from_head_to_head_stay():
    dense = randomised(Fused())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for part in range(3):
        for head in range(HEADS):
            masks["qkv.weight"][part * WIDTH + head * DIMS + head] = False
            masks["qkv.bias"][part * WIDTH + head * DIMS + head] = False
    for head in range(HEADS):
        masks["proj.weight"][:, head * DIMS + head] = False
    result = cut(ticket_of(dense, masks), Fused)
    assert widths(Fused, result.module) == (WIDTH,) * 4
    assert {stay.kind for group in result.plan.groups for stay in group.stays} >= {"product"}


def test_values_that_are_constant_fold_into_the_projection():
    """The rows of a softmax sum to one, so what attends to constants only is that constant."""
    dense, made = emptied(Fused, heads=(1,), live=True)
    result = cut(made, Fused)
    assert widths(Fused, result.module) == (WIDTH - DIMS,) * 4
    (fold,) = result.plan.folds
    assert (fold.bias, fold.channels) == ("proj.bias", DIMS)
    values = dense.qkv.bias.detach()[2 * WIDTH + DIMS : 2 * WIDTH + 2 * DIMS]
    shift = dense.proj.weight.detach()[:, DIMS : 2 * DIMS] @ values
    assert torch.allclose(result.module.proj.bias, dense.proj.bias + shift, rtol=1e-14, atol=0)


@pytest.mark.parametrize("unit", ["dims", "heads"])
def test_channel_groups_name_dimensions_or_heads(unit):
    groups = channel_groups(Fused(), X, unit=unit)
    group = next(group for group in groups if group.name == "qkv.weight")
    per_head = {
        "dims": [d for _ in range(HEADS) for d in range(DIMS)],
        "heads": [h for h in range(HEADS) for _ in range(DIMS)],
    }
    channels = group.producers[0].weight.channels
    assert group.pinned is None
    grid = [channels[part * WIDTH : part * WIDTH + WIDTH] for part in range(3)]
    for part in grid:
        same = {(a, b) for a, b in zip(part, per_head[unit], strict=True)}
        assert len(same) == len(set(part)) == len(set(per_head[unit]))  # one channel for each dimension or head


def test_the_stream_and_the_heads_shrink_independently():
    dense = randomised(Multihead())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    stream = [0, 5, 11]
    for name in ("patches.weight", "patches.bias", "attention.out_proj.weight", "attention.out_proj.bias"):
        masks[name][stream] = False
    for name in ("attention.in_proj_weight", "head.weight"):
        masks[name][:, stream] = False
    result = cut(ticket_of(dense, masks), Multihead)
    attention = result.module.attention
    assert isinstance(attention, NarrowAttention)
    assert tuple(attention.in_proj_weight.shape) == (3 * WIDTH, WIDTH - 3)
    assert tuple(attention.out_proj.weight.shape) == (WIDTH - 3, WIDTH)
    assert attention.num_heads == HEADS


class Two(Multihead):
    """A second attention that nothing is taken from."""

    def construct(self):
        super().construct()
        self.other = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def attend(self, x):
        return super().attend(x) + self.other(x, x, x)[0]


def test_only_attention_that_shrinks_is_replaced(tmp_path):
    dense = randomised(Two())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    rows = [part * WIDTH + d for part in range(3) for d in range(DIMS)]
    masks["attention.in_proj_weight"][rows] = masks["attention.in_proj_bias"][rows] = False
    masks["attention.out_proj.weight"][:, :DIMS] = False
    result = cut(ticket_of(dense, masks), Two)
    assert result.plan.shape.attention == ("attention",)
    assert isinstance(result.module.attention, NarrowAttention)
    assert type(result.module.other) is nn.MultiheadAttention
    loaded = load_compact(result.save(tmp_path / "small"), Two)
    assert loaded.attention.num_heads == HEADS - 1
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))


def test_attention_with_extra_parts_stays_as_it_is_and_the_rest_shrinks():
    class Extra(Tokens):
        def construct(self):
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True, batch_first=True)
            self.hidden, self.back = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

        def attend(self, x):
            x = x + self.attention(x, x, x)[0]
            return self.back(torch.relu(self.hidden(x)))

    dense = randomised(Extra())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    rows = [part * WIDTH + d for part in range(3) for d in range(DIMS)]
    masks["attention.in_proj_weight"][rows] = masks["attention.in_proj_bias"][rows] = False
    masks["attention.out_proj.weight"][:, :DIMS] = False
    masks["hidden.weight"][[1, 4]] = masks["hidden.bias"][[1, 4]] = False
    result = cut(ticket_of(dense, masks), Extra)
    assert type(result.module.attention) is nn.MultiheadAttention
    assert result.module.attention.in_proj_weight.shape[0] == 3 * WIDTH
    assert result.module.hidden.out_features == 4


def test_queries_and_keys_shrink_apart_from_values():
    """Dimensions of queries and keys that are zero say nothing about those of the values."""

    class Apart(Tokens):
        def construct(self):
            self.q, self.k, self.v = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 8)
            self.proj = nn.Linear(8, WIDTH)

        def attend(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.proj((q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v)

    dense = randomised(Apart())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    masks["q.weight"][[0, 3]] = masks["q.bias"][[0, 3]] = False  # their products with the keys are zero
    masks["v.weight"][[7]] = masks["v.bias"][[7]] = False
    result = cut(ticket_of(dense, masks), Apart)
    assert (result.module.q.out_features, result.module.k.out_features) == (4, 4)
    assert (result.module.v.out_features, result.module.proj.in_features) == (7, 7)
