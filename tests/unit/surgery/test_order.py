"""Renumbered channels: the function stays, and blocks lie side by side where that is possible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import NETWORKS, OTHER, TRACED
from surgery_nets import randomised
from torch.utils import _pytree as pytree
from torchvision import models

from deploy_sparse.surgery import channel_groups
from deploy_sparse.surgery.order import Wish, orders, reordered


def random_wishes(module, generator):
    """For every weight two blocks of rows and, where there are as many, of columns."""
    found = []
    for name, weight in module.named_parameters():
        for dim in (0, 1) if weight.dim() > 1 else ():
            size = weight.shape[dim]
            if size > 1:
                order = torch.randperm(size, generator=generator).tolist()
                cut = int(torch.randint(1, size, (), generator=generator))
                blocks = (tuple(sorted(order[:cut])), tuple(sorted(order[cut:])))
                found.append(Wish(name, dim, blocks, int(torch.randint(1, 99, (), generator=generator))))
    return found


def outputs_of(module, x):
    with torch.no_grad():
        found = module(x)
    return pytree.tree_leaves(found)


def same_function(build, seed, sizes):
    module = randomised(build(), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    changes = orders(
        channel_groups(module, torch.randn(sizes[0], dtype=torch.float64)), random_wishes(module, generator)
    )
    other = build().eval()
    own = {name: x.detach() for name, x in (*module.named_parameters(), *module.named_buffers())}  # tied ones once
    other.load_state_dict(reordered(own, changes), strict=False)
    for shape in sizes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        for y, z in zip(outputs_of(module, x), outputs_of(other, x), strict=True):
            assert torch.allclose(y, z, rtol=1e-9, atol=1e-11 * float(y.abs().max()))
    return changes


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(NETWORKS, st.integers(0, 2**16))
def test_random_networks_compute_the_same_with_their_channels_renumbered(drawn, seed):
    same_function(drawn.build, seed, [TRACED] if drawn.tokens or drawn.head == "whole" else [TRACED, OTHER])


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet"]
)
def test_torchvision_networks_compute_the_same_with_their_channels_renumbered(name):
    def build():
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return models.get_model(name, weights=None, num_classes=5, **options).double()

    changes = same_function(build, 0, [(2, 3, 64, 64)])
    assert len({change.name for change in changes}) > 20
