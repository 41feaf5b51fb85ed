"""Rounding of widths: of every tensor, also where a group of channels spans tensors of unlike widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_nets import masked, outputs, randomised, rows_masked, ticket
from torch import nn

from deploy_sparse.surgery import compact
from deploy_sparse.zoo.shortcut import PadShortcut

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STAGES = (8, 16, 32)


class Padded(nn.Module):
    """Stages of rising width; the shortcut into the next one is padded with channels of zeros."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, STAGES[0], 3, padding=1, bias=False)
        reads = (STAGES[0], *STAGES)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in zip(reads, STAGES, strict=False)
        )
        self.pads = nn.ModuleList(
            PadShortcut(i, o, 1) if i < o else nn.Identity() for i, o in zip(reads, STAGES, strict=False)
        )
        self.fc = nn.Linear(STAGES[-1], 4)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for conv, pad in zip(self.convs, self.pads, strict=True):
            x = torch.relu(conv(x) + pad(x))
        return self.fc(x.mean((2, 3)))


class Shuffled(nn.Module):
    """Two layers read halves of a tensor whose channels a third one reads the other way round: the sets overlap."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1, bias=False)
        self.first, self.middle = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        return self.first(x[:, :8]) + self.middle(x[:, 4:12])


def cut(factory, rows, multiple):
    made = ticket(randomised(factory()), rows_masked(factory(), rows))
    found = compact(made, factory, X, multiple=multiple)
    expected = outputs(masked(factory, made), X)
    assert float((outputs(found.module, X) - expected).abs().max() / expected.abs().max()) <= 1e-12
    return found


def dead_from(starts):
    """Rows of each layer that writes the stream: the last ones of what each stage adds."""
    gone = [list(range(start, width)) for start, width in zip(starts, STAGES, strict=True)]
    layers = ("stem.weight", "convs.0.weight", "convs.1.weight", "convs.2.weight")
    early = gone[0]
    return dict(
        zip(layers, (early, early, early + gone[1], early + [c for c in gone[1] if c >= 8] + gone[2]), strict=True)
    )


@given(
    st.tuples(st.integers(1, 8), st.integers(9, 16), st.integers(17, 32)),
    st.sampled_from([2, 4, 8]),
)
@settings(max_examples=15, deadline=None)
def test_each_stage_of_a_padded_stream_has_a_rounded_width(starts, multiple):
    """The whole stream's width alone would be rounded with a channel of its narrowest part, which fits no stage."""
    found = cut(Padded, dead_from(starts), multiple).module
    for layer in (found.stem, *found.convs):
        assert layer.out_channels % multiple == 0
        assert layer.in_channels in (3, layer.in_channels // multiple * multiple)


def test_no_more_than_the_next_multiple_is_given_back():
    found = cut(Padded, dead_from((3, 13, 29)), 4).module
    # alive: 3; 3 and 5 more; 3, 5 and 13 more
    assert [layer.out_channels for layer in found.convs] == [4, 12, 28]


def test_widths_that_cannot_all_be_rounded_leave_the_whole_rounded():
    found = cut(Shuffled, {"stem.weight": [0, 5, 9, 13, 14]}, 4).module
    assert found.stem.out_channels == 12


@pytest.mark.parametrize("multiple", [1, 4])
def test_rounding_is_said(multiple):
    plan = cut(Padded, dead_from((3, 13, 29)), multiple).plan
    kinds = {stay.kind for group in plan.groups for stay in group.stays}
    assert ("aligned" in kinds) == (multiple == 4)
