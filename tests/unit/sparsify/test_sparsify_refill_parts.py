"""Refill by group where layers write different parts of one residual stream."""

import pytest
import torch

from deploy_sparse import zoo
from deploy_sparse.sparsify.imp import dense_masks
from deploy_sparse.sparsify.refill import refill
from deploy_sparse.surgery.graph import channel_groups


@pytest.mark.parametrize("score", ["l1", "random"])
def test_by_group_every_part_of_a_stream_has_its_own_budget(score):
    """ResNet-20 with option A: channels 0-15 have ten writers, 16-31 six, 32-63 three."""
    model = zoo.build("resnet20")
    groups = channel_groups(model, (torch.zeros(2, 3, 32, 32),))
    weights, dense = dict(model.state_dict()), dense_masks(model)
    assert all(m.all() for m in refill(dense, weights, groups, coupling="group").values())
    generator = torch.Generator().manual_seed(0)
    lot = {name: torch.rand(len(mask), generator=generator) for name, mask in dense.items()}
    found = refill(
        dense, weights, groups, coupling="group", shares=dict.fromkeys(dense, 0.5), scores=lot if score == "random" else None
    )  # fmt: skip
    kept = found["stages.2.2.conv2.weight"].flatten(1).any(dim=1)
    assert [int(part.sum()) for part in kept.split([16, 16, 32])] == [8, 8, 16]
    assert not kept[:8].all()
    for stage, width in ((0, 16), (1, 32)):  # what reads the stream sees the same channels
        assert torch.equal(found[f"stages.{stage}.0.conv2.weight"].flatten(1).any(dim=1), kept[:width])
