"""What must come through surgery: ties, shared modules, frozen parameters, memory formats, hooks, sizes in attributes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from random_masks import X, cut, difference, factory, given, half, masks_for, ticket_of
from surgery_nets import outputs, randomised
from torch import nn

from deploy_sparse.errors import TicketError
from deploy_sparse.surgery import channel_groups, compact, load_compact


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class Tied(nn.Module):
    """One weight under two names; ``free`` and ``last`` are apart from it."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight = self.a.weight
        self.last = nn.Conv2d(4, 2, 1)
        self.double()

    def forward(self, x):
        return self.last(torch.relu(self.b(torch.relu(self.a(self.stem(x))))))


def test_masks_that_disagree_about_a_tied_weight_are_refused_by_both_names():
    one, other = torch.ones(4, 4, 1, 1, dtype=torch.bool), torch.ones(4, 4, 1, 1, dtype=torch.bool)
    one[0], other[1] = False, False
    with pytest.raises(TicketError, match=r"(?=[\s\S]*'a\.weight')(?=[\s\S]*'b\.weight')"):
        compact(given(randomised(Tied()), {"a.weight": one, "b.weight": other}), Tied, X)


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_a_mask_of_one_name_of_a_tied_weight_is_that_of_both(names):
    dense = randomised(Tied())
    mask = torch.rand(4, 4, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.6
    result = cut(given(dense, dict.fromkeys(names, mask)), Tied)
    with torch.no_grad():
        dense.a.weight.mul_(mask)
    assert difference(dense.eval(), result.module) <= 1e-10


def test_tied_weights_shrink_together_and_stay_tied(tmp_path):
    result = cut(half(randomised(Tied())), Tied)
    for module in (result.module, load_compact(result.save(tmp_path / "small"), Tied)):
        assert module.a.weight is module.b.weight
        assert module.a.weight.shape == (2, 2, 1, 1)
        assert torch.equal(outputs(module, X), outputs(result.module, X))


def test_a_module_under_two_names_stays_one_module(tmp_path):
    class Shared(Tied):
        def __init__(self):
            super().__init__()
            self.b = self.a

    result = cut(half(randomised(Shared())), Shared)
    loaded = load_compact(result.save(tmp_path / "small"), Shared)
    assert result.module.b is result.module.a
    assert loaded.b is loaded.a
    assert shapes(loaded) == shapes(result.module)
    assert result.module.a.weight.shape == (2, 2, 1, 1)


def test_frozen_parameters_are_compacted_and_stay_frozen(tmp_path):
    def frozen():
        return factory().requires_grad_(False)

    result = cut(half(randomised(frozen())), frozen)
    assert shapes(result.module)["3.weight"] == (2, 3, 3, 3)
    for module in (result.module, load_compact(result.save(tmp_path / "small"), frozen)):
        assert not any(p.requires_grad for p in module.parameters())


def test_channels_last_is_kept():
    def make():
        return factory().to(memory_format=torch.channels_last)

    dense = randomised(make())
    made = half(dense)
    result = cut(made, make, X.contiguous(memory_format=torch.channels_last))
    for layer in (result.module[0], result.module[3]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    assert shapes(result.module)["3.weight"] == (2, 3, 3, 3)


def test_forward_hooks_take_part_and_are_kept():
    def make():
        network = factory()
        network[0].register_forward_hook(lambda module, inputs, output: torch.tanh(output) * 2)
        network[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5 * inputs[0].abs(),))
        return network

    dense = randomised(make())
    result = cut(half(dense), make)
    assert len(result.module[0]._forward_hooks) == len(result.module[3]._forward_pre_hooks) == 1
    assert shapes(result.module)["3.weight"] == (2, 3, 3, 3)
    bare = copy.deepcopy(result.module)
    bare[0]._forward_hooks.clear()
    assert difference(bare, result.module) > 1e-3  # the hooks do something


class Attention(nn.Module):
    """Code that reads its sizes from attributes, as networks in the wild do."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.hidden_dim = heads, width // heads, width
        self.patches, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)
        self.double()

    def forward(self, x):
        x = self.patches(x)
        n, _, height, width = x.shape
        x = x.reshape(n, self.hidden_dim, height * width).permute(0, 2, 1)
        qkv = self.qkv(self.norm(x)).reshape(n, -1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        x = x + self.proj((scores @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def heads_masked(dense, heads):
    """Rows of queries, keys and values, and the columns that read them, of whole heads."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for head in heads:
        rows = [part * 12 + head * 4 + d for part in range(3) for d in range(4)]
        masks["qkv.weight"][rows] = masks["qkv.bias"][rows] = False
        masks["proj.weight"][:, head * 4 : head * 4 + 4] = False
    return masks


def test_the_number_of_heads_follows_the_heads_that_go(tmp_path):
    result = cut(ticket_of(randomised(Attention()), heads_masked(Attention(), [1])), Attention)
    for module in (result.module, load_compact(result.save(tmp_path / "small"), Attention)):
        assert (module.num_heads, module.head_dim, module.hidden_dim) == (2, 4, 12)
        assert (module.qkv.out_features, module.proj.in_features) == (24, 8)
        assert torch.equal(outputs(module, X), outputs(result.module, X))


def test_the_size_of_heads_follows_the_dimensions_that_go():
    dense = randomised(Attention())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    rows = [part * 12 + head * 4 + d for part in range(3) for head in range(3) for d in (0, 2)]
    masks["qkv.weight"][rows] = masks["qkv.bias"][rows] = False
    masks["proj.weight"][:, [r for r in rows if r < 12]] = False
    result = cut(ticket_of(dense, masks), Attention)
    assert (result.module.num_heads, result.module.head_dim) == (3, 2)
    assert (result.module.qkv.out_features, result.module.proj.in_features) == (18, 6)


def test_the_width_of_the_stream_follows_its_channels():
    dense = randomised(Attention())
    groups = channel_groups(dense, X)
    (stream,) = [group for group in groups if group.name == "patches.weight"]
    assert stream.pinned is None
    made = ticket_of(dense, masks_for(dense, [stream], {stream.name: frozenset({1, 5, 6})}, frozenset()))
    result = cut(made, Attention)
    assert (result.module.hidden_dim, result.module.num_heads, result.module.head_dim) == (9, 3, 4)
    assert result.module.patches.out_channels == result.module.proj.out_features == result.module.head.in_features == 9


def test_the_number_of_groups_follows_the_groups_that_go():
    def make():
        layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)]
        return nn.Sequential(*layers).double()

    dense = randomised(make())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        masks[name][2:4] = False
    masks["3.weight"][:, 2:4] = False
    result = cut(ticket_of(dense, masks), make)
    assert (result.module[1].groups, result.module[1].in_channels, result.module[1].out_channels) == (3, 6, 6)


def test_a_functional_norm_reads_the_shape_that_is_left():
    class Normed(nn.Module):
        """``normalized_shape`` is read by the code, not by a layer."""

        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 6, 1), nn.LayerNorm(6), nn.Conv2d(6, 2, 1)
            self.double()

        def forward(self, x):
            y = self.a(x).permute(0, 2, 3, 1)
            y = F.layer_norm(y, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
            return self.b(y.permute(0, 3, 1, 2))

    result = cut(half(randomised(Normed())), Normed)
    norm = result.module.norm
    assert tuple(norm.weight.shape) == (result.module.a.out_channels,)
