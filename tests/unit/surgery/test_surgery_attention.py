"""Attention of any sizes equals torch.nn.MultiheadAttention in everything that it takes, or says why it cannot."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from attention_samples import E, H, L, N, S, attention, close, inputs, masks, randn
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery.layers import NarrowAttention, unsupported


@pytest.mark.parametrize("kind", ["none", "pad", "2d", "3d", "pad+2d", "pad+3d"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
def test_equals_torch_with_every_mask(layout, cross, kind):
    mha = attention(batch_first=layout == "batch_first")
    narrow = NarrowAttention.of(mha)
    x = inputs(mha, cross=cross, batched=layout != "unbatched")
    for floating, need, average in itertools.product([False, True], repeat=3):
        options = masks(kind, source=S if cross else L, batched=layout != "unbatched", floating=floating)
        options |= {"need_weights": need, "average_attn_weights": average}
        close(narrow(*x, **options), mha(*x, **options))
        with torch.no_grad():  # torch may take its fused kernel
            close(narrow(*x, **options), mha(*x, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"kdim": 6, "vdim": 10},
        {"bias": False},
        {"kdim": 6, "vdim": 10, "bias": False},
        {"num_heads": 3},
        {"num_heads": 1, "embed_dim": 5},
        {"num_heads": 5, "embed_dim": 5},
    ],
    ids=str,
)
def test_equals_torch_with_other_sizes(options):
    mha = attention(**options)
    narrow = NarrowAttention.of(mha)
    x = inputs(mha, cross=True)
    for need in (False, True):
        close(narrow(*x, need_weights=need), mha(*x, need_weights=need))


@pytest.mark.parametrize("shared", ["key is value", "query is key", "query is value"])
def test_equals_torch_where_two_of_three_are_one_tensor(shared):
    mha = attention()
    a, b = randn(N, L, E), randn(N, L, E, seed=2)
    x = {"key is value": (a, b, b), "query is key": (a, a, b), "query is value": (a, b, a)}[shared]
    close(NarrowAttention.of(mha)(*x), mha(*x))


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(need, padded):
    mha = attention()
    narrow = NarrowAttention.of(mha)
    x = inputs(mha)
    options = {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": need}
    if padded:
        options |= masks("pad", source=L)
    close(narrow(*x, **options), mha(*x, **options))
    with pytest.raises(SurgeryError, match="is_causal without attn_mask"):
        narrow(*x, is_causal=True)


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_training_with_dropout_and_gradients(cross, need):
    mha = attention(dropout=0.4).train()
    twin = copy.deepcopy(mha)
    narrow = NarrowAttention.of(twin)
    assert narrow.training
    x = inputs(mha, cross=cross)
    torch.manual_seed(3)
    expected = mha(*x, need_weights=need)
    torch.manual_seed(3)
    found = narrow(*x, need_weights=need)
    close(found, expected)
    assert not torch.equal(narrow(*x)[0], found[0])  # other weights dropped
    target = randn(*expected[0].shape, seed=9)
    (expected[0] * target).sum().backward()
    (found[0] * target).sum().backward()
    for name, parameter in narrow.named_parameters():
        theirs = mha.get_parameter(name).grad
        assert ((parameter.grad - theirs).abs().max() / theirs.abs().max()).item() <= 1e-12
    narrow.eval()
    assert torch.equal(narrow(*x)[0], narrow(*x)[0])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_shares_parameters_under_the_same_names(options):
    mha = attention(**options)
    mha.out_proj.weight.requires_grad_(False)
    narrow = NarrowAttention.of(mha)
    assert list(narrow.state_dict()) == list(mha.state_dict())
    theirs = dict(mha.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in narrow.named_parameters())
    assert not narrow.out_proj.weight.requires_grad
    other = attention(seed=4, **options)
    narrow.load_state_dict(other.state_dict())
    x = inputs(mha, cross=True)
    close(narrow(*x), other(*x))
    other.load_state_dict(NarrowAttention.of(attention(seed=6, **options)).state_dict())
    close(other(*x), attention(seed=6, **options)(*x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("need", [False, True])
def test_any_float_dtype(dtype, need):
    mha = attention().to(dtype)
    x = (randn(N, L, E).to(dtype),) * 3
    options = masks("pad+2d", source=L) | {"need_weights": need}
    found, expected = NarrowAttention.of(mha)(*x, **options), mha(*x, **options)
    assert found[0].dtype == dtype
    close(
        [None if y is None else y.double() for y in found],
        [None if y is None else y.double() for y in expected],
        16 * torch.finfo(dtype).eps,
    )


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def pruned(name):
    from torch.nn.utils import prune

    mha = attention()
    prune.l1_unstructured(mha.out_proj if name == "weight" else mha, name, amount=0.5)
    return mha


def other_projection():
    mha = attention()
    mha.out_proj = nn.Sequential(mha.out_proj)
    return mha


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: attention(add_bias_kv=True), "add_bias_kv appends a learned position to the keys and values"),
        (lambda: attention(add_zero_attn=True), "add_zero_attn appends a position of zeros to the keys and values"),
        (lambda: Own(E, H), "Own has a forward of its own"),
        (other_projection, "its out_proj is of the type Sequential"),
        (lambda: pruned("in_proj_weight"), "its in_proj_weight is computed, not a parameter"),
        (lambda: pruned("weight"), "its out_proj.weight is computed, not a parameter"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(make, reason):
    mha = make()
    assert unsupported(mha) == reason
    with pytest.raises(SurgeryError) as caught:
        NarrowAttention.of(mha)
    assert f"attention that cannot be narrowed: {reason}\n" in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_plain_layers_can_be_replaced(options):
    assert unsupported(attention(**options)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.zeros(L, L + 1)}, "attn_mask of shape [5, 6]\n  expected: shape [5, 5]"),
        ({"attn_mask": torch.zeros(1, 1, L, L)}, "attn_mask of shape [1, 1, 5, 5]\n  expected: shape [5, 5]"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, "attn_mask of dtype torch.int64"),
        ({"key_padding_mask": torch.zeros(L, N)}, "key_padding_mask of shape [5, 2]\n  expected: shape [2, 5]"),
    ],
)
def test_masks_of_other_shapes_and_types_are_refused(options, message):
    mha = attention()
    with pytest.raises(SurgeryError) as caught:
        NarrowAttention.of(mha)(*inputs(mha), **options)
    assert message in str(caught.value)
