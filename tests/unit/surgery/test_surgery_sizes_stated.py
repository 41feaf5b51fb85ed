"""Where the code's sizes come from decides what may go: written numbers, attributes, shapes, and sizes made of them."""

from __future__ import annotations

import pytest
import torch
from random_masks import X, cut, ticket_of
from surgery_nets import outputs, randomised
from torch import nn

from deploy_sparse.surgery import channel_groups, load_compact
from deploy_sparse.surgery.parts import Attribute

WIDTH = 6


class Net(nn.Module):
    """Two branches of six channels each, something the code does to the first, and a head over both."""

    def __init__(self, what, **attributes):
        super().__init__()
        self.a, self.b, self.what = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1), what
        for name, value in attributes.items():
            setattr(self, name, value)
        self.c, self.d = nn.LazyConv2d(2, 1), nn.Conv2d(WIDTH, 2, 1)
        self.double()
        self.forward(X)

    def forward(self, x):
        return self.c(self.what(self, torch.relu(self.a(x)))) + self.d(torch.relu(self.b(x)))


def silenced(dense, rows):
    """Rows and biases of these layers are emptied; behind the ReLU the channels are zero."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for name, gone in rows.items():
        masks[f"{name}.weight"][list(gone)] = masks[f"{name}.bias"][list(gone)] = False
    return ticket_of(dense, masks)


def emptied(factory, gone, other=(2,)):
    result = cut(silenced(randomised(factory()), {"a": gone, "b": other}), factory)
    kept = {group.name: group.kept for group in result.plan.groups}
    assert kept["b.weight"] == tuple(c for c in range(WIDTH) if c not in other)  # the other branch is free in any case
    return result, kept["a.weight"], result.plan.groups[0].stays


WRITTEN = {
    "view": (lambda net, x: x.view(-1, 6, 8, 8), (0, 1, 2, 3, 4, 5)),
    "last two": (lambda net, x: x[:, -2:], (4, 5)),
    "narrow": (lambda net, x: x.narrow(1, 1, 3), (0, 1, 2, 3)),
    "split": (lambda net, x: torch.cat(x.split(4, 1)[::-1], 1), (0, 1, 2, 3)),
    "split list": (lambda net, x: torch.cat(x.split([2, 4], 1)[::-1], 1), (0, 1, 2, 3, 4, 5)),
    "unflatten": (lambda net, x: x.unflatten(1, (2, 3)).flatten(1, 2), (0, 1, 2, 3, 4, 5)),
    "every second": (lambda net, x: x[:, ::2], (0, 1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_positions_that_written_numbers_count_stay(how):
    """What lies behind a slice and is read by nobody may go, what lies before it may not."""
    what, counted = WRITTEN[how]
    _, kept, stays = emptied(lambda: Net(what), (1, 4))
    assert set(counted) <= set(kept)
    reasons = [stay.reason for stay in stays if stay.kind == "size"]
    assert reasons
    assert all(reason.startswith("the size is stated by aten.") for reason in reasons)


def test_a_written_slice_keeps_what_it_counts():
    _, kept, _ = emptied(lambda: Net(lambda net, x: x[:, :3]), (1, 4))
    assert {0, 1, 2} <= set(kept)


FOLLOWED = {
    "split": lambda net, x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    "size()": lambda net, x: x.view(x.size(0), x.size(1), -1).unflatten(-1, (8, 8)),
    "inferred": lambda net, x: x.reshape(len(x), -1, 8, 8),
    "weight": lambda net, x: x.view(-1, net.a.weight.shape[0], 8, 8),
    "attribute of a layer": lambda net, x: x.view(-1, net.a.out_channels, 8, 8),
    "numel": lambda net, x: x.view(-1, x.numel() // (len(x) * 64), 8, 8),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_sizes_taken_from_tensors_and_layers_follow(how):
    _, kept, stays = emptied(lambda: Net(FOLLOWED[how]), (1, 4))
    assert kept == (0, 2, 3, 5)
    assert stays == ()


def test_halves_that_are_added_lose_the_same_channels():
    def factory():
        return Net(lambda net, x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :])

    result, kept, _ = emptied(factory, (1, 4, 5))  # row 2 lives, so row 5 stays
    assert kept == (0, 2)
    assert result.plan.cuts[0].kept == (0, 2, 3, 5)


def test_a_first_half_stays_a_half():
    """Nobody reads the second half, but its width decides where the first one ends."""

    def factory():
        return Net(lambda net, x: x[:, : x.shape[1] // 2])

    _, kept, stays = emptied(factory, ())
    assert kept == (0, 1, 2, 3, 4, 5)
    assert [stay.kind for stay in stays] == ["size"]
    _, smaller, _ = emptied(factory, (0,))
    assert len(smaller) // 2 == len({0, 1, 2} & set(smaller))


def test_a_width_read_from_an_attribute_follows():
    def factory():
        return Net(lambda net, x: x.view(-1, net.width, 8, 8), width=WIDTH)

    result, kept, stays = emptied(factory, (0, 3, 4))
    assert kept == (1, 2, 5)
    assert stays == ()
    assert result.module.width == 3
    assert result.plan.shape.attributes == (Attribute("", "width", None, WIDTH, 3),)


def test_entries_of_tuples_and_lists_follow_each_for_itself():
    def factory():
        def what(net, x):
            y = x.view(-1, *net.grid, 8, 8).transpose(1, 2).flatten(1, 2)
            return y + x.view(len(x), net.sizes[0], net.sizes[1], 8, 8).transpose(1, 2).flatten(1, 2)

        return Net(what, grid=(2, 3), sizes=[2, 3, 7])

    result, kept, _ = emptied(factory, (1, 4))
    assert kept == (0, 2, 3, 5)
    assert result.module.grid == (2, 2)
    assert result.module.sizes == [2, 2, 7]
    assert isinstance(result.module.grid, tuple)


def test_a_sum_over_one_axis_of_a_split_lets_channels_go():
    """As in ResNeSt: the sum over the parts is read by a layer."""

    def factory():
        return Net(lambda net, x: x.view(len(x), 2, x.shape[1] // 2, 8, 8).sum(1))

    result, _, stays = emptied(factory, (1, 4))
    assert result.plan.cuts[0].kept == (0, 2, 3, 5)
    assert result.module.c.in_channels == 2
    assert stays == ()


def test_an_attribute_that_two_tensors_share_keeps_both_equally_wide():
    class Shared(Net):
        def forward(self, x):
            y, z = (torch.relu(layer(x)).reshape(len(x), self.width, 8, 8) for layer in (self.a, self.b))
            return self.c(y) + self.d(z)

    def factory():
        return Shared(lambda net, x: x, width=WIDTH)

    result = cut(silenced(randomised(factory()), {"a": (0, 1, 2), "b": (5,)}), factory)
    assert [len(group.kept) for group in result.plan.groups[:2]] == [5, 5]
    (stay,) = result.plan.groups[0].stays
    assert stay.kind == "size"
    assert stay.reason == "the size is stated by aten.reshape.default in the network itself"
    assert (result.module.width, result.module.a.out_channels, result.module.b.out_channels) == (5, 5, 5)


class Heads(nn.Module):
    """``C // heads`` of the stream is taken for the head size: stream and heads can only shrink alike."""

    def __init__(self):
        super().__init__()
        self.heads, self.a, self.qkv = 2, nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH)
        self.proj, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.double()

    def forward(self, x):
        x = self.a(x).flatten(2).transpose(1, 2)
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(n, length, c))).mean(1))


