"""Exact at inputs other than the example: lengths of token ids, both parities, every layout, numbers, batches of one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import conv, exactly_cut, kept, linear, net, noise, reasons
from torch import nn

DEAD, ALIVE = {"a.weight": [1, 4]}, (0, 2, 3, 5)
MAPS = {"a": conv(3, 6), "c": conv(6, 4)}
TOKENS = {"e": lambda: nn.Embedding(9, 5), "a": linear(5, 6), "c": linear(6, 4)}
LAST = {"a": linear(3, 6), "c": linear(6, 4)}
X = noise(2, 3, 8, 8)


def stays(result, said):
    """Nothing was cut, and the reason names both dead channels."""
    assert result.plan.cuts == ()
    assert "[1, 4]" in reasons(result)
    assert said in reasons(result)


def goes(result):
    assert kept(result, "a.weight") == kept(result, "a.bias") == ALIVE
    assert result.plan.folds
    assert reasons(result) == ""


def ids(length):
    return torch.arange(2 * length).reshape(2, length) % 9


LENGTHS = {
    "a number from the length": lambda self, i: self.c(torch.relu(self.a(self.e(i)) - i.shape[1] * 0.05)),
    "a token more at some lengths": lambda self, i: self.c(
        F.pad(torch.sigmoid(self.a(self.e(i))), (0, 0, int(i.shape[1] > 8), 0)).mean(1)
    ),
}


@pytest.mark.parametrize("how", LENGTHS)
def test_token_ids_of_other_lengths_are_analysed(how):
    stays(exactly_cut(net(LENGTHS[how], **TOKENS), DEAD, ids(7), [ids(12), ids(4)]), "would depend on the size")


def test_token_ids_fold_and_are_verified_at_other_lengths():
    result = exactly_cut(
        net(lambda self, i: self.c(torch.sigmoid(self.a(self.e(i)))), **TOKENS), DEAD, ids(7), [ids(12)]
    )
    goes(result)
    assert {"shorter examples [2, 6]", "longer examples [2, 9]"} <= set(result.parity.inputs)


@pytest.mark.parametrize("by_size", [True, False])
def test_images_beside_integers_change_their_size(by_size):
    def forward(self, x, t):
        return self.c(torch.relu(self.a(x) + (x.shape[2] * 0.1 if by_size else 0.1))) + t.view(-1, 1, 1, 1)

    steps = torch.tensor([1, 2])
    result = exactly_cut(net(forward, **MAPS), DEAD, (X, steps), [(noise(2, 3, 12, 9), steps)])
    stays(result, "would depend on the size") if by_size else goes(result)


def test_numbers_that_follow_the_width_at_other_sizes_only():
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        return self.c(y / math.sqrt(y.shape[1]) if x.shape[2] > 10 else y)

    stays(exactly_cut(net(forward, **MAPS), DEAD, X, [noise(2, 3, 16, 20)]), "needed at other input sizes")


@pytest.mark.parametrize("traced", [8, 9, 10, 11, 12])
def test_padding_of_odd_heights_counts_whichever_was_traced(traced):
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        return self.c(F.pad(y, (0, 0, 0, y.shape[2] % 2)) if y.shape[2] % 2 else y)

    others = [noise(2, 3, height, 10) for height in (7, 9, 12, 14, 15)]
    result = exactly_cut(net(forward, **MAPS), DEAD, noise(2, 3, traced, 10), others)
    stays(result, "would meet the padding" if traced % 2 else "needed at other input sizes")


@pytest.mark.parametrize("traced", [10, 12, 16])
def test_padding_of_odd_lengths_counts_whichever_was_traced(traced):
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        return self.c(F.pad(y, (0, 1)) if y.shape[2] % 2 else y)

    factory = net(forward, a=lambda: nn.Conv1d(3, 6, 1), c=lambda: nn.Conv1d(6, 4, 1))
    others = [noise(2, 3, length) for length in (9, 11, 14, 16)]
    stays(exactly_cut(factory, DEAD, noise(2, 3, traced), others), "needed at other input sizes")


def image(axis):
    return lambda self, x: self.c(torch.relu(self.a(x) + x.shape[axis] * 0.1))


def video(axis):
    def forward(self, x):
        return self.c(torch.relu(self.a(x.flatten(0, 1)) + x.shape[axis] * 0.1)).unflatten(0, x.shape[:2])

    return forward


def spectrogram(self, x):
    return self.c(torch.relu(self.a(x[:, None]) + x.shape[1] * 0.1))


LAYOUTS = {
    "height of NHWC": (net(image(1), **LAST), (2, 8, 8, 3), (2, 12, 8, 3)),
    "width of NHWC": (net(image(2), **LAST), (2, 8, 8, 3), (2, 8, 12, 3)),
    "frames of a video": (net(video(1), **MAPS), (2, 4, 3, 8, 8), (2, 6, 3, 8, 8)),
    "height of a video": (net(video(3), **MAPS), (2, 4, 3, 8, 8), (2, 4, 3, 12, 8)),
    "frames of a spectrogram": (net(spectrogram, a=conv(1, 6), c=conv(6, 4)), (2, 8, 10), (2, 13, 10)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_varied_in_every_layout(layout):
    factory, traced, other = LAYOUTS[layout]
    stays(exactly_cut(factory, DEAD, noise(*traced), [noise(*other)]), "would depend on the size")


def test_channels_last_networks_fold_and_are_verified_at_another_size():
    factory = net(lambda self, x: self.c(torch.sigmoid(self.a(x))), **LAST)
    result = exactly_cut(factory, DEAD, noise(2, 8, 8, 3), [noise(2, 12, 9, 3)])
    goes(result)
    assert result.parity.inputs[-1] == "random inputs [2, 9, 9, 3]"


def test_arguments_that_are_no_tensors_do_not_keep_the_others_fixed():
    factory = net(lambda self, x, p: self.c(torch.relu(self.a(x) + x.shape[2] * 0.1)), **MAPS)
    stays(exactly_cut(factory, DEAD, (X, None), [(noise(2, 3, 12, 9), None)]), "would depend on the size")


def test_numbers_given_as_arguments_are_no_constants():
    factory = net(lambda self, x, p: self.c(torch.relu(self.a(x) + p)), **MAPS)
    stays(exactly_cut(factory, DEAD, (X, 0.3), [(X, 0.7), (X, -2.0)]), "would depend on the size")


def written(self, x):
    y = torch.sigmoid(self.a(x))
    y.unbind(2)[1].mul_(0.5)
    return self.c(y)


def stepped(self, x):
    return self.c(torch.stack([2 * row for row in torch.sigmoid(self.a(x)).unbind(2)], 2))


@pytest.mark.parametrize("forward", [written, stepped])
def test_unbinding_positions_gives_other_numbers_of_tensors_at_other_sizes(forward):
    result = exactly_cut(net(forward, **MAPS), DEAD, X, [noise(2, 3, 12, 9)])
    stays(result, "would depend on the size")


def test_unbinding_positions_lets_zeros_go():
    silent = {**DEAD, "a.bias": [1, 4]}
    factory = net(lambda self, x: self.c(torch.stack([2 * row for row in torch.relu(self.a(x)).unbind(2)], 2)), **MAPS)
    assert kept(exactly_cut(factory, silent, X, [noise(2, 3, 12, 9)]), "a.weight") == ALIVE


def test_what_happens_to_batches_of_one_is_analysed():
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        return self.c(F.pad(y, (1, 1, 1, 1)) if y.shape[0] == 1 else y)

    stays(exactly_cut(net(forward, **MAPS), DEAD, X, [noise(1, 3, 8, 8)]), "needed at other input sizes")
