"""What a network reads and its state dict lacks comes back from disk too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deploy_sparse.surgery import compact, load_compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


class Viewing(nn.Module):
    """Reads a part of a weight through a plain attribute, and a buffer that is not persistent."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 8)
        self.rows = self.b.weight.data[:4]
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y) * self.scale, nn.functional.linear(y, self.rows)


@pytest.mark.parametrize("gone", [(), (0, 5, 6)])
def test_views_of_weights_and_buffers_that_are_not_persistent_come_back(tmp_path, gone):
    torch.manual_seed(0)
    network, x = Viewing(), torch.randn(3, 6)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in ("a.weight", "a.bias")}
    for mask in masks.values():
        mask[list(gone)] = False
    ticket = Ticket(weights, masks, ModelRef("user factory", {}), Provenance("test"))
    made = compact(ticket, lambda: network, x)
    loaded = load_compact(made.save(tmp_path / "compact", program=False), Viewing)
    for y, z in zip(made.module(x), loaded(x), strict=True):
        assert torch.equal(y, z)
