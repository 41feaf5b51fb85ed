"""Surgery on random networks: the compact network is the masked network, and nothing dead is left behind."""

from __future__ import annotations

import copy

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from surgery_nets import ACTS, SHAPE, Block, RandomNet, masked, outputs, randomised, rows_masked, silent_masks, ticket

from deploy_sparse.surgery import channel_groups, compact

KINDS = ["chain", "identity", "projection", "concat", "depthwise", "max", "avg", "avgpad"]

blocks = st.builds(
    Block,
    kind=st.sampled_from(KINDS),
    width=st.integers(2, 6),
    kernel=st.sampled_from([1, 3]),
    padded=st.booleans(),
    bias=st.booleans(),
    norm=st.booleans(),
    act=st.sampled_from(sorted(ACTS)),
)
drawn_networks = st.tuples(st.lists(blocks, min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
few = settings(
    phases=(Phase.explicit, Phase.generate),  # a failing network is small already; shrinking traces for minutes
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def network(drawn, double):
    """A factory and a randomised dense network."""
    steps, flatten, seed = drawn

    def factory():
        return RandomNet(steps, flatten).double() if double else RandomNet(steps, flatten)

    return factory, randomised(factory(), seed)


def equal(dense: torch.nn.Module, small: torch.nn.Module) -> bool:
    """Own comparison in float64, independent of ``verify``; folded float32 biases are rounded."""
    limit = 1e-10 if next(small.parameters()).dtype == torch.float64 else 1e-6
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    reference, output = (outputs(copy.deepcopy(m).double(), x) for m in (dense, small))
    return bool((reference - output).abs().max() <= limit * reference.abs().max())


@few
@given(drawn_networks, st.booleans(), st.data())
def test_silent_masks_remove_exactly_the_masked_channels(drawn, double, data):
    factory, dense = network(drawn, double)
    groups = channel_groups(dense, torch.zeros(2, *SHAPE, dtype=next(dense.parameters()).dtype))
    dropped = {
        g.name: data.draw(st.sets(st.integers(0, g.size - 1), max_size=g.size - 1)) if g.pinned is None else set()
        for g in groups
    }
    made = ticket(dense, silent_masks(dense, groups, lambda g: sorted(dropped[g.name])))
    result = compact(made, factory)
    for group in result.plan.groups:
        assert set(group.kept) == set(range(group.size)) - dropped[group.name], group
    assert equal(masked(factory, made), result.module)


@few
@given(drawn_networks, st.booleans(), st.data())
def test_rows_only_masks_with_live_norms_stay_exact(drawn, double, data):
    factory, dense = network(drawn, double)
    rows = {}
    for name, tensor in dense.state_dict().items():
        if tensor.dim() > 1:
            size = tensor.shape[0]
            rows[name] = sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1)))
    made = ticket(dense, rows_masked(dense, rows))
    result = compact(made, factory)
    assert equal(masked(factory, made), result.module)
    assert sum(p.numel() for p in result.module.parameters()) == result.plan.cost_after.parameters
    assert all(stay.reason for group in result.plan.groups for stay in group.stays)


@few
@given(drawn_networks, st.booleans(), st.sampled_from([0.05, 0.3, 0.8]), st.integers(0, 99))
def test_scattered_masks_stay_exact(drawn, double, density, seed):
    factory, dense = network(drawn, double)
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(t.shape, generator=generator) < density for n, t in dense.named_parameters()}
    masks = {n: m if m.dim() < 2 or m.any() else ~m for n, m in masks.items()}
    made = ticket(dense, masks)
    assert equal(masked(factory, made), compact(made, factory).module)
