"""Small parts on their own: channels that are joined, and results that are told without PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.surgery._plain_results import without_work
from deploy_sparse.surgery._values import UNTRACKED, Atoms

JOINS = st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=30)


@settings(max_examples=60, deadline=None)
@given(JOINS, JOINS, st.booleans())
def test_joined_channels_have_the_smallest_one_as_root(first, second, settled):
    atoms, together = Atoms(), [{n} for n in range(40)]
    atoms.fresh(40)
    for pairs in (first, second):
        for a, b in pairs:
            atoms.unify(torch.tensor([a]), torch.tensor([b]), "")
            joined = next(s for s in together if a in s) | next(s for s in together if b in s)
            together = [s for s in together if not s & joined] + [joined]
        if settled:
            atoms.settle()
        every = torch.tensor([UNTRACKED, *range(40)])
        roots = [min(next(s for s in together if n in s)) for n in range(40)]
        assert atoms.roots(every).tolist() == [UNTRACKED, *roots]


def test_more_channels_than_there_was_room_for_leave_the_others_as_they_were():
    atoms = Atoms()
    assert atoms.roots(torch.tensor([UNTRACKED])).tolist() == [UNTRACKED]
    atoms.unify(atoms.fresh(3)[:1], torch.tensor([2]), "")
    atoms.settle()
    more = atoms.fresh(5000)
    assert atoms.roots(torch.tensor([2, 1, UNTRACKED, 3, 5002])).tolist() == [0, 1, UNTRACKED, 3, 5002]
    assert torch.equal(atoms.roots(more), more)


def test_joining_what_is_joined_changes_no_root():
    atoms = Atoms()
    pair = atoms.fresh(2)
    atoms.unify(pair[:1], pair[1:], "")
    before = atoms.joins
    atoms.unify(pair[1:], pair[:1], "")
    assert atoms.joins == before > 0


def meta(*shape):
    return torch.empty(shape, device="meta")


def convolution(groups, inner, outer, image, kernel, stride, padding, dilation, biased):
    bias = meta(groups * outer) if biased else None
    x, weight = meta(2, groups * inner, *image), meta(groups * outer, inner, *kernel)
    return x, weight, bias, [stride] * 2, list(padding), [dilation] * 2, groups


SMALL = st.integers(1, 3)
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))
KERNELS = st.tuples(SMALL, SMALL)
PADS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=150, deadline=None)
@given(st.builds(convolution, SMALL, SMALL, SMALL, SIDES, KERNELS, SMALL, PADS, st.integers(1, 2), st.booleans()))
def test_convolutions_are_told_as_pytorch_tells_them(arguments):
    told = without_work("conv2d", arguments, {})
    try:
        real = torch.ops.aten.conv2d.default(*arguments)
    except RuntimeError:
        assert told is None
    else:
        assert (told.shape, told.stride(), told.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv2d", (meta(2, 3, 8, 8), meta(4, 2, 3, 3))),  # channels that do not fit
        ("conv2d", (meta(2, 3, 8, 8), meta(4, 3, 3, 3), meta(3))),
        ("conv2d", (meta(2, 3, 2, 2), meta(4, 3, 3, 3))),  # a kernel larger than the image
        ("conv2d", (meta(2, 3, 8, 8), meta(4, 3, 3, 3).double())),
        ("conv2d", (meta(2, 3, 8, 8), meta(4, 3, 3, 3), None, [1, 1], "same")),
        ("conv2d", (meta(3, 8, 8), meta(4, 3, 3, 3))),
        ("conv2d", (meta(2, 3, 8, 8).to(memory_format=torch.channels_last), meta(4, 3, 3, 3))),
        ("batch_norm", (meta(2, 3, 8, 8), meta(4), meta(4), meta(4), meta(4), False, 0.1, 1e-5, True)),
        ("adaptive_avg_pool2d", (meta(3, 8, 8), [2, 2])),
        ("adaptive_avg_pool2d", (meta(2, 3, 0, 8), [2, 2])),
        ("adaptive_avg_pool2d", (meta(2, 3, 8, 8), [2])),
        ("layer_norm", (meta(2, 4, 6), [6], meta(5), None)),
        ("add", (meta(2, 3), meta(3))),
        ("add", (meta(2, 3), meta(2, 3).double())),
        ("linear", (meta(2, 3), meta(4, 3))),
    ],
)
def test_what_is_not_plain_is_left_to_pytorch(name, arguments):
    assert without_work(name, arguments, {}) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (0, 2), (9, 9)])
def test_adaptive_pooling_is_told_as_pytorch_tells_it(size):
    x = meta(2, 3, 7, 6)
    told = without_work("adaptive_avg_pool2d", (x, list(size)), {})
    real = torch.nn.functional.adaptive_avg_pool2d(x, size)
    assert (told.shape, told.stride()) == (real.shape, real.stride())
