"""Attention narrowed by slicing its weights equals the dense layer with those weights zeroed."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_samples import E, H, L, N, S, attention, close, inputs, masks, narrowed, randn, zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery.layers import NarrowAttention


def some(size):
    return st.sets(st.integers(0, size - 1), min_size=1, max_size=size).map(sorted)


@settings(max_examples=60, deadline=None)
@given(
    heads=some(H),
    dims=some(3),
    options=st.sampled_from([{}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"batch_first": False}]),
    need=st.booleans(),
    mask=st.sampled_from(["none", "pad", "pad+2d"]),
    seed=st.integers(0, 1000),
)
def test_heads_and_dims_removed(heads, dims, options, need, mask, seed):
    mha = attention(seed=seed, **options)
    dense, small = zeroed(mha, heads, dims), narrowed(mha, heads, dims)
    assert (small.num_heads, small.head_dim, small.embed_dim) == (len(heads), len(dims), E)
    for cross in [True] if "kdim" in options else [False, True]:
        x = inputs(mha, cross=cross)
        arguments = masks(mask, source=S if cross else L) | {"need_weights": need, "average_attn_weights": False}
        found, expected = small(*x, **arguments), dense(*x, **arguments)
        if need:  # weights of the heads that are left
            assert expected[1].shape[1] == H
            expected = (expected[0], expected[1][:, heads])
        close(found, expected)


def test_a_mask_per_head_fits_the_heads_that_are_left():
    mha, heads = attention(), [0, 2]
    dense, small = zeroed(mha, heads, [0, 1, 2]), narrowed(mha, heads, [0, 1, 2])
    mask = masks("3d", source=L)["attn_mask"]
    fitting = mask.view(N, H, L, L)[:, heads].flatten(0, 1)
    x = inputs(mha)
    for need in (False, True):
        found = small(*x, attn_mask=fitting, need_weights=need)[0]
        close((found, None), (dense(*x, attn_mask=mask, need_weights=need)[0], None))
    with pytest.raises(SurgeryError, match=r"attn_mask of shape \[8, 5, 5\]\n  expected: shape \[4, 5, 5\]"):
        small(*x, attn_mask=mask)


@settings(max_examples=30, deadline=None)
@given(heads=some(H), dims=some(3), stream=some(E), seed=st.integers(0, 1000))
def test_stream_narrowed(heads, dims, stream, seed):
    dense = zeroed(attention(seed=seed), heads, dims)
    small = narrowed(dense, heads, dims, stream)
    x = torch.zeros(N, L, E, dtype=torch.float64)
    x[..., stream] = randn(N, L, len(stream), seed=seed)
    y = x[..., stream]
    found, weights = small(y, y, y)
    expected = dense(x, x, x)
    assert small.embed_dim == len(stream)
    close((found, None), (expected[0][..., stream], None))
    assert weights.shape == (N, L, L)


def encoder_layer(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dropout=0.3, **options).double().eval()
    layer.self_attn.load_state_dict(attention(seed=3).state_dict())
    return layer


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("norm_first", [False, True])
def test_in_torchs_encoder_layer(mode, norm_first):
    layer = encoder_layer(norm_first=norm_first)
    x = randn(N, L, E)
    options = {"src_key_padding_mask": masks("pad", source=L)["key_padding_mask"]}
    causal = {"src_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True}
    heads, dims = [1, 3], [0, 2]  # an even number of heads: torch's fused kernel takes only those
    with mode():
        expected, guided = layer(x, **options), layer(x, **causal)
        whole, original = copy.deepcopy(layer), layer.self_attn
        whole.self_attn = NarrowAttention.of(original)
        close((whole(x, **options), None), (expected, None))
        close((whole(x, **causal), None), (guided, None))
        layer.self_attn = zeroed(original, heads, dims)
        whole.self_attn = narrowed(original, heads, dims)
        close((whole(x, **options), None), (layer(x, **options), None))
        close((whole(x), None), (layer(x), None))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_torchs_encoder_with_sequences_of_several_lengths(mode):
    dense = nn.TransformerEncoder(encoder_layer(), 2).eval()
    small = copy.deepcopy(dense)
    for layer, twin in zip(dense.layers, small.layers, strict=True):
        twin.self_attn = narrowed(layer.self_attn, [0, 1], [1, 2])
        layer.self_attn = zeroed(layer.self_attn, [0, 1], [1, 2])
    x, mask = randn(N, L, E), masks("pad", source=L)["key_padding_mask"]
    with mode():
        expected = dense(x, src_key_padding_mask=mask)
        assert not expected[1, L - 2 :].any()  # torch took nested tensors: padded positions are zero
        close((small(x, src_key_padding_mask=mask), None), (expected, None))
        nested = torch.nested.as_nested_tensor([x[0], x[1, :2]])
        other = torch.nested.as_nested_tensor([x[0], x[1, :2]])
        with pytest.raises(SurgeryError, match="nested tensors in attention between different sequences"):
            small.layers[0].self_attn(nested, other, other)


def test_in_torchs_decoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 16, batch_first=True).double().eval()
    twin = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        mha = attention(seed=len(name))
        setattr(layer, name, zeroed(mha, [0, 3], [1]))
        setattr(twin, name, narrowed(mha, [0, 3], [1]))
    x, memory = randn(N, L, E), randn(N, S, E, seed=1)
    options = {"tgt_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "tgt_is_causal": True}
    close((twin(x, memory, **options), None), (layer(x, memory, **options), None))


class Block(nn.Module):
    def __init__(self, attention, need_weights):
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return y if weights is None else y + weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("need", [False, True])
def test_on_meta_and_through_torch_export_at_any_batch_size(need):
    block = Block(narrowed(attention(), [0, 2], [0, 1]), need).eval()
    x = randn(N, L, E)
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == x.shape
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    more = torch.cat([x, x.flip(0), 2 * x])
    close((program(more), None), (block(more), None))


def test_through_onnx_at_any_batch_size(tmp_path):
    blocks = [Block(narrowed(attention(), [0, 2], [0, 1]), need) for need in (False, True)]
    found = export_onnx(nn.Sequential(*blocks).float(), randn(N, L, E).float(), tmp_path / "attention.onnx")
    assert found.parity.max_rel <= 1e-5


def test_repr_tells_the_sizes():
    assert repr(narrowed(attention(), [0, 2], [0, 1])).splitlines()[:2] == [
        "NarrowAttention(",
        "  width=12, num_heads=2, head_dim=2, scale=0.57735",
    ]
