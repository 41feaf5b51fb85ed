"""The fast forms give what torch's own operations give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.flags import all_along, any_along, masked, nonzero

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


def drawn(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-2, 3, shape, generator=generator).float()
    return -numbers if seed % 2 else numbers  # has negative zeros


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 999), st.data())
def test_flags_agree_with_torch(shape, seed, data):
    tensor = drawn(shape, seed)
    flags = tensor != 0
    assert torch.equal(nonzero(tensor), flags)
    assert torch.equal(any_along(flags), flags.any())
    dims = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)))
    assert torch.equal(any_along(flags, *dims), flags.any(dim=dims))
    assert torch.equal(all_along(flags, dims[0]), flags.all(dim=dims[0]))
    turned = flags.transpose(0, -1)
    assert torch.equal(any_along(turned, 0), turned.any(dim=0))


def test_not_a_number_is_not_zero_and_minus_zero_is():
    assert nonzero(torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.float8_e4m3fn, torch.complex64],
)
def test_masked_agrees_with_where_to_the_bit(dtype):
    weight = drawn((6, 5), 3).to(dtype)
    mask = drawn((6, 5), 4) != 0
    made = masked(weight, mask)
    assert made.dtype == dtype
    assert made.tolist() == torch.where(mask, weight, torch.zeros((), dtype=dtype)).tolist()
    if dtype.is_floating_point and dtype != torch.float8_e4m3fn:
        assert not torch.signbit(made[~mask]).any()


def test_masked_keeps_the_layout_of_the_weight():
    weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 6, 3, 3) > 0.5
    made = masked(weight, mask)
    assert torch.equal(made, weight * mask)
    assert made.is_contiguous(memory_format=torch.channels_last)
