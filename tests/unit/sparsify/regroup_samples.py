"""Layers to regroup, and regroup on one of them."""

import torch

from deploy_sparse.sparsify.regroup import RegroupRule, regroup


def layer(shape, density, seed, groups=1):
    """Weights of rows that come in ``groups`` kinds, each kind large in columns of its own, and their magnitude mask."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.rand(groups, *shape[1:], generator=generator) ** 3 if groups > 1 else torch.ones(1, *shape[1:])
    weight = torch.randn(*shape, generator=generator) * kinds[torch.randperm(shape[0], generator=generator) % groups]
    kept = max(1, round(density * weight.numel()))
    return weight, weight.abs() >= weight.abs().flatten().topk(kept).values[-1]


def one(weight, mask, **rule):
    found = regroup({"w": mask}, {"w": weight}, rule=RegroupRule(**rule))
    return found.masks["w"], found.layers[0]
