"""What other sizes can change though the same operations run: wiring, numbers, masks, positions, zeros. Never silently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import conv, exactly_cut, kept, linear, net, noise, reasons
from torch import nn

from deploy_sparse.surgery._agreement import _blocks

LIVE = {"a.weight": [1, 4]}
SILENT = {"a.weight": [1, 4], "a.bias": [1, 4]}
MAPS = {"a": conv(3, 6), "c": conv(6, 4)}
TWO = {"a": conv(3, 6), "b": conv(3, 6), "c": conv(6, 4), "d": conv(6, 2), "e": conv(6, 2)}
FLAT = {"a": conv(3, 6), "d": linear(384, 4)}
X = noise(2, 3, 8, 8)
OTHERS = [noise(2, 3, 12, 9), noise(3, 3, 16, 16), noise(1, 3, 10, 11)]
BLOCKS = [noise(2, 3, 16, 16), noise(1, 3, 8, 16)]


def mask(x, inside):
    rows = torch.arange(x.shape[2])
    return (rows < 8 if inside else rows >= 8).to(x.dtype).view(-1, 1)


def numbers(self, x):
    """The same two numbers are used at all sizes; which of them meets the channels is another matter."""
    t, u = torch.tensor(0.3), torch.tensor(0.7)
    return x * t, x * u, self.c(torch.sigmoid(self.a(x)) + (t if x.shape[2] < 10 else u))


def crossed(self, x):
    p, q = torch.relu(self.a(x)), torch.relu(self.b(x))
    return self.c(p if x.shape[2] < 10 else q), self.d(p), self.e(q)


def joined(self, x):
    p, q = torch.relu(self.a(x)), torch.relu(self.b(x))
    return self.c(torch.cat([p, q] if x.shape[2] < 10 else [q, p], 1)), self.d(p), self.e(q)


HALVES = {"a": conv(3, 3), "b": conv(3, 3), "c": conv(6, 4), "d": conv(3, 2), "e": conv(3, 2)}
WIRED = {
    "numbers": (net(numbers, **MAPS), LIVE, "would depend on the size"),
    "parameters": (
        net(
            lambda self, x: self.c(torch.sigmoid(self.a(x)) + (self.p if x.shape[2] < 10 else self.q)),
            p=lambda: nn.Parameter(torch.tensor([0.3])),
            q=lambda: nn.Parameter(torch.tensor([0.5])),
            **MAPS,
        ),
        LIVE,
        "would depend on the size",
    ),
    "layers": (
        net(crossed, **TWO),
        {**SILENT, "b.weight": [2, 3], "b.bias": [2, 3]},
        "needed at other input sizes, where the network runs other operations",
    ),
    "halves": (
        net(joined, **HALVES),
        {"a.weight": [1], "a.bias": [1], "b.weight": [2], "b.bias": [2]},
        "would depend on the size",
    ),
}


@pytest.mark.parametrize("how", WIRED)
def test_the_same_operations_on_other_tensors_are_other_operations(how):
    factory, dead, said = WIRED[how]
    result = exactly_cut(factory, dead, X, OTHERS)
    assert kept(result, "a.weight") == ()
    assert said in reasons(result)


ZERO_HERE = {
    "a mask of rows beyond the example": (LIVE, lambda y, x: torch.relu(y) * mask(x, inside=False)),
    "a factor": (LIVE, lambda y, x: torch.relu(y) * torch.tensor(float(x.shape[2] - 8), dtype=x.dtype)),
    "rows filled": (LIVE, lambda y, x: torch.sigmoid(y).masked_fill(mask(x, inside=True) != 0, 0.0)),
    "a summand": (SILENT, lambda y, x: torch.relu(y) + 0.05 * (x.shape[2] - 8)),
    "a branch": (SILENT, lambda y, x: torch.where(x.sum(1, True) > 0, torch.relu(y), 0.1 * (x.shape[2] - 8))),
    "a border's value": (SILENT, lambda y, x: F.pad(torch.relu(y), (1, 1, 1, 1), value=0.2 * (x.shape[2] - 8))),
    "a border's width": (SILENT, lambda y, x: F.pad(torch.relu(y), (0, -x.shape[3] % 8), value=0.2)),
}


@pytest.mark.parametrize("how", ZERO_HERE)
def test_what_is_zero_at_the_example_only_stays(how):
    dead, act = ZERO_HERE[how]
    result = exactly_cut(net(lambda self, x: self.c(act(self.a(x), x)), **MAPS), dead, X, OTHERS)
    assert kept(result, "a.weight") == ()
    assert "constant 0 would depend on the size of the input" in reasons(result)


ZERO_ANYWHERE = {
    "padded with zeros": lambda y, x: F.pad(y, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)),
    "resized": lambda y, x: F.interpolate(y, size=(x.shape[2] // 2, 5)),
    "pooled": lambda y, x: F.adaptive_avg_pool2d(y, x.shape[2] // 2),
    "in windows": lambda y, x: y.unflatten(2, (x.shape[2] // 2, 2)).flatten(2, 3) if x.shape[2] % 2 == 0 else y,
    "in tokens": lambda y, x: y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(y.shape),
}


@pytest.mark.parametrize("how", ZERO_ANYWHERE)
def test_zero_that_no_size_changes_goes(how):
    factory = net(lambda self, x: self.c(ZERO_ANYWHERE[how](torch.relu(self.a(x)), x)), **MAPS)
    result = exactly_cut(factory, SILENT, X, OTHERS)
    assert kept(result, "a.weight") == (0, 2, 3, 5)


def patches(self, x):
    rows = torch.sigmoid(self.a(x)).reshape(x.shape[0], -1, 64)[:, :6]
    return self.c(rows.mean(2)[:, :, None, None])


def batches(self, x):
    return self.c(torch.sigmoid(self.a(x)).view(-1, 6, 8, 8))


def cropped(self, x):
    return self.d(torch.sigmoid(self.a(x)).flatten(1)[:, :384])


@pytest.mark.parametrize(
    ("forward", "parts"), [(patches, MAPS), (batches, MAPS), (cropped, FLAT)], ids=["rows", "batch", "columns"]
)
def test_reshapes_that_regroup_other_axes_at_other_sizes_keep_what_they_mix(forward, parts):
    result = exactly_cut(net(forward, **parts), LIVE, X, BLOCKS)
    assert kept(result, "a.weight") == ()
    assert "would depend on the size of the input" in reasons(result)


def rows_written(end, act, value):
    def forward(self, x):
        y = act(self.a(x))
        y[:, :, end] = value
        return self.c(y)

    return forward


@pytest.mark.parametrize(
    ("end", "shape"),
    [(slice(0, 8), (8, 8)), (slice(0, 8), (16, 16)), (slice(-8, None), (8, 8)), (slice(0, 1), (1, 1))],
    ids=["whole", "half", "from the end", "one"],
)
def test_rows_written_over_are_all_of_them_at_some_sizes_only(end, shape):
    factory = net(rows_written(end, torch.sigmoid, 0.3), **MAPS)
    assert kept(exactly_cut(factory, LIVE, noise(2, 3, *shape), OTHERS), "a.weight") == ()
    silent = net(rows_written(end, torch.relu, 0.0), **MAPS)
    alive = kept(exactly_cut(silent, SILENT, noise(2, 3, *shape), OTHERS), "a.weight")
    assert alive in ((), (0, 2, 3, 5))


def test_rows_that_are_zero_beside_zeros_let_them_go():
    def forward(self, x):
        y = torch.relu(self.a(x))
        y[:, :, :8].fill_(0.0)
        return self.c(y) + x[:, :1]

    assert kept(exactly_cut(net(forward, **MAPS), SILENT, X, OTHERS), "a.weight") == (0, 2, 3, 5)


def test_the_parts_of_a_reshape_are_the_fewest_axes_that_hold_the_same():
    def parts(before, after):
        return [(list(a), list(b)) for a, b in _blocks(before, after)]

    assert parts([2, 6, 8, 8], [2, 6, 64]) == [([0], [0]), ([1], [1]), ([2, 3], [2])]
    assert parts([2, 8, 96], [2, 2, 4, 96]) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert parts([1, 5, 1, 1], [1, 5]) == [([0], [0]), ([1], [1]), ([2], []), ([3], [])]
    assert parts([4, 6, 16, 16], [16, 6, 8, 8])[0] == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert parts([6], [1, 6, 1]) == [([0], [0, 1]), ([], [2])]
