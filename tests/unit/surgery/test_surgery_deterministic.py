"""Deterministic algorithms, which trainings ask for, are no business of the trace."""

from __future__ import annotations

import torch
from small_networks import conv, exactly_cut, kept, net, noise
from torch.nn import functional as F


def test_interpolation_is_cut_though_deterministic_algorithms_are_asked_for():
    """With them PyTorch takes it apart into look-ups of positions, which surgery does not follow."""

    def larger(self, x):
        return self.c(F.interpolate(torch.relu(self.a(x)), scale_factor=2, mode="bilinear"))

    factory = net(larger, a=conv(3, 6), c=conv(6, 4))
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = exactly_cut(factory, {"a.weight": [1, 4], "a.bias": [1, 4]}, noise(2, 3, 8, 8), [noise(2, 3, 12, 10)])
        assert torch.get_deterministic_debug_mode() == 1, "as it was asked for"
    finally:
        torch.set_deterministic_debug_mode(before)
    assert result.plan.unknown == ()
    assert kept(result, "a.weight") == (0, 2, 3, 5)
