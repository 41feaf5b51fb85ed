"""Shortcuts: where a block keeps the shape, the identity; elsewhere option A or B."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.zoo.shortcut import PadShortcut, make_shortcut


@settings(max_examples=30, deadline=None)
@given(
    c_in=st.integers(1, 5), more=st.integers(0, 5), stride=st.integers(1, 3), height=st.integers(1, 7), width=st.integers(1, 7)
)  # fmt: skip
def test_pad_is_subsampling_and_zero_channels(c_in, more, stride, height, width):
    x = torch.randn(2, c_in, height, width)
    expected = nn.functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, more))
    assert torch.equal(PadShortcut(c_in, c_in + more, stride)(x), expected)


def test_pad_has_no_parameters_and_keeps_the_inputs_precision():
    shortcut = PadShortcut(2, 4, 2)
    assert not list(shortcut.parameters())
    assert shortcut(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["conv", "pad"])
def test_the_identity_where_the_shape_stays(kind):
    assert isinstance(make_shortcut(kind, 4, 4, 1), nn.Identity)
    for c_out, stride in ((8, 1), (4, 2), (8, 2)):
        found = make_shortcut(kind, 4, c_out, stride)
        assert found(torch.zeros(2, 4, 8, 8)).shape == (2, c_out, 8 // stride, 8 // stride)
        assert isinstance(found, PadShortcut) == (kind == "pad")


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="'conv' and 'pad' are known"):
        make_shortcut("identity", 4, 4, 1)
    with pytest.raises(ValueError, match="from 8 to 4 channels"):
        make_shortcut("pad", 8, 4, 2)