def heads_masks(dense, stream, dims):
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for name in ("a.weight", "a.bias", "proj.weight", "proj.bias"):
        masks[name][stream] = False
    for name in ("qkv.weight", "head.weight"):
        masks[name][:, stream] = False
    rows = [part * WIDTH + head * 3 + dim for part in range(3) for head in range(2) for dim in dims]
    masks["qkv.weight"][rows] = masks["qkv.bias"][rows] = False
    masks["proj.weight"][:, [row for row in rows if row < WIDTH]] = False
    return masks


@pytest.mark.parametrize(
    ("stream", "dims", "width"), [([1, 4], [0], 4), ([1, 4], [], 6), ([], [0], 6), ([0, 1, 2, 5], [1], 4)]
)
def test_sizes_divided_from_the_stream_force_equal_widths(stream, dims, width):
    dense = randomised(Heads())
    result = cut(ticket_of(dense, heads_masks(dense, stream, dims)), Heads)
    module = result.module
    assert module.a.out_channels == module.proj.in_features == module.qkv.out_features // 3 == width
    assert module.heads == 2
    if width == 6:
        assert {stay.kind for group in result.plan.groups for stay in group.stays} >= {"size"}


class Positions(nn.Module):
    """A class token, a position embedding, and a table of relative positions looked up by a buffer."""

    def __init__(self):
        super().__init__()
        self.patches, self.heads = nn.Conv2d(3, WIDTH, 4, 4), 2
        self.token, self.positions = nn.Parameter(torch.ones(1, 1, WIDTH)), nn.Parameter(torch.ones(1, 5, WIDTH))
        self.table = nn.Parameter(torch.ones(9, 2))
        index = torch.arange(5)
        self.register_buffer("index", index[:, None] - index + 4)
        self.qkv, self.proj, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.double()

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.flatten()].view(length, length, -1).permute(2, 0, 1)
        y = (q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1) @ v
        return self.head(x[:, 0] + self.proj(y.transpose(1, 2).reshape(n, length, -1))[:, 0])


