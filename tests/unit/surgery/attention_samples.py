"""Attention layers with random weights, their inputs and masks, and how to narrow one by hand."""

from __future__ import annotations

import copy

import torch
from torch import nn

from deploy_sparse.surgery.layers import NarrowAttention

N, L, S, E, H = 2, 5, 4, 12, 4


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def attention(seed=0, **options):
    """A dense layer with random weights and biases, in evaluation mode."""
    mha = nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, "batch_first": True, **options}).double().eval()
    rng = generator(seed)
    for parameter in mha.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64) / 3
    return mha


def inputs(mha, *, cross=False, batched=True, seed=1):
    """Query, key and value as ``mha`` takes them; one tensor three times for self-attention."""
    shapes = [(N, L, mha.embed_dim), (N, S, mha.kdim), (N, S, mha.vdim)]
    made = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    if not batched:
        made = [x[0] for x in made]
    elif not mha.batch_first:
        made = [x.transpose(0, 1).contiguous() for x in made]
    return tuple(made) if cross else (made[0],) * 3


def close(found, expected, tolerance=1e-12):
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert ((a - b).abs().max() / b.abs().max()).item() <= tolerance


def masks(kind, *, source, batched=True, floating=False, heads=H):
    """Keyword arguments of ``forward`` with masks of one kind that leave every query a key."""
    made = {}
    if "pad" in kind:
        made["key_padding_mask"] = (torch.arange(source) >= torch.tensor([[source], [source - 2]]))[
            : N if batched else 1
        ]
    if "2d" in kind:
        made["attn_mask"] = torch.arange(source) > torch.arange(L).unsqueeze(1)
    if "3d" in kind:
        made["attn_mask"] = torch.rand(N * heads if batched else heads, L, source, generator=generator(5)) < 0.4
        made["attn_mask"][..., 0] = False
    if not batched and "pad" in kind:
        made["key_padding_mask"] = torch.arange(source) >= source - 2
    if floating:
        made = {name: randn(*mask.shape).masked_fill(mask, float("-inf")) for name, mask in made.items()}
    return made


def narrowed(mha, heads, dims, stream=None):
    """The layer with these heads, these dims of every head and these stream channels, and nothing else changed."""
    size = mha.embed_dim // mha.num_heads
    rows = torch.tensor([head * size + dim for head in heads for dim in dims])
    layer = copy.deepcopy(NarrowAttention.of(mha))
    own = torch.arange(mha.embed_dim) if stream is None else torch.tensor(stream)

    def cut(owner, name, *axes):
        tensor = getattr(owner, name)
        if tensor is None:
            return
        value = tensor.detach()
        for axis, kept in enumerate(axes):
            value = value if kept is None else value.index_select(axis, kept)
        setattr(owner, name, nn.Parameter(value))

    packed = torch.cat([rows + third * mha.embed_dim for third in range(3)])
    cut(layer, "in_proj_weight", packed, own)
    cut(layer, "in_proj_bias", packed)
    cut(layer, "q_proj_weight", rows, own)
    for name in ("k_proj_weight", "v_proj_weight"):
        cut(layer, name, rows, None)
    cut(layer.out_proj, "weight", own, rows)
    cut(layer.out_proj, "bias", own)
    layer.num_heads, layer.parts = len(heads), [len(rows)] * 3
    return layer


def zeroed(mha, heads, dims):
    """The dense layer, all weights of other heads and dims zero."""
    size = mha.embed_dim // mha.num_heads
    gone = torch.ones(mha.num_heads, size, dtype=torch.bool)
    gone[torch.tensor(heads).unsqueeze(1), torch.tensor(dims)] = False
    gone = gone.flatten()
    layer = copy.deepcopy(mha)
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name)[gone.repeat(3)] = 0
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(layer, name) is not None:
                getattr(layer, name)[gone] = 0
        layer.out_proj.weight[:, gone] = 0
    return layer
