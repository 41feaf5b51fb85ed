"""Packing beside code that looks at its layers, shortcuts that are spread, and tensors without a batch axis."""

from __future__ import annotations

import random

import pytest
import torch
from pack_samples import block_mask, exactly_packed, random_blocks, ticket_of
from small_networks import linear, net, noise
from torch import nn

from deploy_sparse.surgery.pack import layer_forms


@pytest.mark.parametrize("kind", ["equal", "free"])
def test_code_may_ask_a_packed_layer_for_the_type_of_its_weight(kind):
    factory = net(
        lambda self, x: self.b(torch.relu(self.a(x.to(self.a.weight.dtype)))), a=linear(32, 32), b=linear(32, 32)
    )
    masks = {"a.weight": random_blocks(factory().a.weight, kind, random.Random(0))}
    result = exactly_packed(factory, ticket_of(factory(), masks), noise(2, 32))
    assert result.plan.shape.packed == {"a"}
    if kind == "free":
        assert result.plan.shape.packs[0].packing.form == "free"
        assert torch.equal(result.module.a.weight, result.module.a.unpack())
        assert not hasattr(result.module.a, "wait")


def test_layers_spread_over_a_shortcut_are_not_told_as_norms():
    """Their columns are renumbered for the packed layer before them, and still they look up by themselves."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Conv2d(3, 32, 3, padding=1), *(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))]
            self.stem, self.a, self.b, self.c = layers

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.c(x + self.b(torch.relu(self.a(x))))

    def factory():
        return Branch().double()

    masks = {
        "a.weight": block_mask(factory().a.weight, [(range(0, 32, 2), range(20)), (range(1, 32, 2), range(12, 32))]),
        "b.weight": block_mask(factory().b.weight, [(range(16), range(32))]),
    }
    made = ticket_of(factory(), masks)
    made.weights["b.bias"][16:] = 0
    result = exactly_packed(factory, made, noise(2, 3, 6, 6), shortcuts="spread")
    assert {entry.module for entry in result.plan.shape.spreads} == {"b"}
    assert any((order.name, order.dim) == ("b.weight", 1) for order in result.plan.shape.orders)
    assert [line for line in result.plan.notes() if "of blocks:" in line] == [
        "1 layer of blocks: 1 equal; 1 looks channels up before (a)"
    ]


def test_layers_that_read_something_without_a_batch_axis_stay_dense():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(32))
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Conv2d(32, 32, 1)

        def forward(self, x):  # [N, L, 32]
            return self.c((self.a(x) + self.b(self.query)).permute(2, 0, 1)).permute(1, 2, 0)

    module, x = Unbatched().double(), noise(2, 5, 32)
    masks = {
        f"{path}.weight": random_blocks(module.get_submodule(path).weight, "equal", random.Random(0)) for path in "abc"
    }
    made = ticket_of(module, masks)
    assert exactly_packed(lambda: Unbatched().double(), made, x).plan.shape.packed == {"a"}
    module.load_state_dict(made.masked_weights())
    (form,) = layer_forms(module, made.masks, (), (x,))
    assert form.dense(torch.randn(2, *form.input_shape, dtype=torch.float64)).shape == (2, 5, 32)