def test_position_embeddings_and_tokens_are_cut_along_the_channels():
    dense = randomised(Positions())
    stream = [0, 4]
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    for name in ("patches.weight", "patches.bias", "proj.weight", "proj.bias"):
        masks[name][stream] = False
    for name in ("token", "positions", "qkv.weight", "head.weight"):
        masks[name][..., stream] = False
    result = cut(ticket_of(dense, masks), Positions)
    module = result.module
    assert tuple(module.token.shape) == (1, 1, 4)
    assert tuple(module.positions.shape) == (1, 5, 4)
    assert torch.equal(module.positions[0], dense.positions[0][:, [1, 2, 3, 5]])
    assert tuple(module.table.shape) == (9, 2)
    group = result.plan.groups[0]
    assert {"token", "positions"} <= set(group.members)


def test_a_table_of_relative_positions_is_cut_along_the_heads(tmp_path):
    dense = randomised(Positions())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in dense.named_parameters()}
    rows = [part * WIDTH + dim for part in range(3) for dim in range(3)]  # head 0
    masks["qkv.weight"][rows] = masks["qkv.bias"][rows] = False
    masks["proj.weight"][:, :3] = False
    result = cut(ticket_of(dense, masks), Positions)
    module = result.module
    assert tuple(module.table.shape) == (9, 1)
    assert torch.equal(module.table[:, 0], dense.table[:, 1])
    assert (module.heads, module.qkv.out_features) == (1, 9)
    assert tuple(module.positions.shape) == (1, 5, WIDTH)
    loaded = load_compact(result.save(tmp_path / "small"), Positions)
    assert torch.equal(outputs(loaded, X), outputs(module, X))


def test_a_written_size_pins_the_groups_it_counts_alone():
    groups = {group.name: group for group in channel_groups(Net(WRITTEN["view"][0]), X)}
    assert groups["a.weight"].pinned == "the size is stated by aten.view.default in the network itself"
    assert groups["b.weight"].pinned is None
    free = {group.name: group for group in channel_groups(Net(FOLLOWED["inferred"]), X)}
    assert free["a.weight"].pinned is None
