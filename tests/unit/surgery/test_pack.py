"""Packed networks: the masked network's function, blocks only, and look-ups where the graph forces them."""

from __future__ import annotations

import random
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_samples import (
    SHAPE,
    block_mask,
    blocks_everywhere,
    exactly_packed,
    look_ups,
    packed_layers,
    pairs_ticket,
    random_blocks,
    ticket_of,
    wide_networks,
)
from random_masks import both, masks_for
from small_networks import linear, net, noise
from torch import nn

from deploy_sparse.surgery import channel_groups
from deploy_sparse.surgery.pack import candidates, layer_forms
from deploy_sparse.surgery.packed import PackedConv2d, PackedLinear
from deploy_sparse.surgery.spread import SpreadBatchNorm2d

A, B = range(0, 32, 2), range(1, 32, 2)
C, D = range(16), range(16, 32)
ALIGNED = [(A, A), (B, B)]  # rows and input channels of two blocks


def conv(c_in=32, c_out=32, **options):
    return lambda: nn.Conv2d(c_in, c_out, 3, **{"padding": 1, **options})


def norm(**options):
    return lambda: nn.BatchNorm2d(32, **options)


def lines(result):
    return [line for line in result.plan.notes() if "of blocks:" in line]


def equal_blocks(module):
    """Blocks of half the input channels for every weight that is wide enough."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1 and min(p.shape[:2]) >= 16}
    return {name: random_blocks(p, "equal", random.Random(0)) for name, p in weights.items()}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(wide_networks(), st.integers(0, 2**16), st.sampled_from(["union", "spread"]))
def test_random_networks_compute_the_same_with_random_blocks(factory, seed, shortcuts):
    made = ticket_of(factory(), blocks_everywhere(factory(), seed), seed)
    exactly_packed(factory, made, noise(*SHAPE), [noise(3, 3, 9, 8)], shortcuts=shortcuts)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(wide_networks(), st.integers(0, 2**16), st.sampled_from([1, 8]))
def test_random_networks_compute_the_same_with_channels_cut_besides(factory, seed, multiple):
    """Channels go silently, or live: their constants are folded into biases or carried by a column."""
    rng, x = random.Random(seed), noise(*SHAPE)
    groups = channel_groups(factory(), x)
    gone = {
        group.name: frozenset(rng.sample(range(group.size), rng.randint(1, group.size // 4)))
        for group in groups
        if group.pinned is None and rng.random() < 0.6
    }
    live = frozenset(name for name in gone if rng.random() < 0.5)
    masks = both(masks_for(factory(), groups, gone, live), blocks_everywhere(factory(), seed))
    exactly_packed(factory, ticket_of(factory(), masks, seed), x, [noise(3, 3, 9, 8)], multiple=multiple)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(wide_networks(), st.integers(0, 2**16))
def test_any_choice_of_layers_can_be_packed(factory, seed):
    made, x = ticket_of(factory(), blocks_everywhere(factory(), seed), seed), noise(*SHAPE)
    known = sorted(exactly_packed(factory, made, x).plan.shape.packed)
    chosen = random.Random(seed).sample(known, len(known) // 2)
    assert exactly_packed(factory, made, x, layers=chosen).plan.shape.packed == set(chosen)


# Look-ups


def chain():
    parts = [conv(3)(), nn.BatchNorm2d(32), nn.ReLU(), conv()(), nn.BatchNorm2d(32), nn.ReLU(), conv()(), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).double()


def test_aligned_blocks_of_consecutive_layers_need_no_look_up():
    made = pairs_ticket(chain, {"3.weight": ALIGNED, "6.weight": [(C, A), (D, B)]})
    result = exactly_packed(chain, made, noise(2, 3, 6, 6), [noise(3, 3, 9, 7)])
    assert look_ups(result) == []
    assert lines(result) == ["2 layers of blocks: 2 disjoint; no look-up"]
    for layer in packed_layers(result).values():
        assert layer.weight.shape == (32, 16, 3, 3)
        assert "gather" not in repr(layer)
        assert "restore" not in repr(layer)


def test_blocks_that_cross_need_one_look_up_between_them():
    """Rows come out as A and B, and are read as C and D."""
    made = pairs_ticket(chain, {"3.weight": ALIGNED, "6.weight": [(A, C), (B, D)]})
    result = exactly_packed(chain, made, noise(2, 3, 6, 6))
    assert len(look_ups(result)) == 1
    assert lines(result)[0].startswith("2 layers of blocks: 2 disjoint; 1 look")


def test_shared_inputs_are_looked_up_before_and_rows_are_left_to_the_reader():
    made = pairs_ticket(chain, {"3.weight": [(A, range(20)), (B, range(12, 32))]})
    result = exactly_packed(chain, made, noise(2, 3, 6, 6))
    assert look_ups(result) == ["before 3"]
    assert lines(result) == ["1 layer of blocks: 1 equal; 1 looks channels up before (3)"]
    assert packed_layers(result)["3"].weight.shape[0] == 32


def residual(norms):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, padding=1)
            for name in ("a", "b", "c", "d"):
                setattr(self, name, conv(bias=False)())
                setattr(self, f"norm_{name}", nn.BatchNorm2d(32) if norms else nn.Identity())
            self.fc = nn.Linear(32, 5)
            self.double()

        def forward(self, x):
            x = torch.relu(self.stem(x))
            for first, second in (("a", "b"), ("c", "d")):
                y = torch.relu(getattr(self, f"norm_{first}")(getattr(self, first)(x)))
                x = torch.relu(x + getattr(self, f"norm_{second}")(getattr(self, second)(y)))
            return self.fc(x.mean((2, 3)))

    return Residual


def test_one_order_of_a_shared_stream_serves_all_layers_that_agree():
    pairs = {f"{name}.weight": ALIGNED for name in "abcd"}
    result = exactly_packed(residual(True), pairs_ticket(residual(True), pairs), noise(2, 3, 6, 6))
    assert look_ups(result) == []
    assert len(result.plan.shape.packs) == 4


def test_layers_of_a_shared_stream_that_disagree_restore_behind_their_norm():
    """The stream can lie as b writes it or as d does; the other one is put back by its BatchNorm."""
    pairs = {"b.weight": ALIGNED, "d.weight": [(C, A), (D, B)], "a.weight": ALIGNED, "c.weight": [(C, C), (D, D)]}
    result = exactly_packed(residual(True), pairs_ticket(residual(True), pairs), noise(2, 3, 6, 6), [noise(3, 3, 9, 8)])
    late = [path for path, part in result.module.named_modules() if type(part) is SpreadBatchNorm2d]
    assert len(late) == 1
    assert f"after {late[0]}" in look_ups(result)
    assert not any(look.startswith(("after b", "after d")) for look in look_ups(result))
    assert f"1 looks channels up after their norm ({late[0]})" in lines(result)[0]
    without = exactly_packed(residual(False), pairs_ticket(residual(False), pairs), noise(2, 3, 6, 6))
    assert len([look for look in look_ups(without) if look in ("after b", "after d")]) == 1


def last_norm(**options):
    return net(lambda self, x: self.norm(self.conv(x)), conv=conv(bias=False), norm=norm(**options))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_what_is_known_by_number_is_restored_behind_its_norm(options):
    made = pairs_ticket(last_norm(**options), {"conv.weight": ALIGNED})
    result = exactly_packed(last_norm(**options), made, noise(2, 32, 6, 6))
    assert look_ups(result) == ["before conv", "after norm"]
    assert tuple(result.module.norm.places.tolist()) == result.plan.shape.packs[0].packing.places
    assert result.module.norm.num_features == 32


def test_what_a_norm_looks_up_for_a_layer_is_timed_with_the_layer():
    made, module, x = pairs_ticket(last_norm(), {"conv.weight": ALIGNED}), last_norm()(), noise(2, 32, 6, 6)
    module.load_state_dict(made.masked_weights())
    (form,) = layer_forms(module, made.masks, (), (x,))
    assert str(form) == "2 disjoint blocks, look-up before and after"
    assert torch.allclose(form.packed(x), form.dense(x))


def test_rows_are_restored_by_the_layer_where_its_norm_is_not_its_own():
    def hooked():
        module = last_norm()()
        module.norm.register_forward_hook(lambda part, given, made: made * 2)
        return module

    twice = net(lambda self, x: self.norm(self.norm(self.conv(x))), conv=conv(), norm=norm())
    read = net(lambda self, x: self.norm(self.conv(x)) + self.norm.weight.view(-1, 1, 1), conv=conv(), norm=norm())
    shown = net(lambda self, x: (lambda y: (y, self.norm(y)))(self.conv(x)), conv=conv(), norm=norm())
    for factory in (hooked, twice, read, shown):
        result = exactly_packed(factory, pairs_ticket(factory, {"conv.weight": ALIGNED}), noise(2, 32, 6, 6))
        assert look_ups(result) == ["before conv", "after conv"]


def test_rows_in_no_block_are_computed_as_zeros_with_their_bias():
    """A dead row that is a network output stays; the reader of others folds their constant."""
    factory = net(lambda self, x: self.out(torch.sigmoid(self.first(x))), first=conv(3), out=conv(padding=0))
    masks = {"first.weight": [(range(4, 32), range(3))], "out.weight": [(range(10), range(16)), (range(12, 30), D)]}
    result = exactly_packed(factory, pairs_ticket(factory, masks), noise(2, 3, 6, 6))
    assert result.plan.folds
    assert packed_layers(result)["out"].packing.empty_rows


# Kinds of networks


def test_perceptrons_are_packed():
    factory = net(
        lambda self, x: self.c(F.gelu(self.b(F.gelu(self.a(x))))),
        **{name: linear(32, 32) for name in "abc"},
    )
    made = ticket_of(factory(), {f"{n}.weight": block_mask(torch.ones(32, 32), ALIGNED) for n in "abc"})
    result = exactly_packed(factory, made, noise(2, 32), [noise(5, 32), noise(2, 3, 32)])
    assert {type(layer) for layer in packed_layers(result).values()} == {PackedLinear}
    assert look_ups(result) == ["before a", "after c"]


def test_a_flattened_map_is_read_in_blocks_of_channels():
    def factory():
        parts = [conv(3)(), nn.ReLU(), conv()(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32)]
        return nn.Sequential(*parts, nn.ReLU(), nn.Linear(32, 5)).double()

    features = [[4 * channel + at for channel in own for at in range(4)] for own in (A, B)]
    pairs = {"2.weight": ALIGNED, "6.weight": list(zip((A, B), features, strict=True))}
    result = exactly_packed(factory, pairs_ticket(factory, pairs), noise(2, 3, 6, 6))
    assert set(packed_layers(result)) == {"2", "6"}
    assert "after 2" not in look_ups(result)


def test_concatenations_and_depthwise_filters_between_blocks_are_renumbered():
    factory = net(
        lambda self, x: self.out(
            F.relu(self.depthwise(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)))
        ),  # keeps the two halves
        a=conv(3),
        b=conv(3),
        depthwise=conv(64, 64, groups=64),
        out=conv(64, 32),
    )
    pairs = {"out.weight": [(A, [*A, *(32 + c for c in A)]), (B, [*B, *(32 + c for c in B)])]}
    result = exactly_packed(factory, pairs_ticket(factory, pairs), noise(2, 3, 6, 6))
    assert set(packed_layers(result)) == {"out"}
    assert result.module.depthwise.groups == 64
    assert "after out" in look_ups(result)  # a network output


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 2, 2)
        self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        self.double()

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def test_a_transformers_perceptron_is_packed_and_its_attention_stays_dense():
    masks = {"up.weight": block_mask(torch.ones(64, 32), [(range(0, 64, 2), A), (range(1, 64, 2), B)])}
    masks["down.weight"] = block_mask(torch.ones(32, 64), [(A, range(0, 64, 2)), (B, range(1, 64, 2))])
    masks["attention.out_proj.weight"] = block_mask(torch.ones(32, 32), ALIGNED)
    result = exactly_packed(Transformer, ticket_of(Transformer(), masks), noise(2, 3, 6, 6), [noise(3, 3, 8, 4)])
    assert set(packed_layers(result)) == {"up", "down"}
    assert look_ups(result) == []  # LayerNorm is indifferent to the order


# What is left alone


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).double()


def tied():
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    module[2].weight = module[0].weight
    return module


def hooked():
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    module[0].register_forward_pre_hook(lambda part, given: (given[0] * 2,))
    return module


def patched():
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    module[0].forward = MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, module[0])
    return module


TWICE = net(lambda self, x: self.b(torch.relu(self.a(torch.relu(self.a(x))))), a=linear(32, 32), b=linear(32, 32))
READ = net(lambda self, x: self.b(torch.relu(F.linear(self.a(x), self.a.weight))), a=linear(32, 32), b=linear(32, 32))
GROUPED = net(lambda self, x: self.b(torch.relu(self.a(self.d(x)))), a=conv(groups=2), b=conv(), d=conv(groups=32))


@pytest.mark.parametrize(
    ("factory", "x", "packs"),
    [
        (tied, noise(2, 32), {"4"}),
        (hooked, noise(2, 32), {"2"}),
        (patched, noise(2, 32), {"2"}),
        (TWICE, noise(2, 32), {"b"}),
        (READ, noise(2, 32), {"b"}),
        (GROUPED, noise(2, 32, 6, 6), {"b"}),
        (encoder, noise(2, 4, 32), set()),  # PyTorch's own code takes the weights out of its layers
        (lambda: nn.Linear(32, 32).double(), noise(2, 32), set()),  # the whole network: nothing to put it in
    ],
    ids=["tied", "hooked", "patched", "twice", "read", "grouped", "encoder", "alone"],
)
def test_layers_that_are_more_than_their_call_stay_dense(factory, x, packs):
    module = factory()
    masks = equal_blocks(module)
    if factory is tied:
        masks["2.weight"] = masks["0.weight"]
    result = exactly_packed(factory, ticket_of(module, masks), x)
    assert result.plan.shape.packed == packs
    if not packs:
        assert result.plan.choice == ("packed: nothing, as no layer that can be packed has a mask of blocks",)


def test_layers_called_by_keyword_and_held_in_plain_lists_are_packed():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
            self.order = [self.b, self.a]

        def forward(self, x):
            for layer in self.order:
                x = torch.relu(layer(input=x))
            return x

    result = exactly_packed(
        lambda: Listed().double(), ticket_of(Listed().double(), equal_blocks(Listed())), noise(2, 32, 4, 4)
    )
    assert set(packed_layers(result)) == {"a", "b"}
    assert [type(layer) for layer in result.module.order] == [PackedConv2d, PackedConv2d]
    assert result.module.order[0] is result.module.b


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_what_a_layer_reads_is_told_without_its_own_padding(options):
    def factory():
        return nn.Sequential(conv(**options)(), nn.ReLU(), conv(stride=2)()).double()

    made, x = pairs_ticket(factory, {"0.weight": ALIGNED, "2.weight": ALIGNED}), noise(2, 32, 7, 5)
    assert exactly_packed(factory, made, x).plan.shape.packed == {"0", "2"}
    module = factory()
    module.load_state_dict(made.masked_weights())
    found = candidates(module, made.masks, (), (x,))
    assert [(each.path, each.read, each.written) for each in found] == [
        ("0", (32, 7, 5), (32, 7, 5)),
        ("2", (32, 7, 5), (32, 4, 3)),
    ]
    forms = layer_forms(module, made.masks, (), (x,))
    assert [(form.path, form.share, form.input_shape) for form in forms] == [
        ("0", 0.5, (32, 7, 5)),
        ("2", 0.5, (32, 7, 5)),
    ]
    assert [str(form) for form in forms] == [
        "2 disjoint blocks, look-up before",
        "2 disjoint blocks, look-up after",
    ]
    for form in forms:
        y = torch.randn(2, *form.input_shape, dtype=torch.float64)
        assert form.dense(y).shape == form.packed(y).shape
