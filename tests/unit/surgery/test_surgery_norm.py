"""Norms over channels some of which are gone keep the dense network's statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery.layers import KeptStatisticsNorm

EPS = 1e-3


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Case:
    """A dense norm with weights, an input of which some channels are constants, and the narrow norm without them."""

    def __init__(self, kind, *, sizes=(3, 8, 4), dim=1, groups=1, kept=None, seed=0, dtype=torch.float64, **options):
        self.kind, self.dim, self.groups = kind, dim, groups
        self.eps = options.pop("eps", EPS)
        rng = generator(seed)
        channels = sizes[dim]
        dense = channels // groups
        kept = dense // 2 if kept is None else kept
        self.positions = torch.cat(
            [g * dense + torch.randperm(dense, generator=rng)[:kept].sort().values for g in range(groups)]
        )
        gone = torch.ones(channels, dtype=torch.bool)
        gone[self.positions] = False
        constants = torch.randn(channels, generator=rng, dtype=torch.float64) * 2 + 1
        shape = [1] * len(sizes)
        shape[dim] = channels
        x = torch.randn(sizes, generator=rng, dtype=torch.float64) * 3 - 1
        self.x = torch.where(gone.view(shape), constants.view(shape), x).to(dtype)
        self.narrow = KeptStatisticsNorm(
            kind, dim=dim, dense=dense, kept=kept, groups=groups, eps=self.eps, dtype=dtype, **options
        )
        self.affine = {
            name: torch.randn(channels, generator=rng, dtype=torch.float64).to(dtype)
            for name, _ in self.narrow.named_parameters()
        }
        for name, value in self.affine.items():
            getattr(self.narrow, name).data.copy_(value[self.positions])
        if kept < dense:
            held = constants[gone].view(groups, -1)
            self.narrow.gone_mean.copy_(held.mean(1))
            self.narrow.gone_var.copy_(held.var(1, correction=0))

    def small(self, x):
        return x.index_select(self.dim, self.positions)

    def dense(self, x):
        """torch's own norm of the whole input."""
        weight, bias = self.affine.get("weight"), self.affine.get("bias")
        if self.kind == "group":
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        x = x.movedim(self.dim, -1)
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).movedim(-1, self.dim)
        y = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return (y if bias is None else y + bias).movedim(-1, self.dim)


def relative(a, b, of=None):
    """Largest difference, relative to the largest entry of ``of`` (``b`` where it is not given)."""
    return ((a - b).abs().max() / (b if of is None else of).abs().max()).item()


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["layer", "rms", "group"]))
    groups = draw(st.integers(1, 3)) if kind == "group" else 1
    dense = draw(st.integers(2, 9))
    kept = draw(st.integers(1, dense))
    rank = draw(st.integers(1 if kind != "group" else 2, 5))
    dim = 1 if kind == "group" else draw(st.integers(-rank, rank - 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    sizes[dim] = groups * dense
    return Case(
        kind,
        sizes=tuple(sizes),
        dim=dim,
        groups=groups,
        kept=kept,
        seed=draw(st.integers(0, 10**6)),
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_dense_norm_with_the_constants_put_back(case):
    whole = case.dense(case.x)
    expected = case.small(whole)
    found = case.narrow(case.small(case.x))
    assert found.shape == expected.shape
    assert relative(found, expected, of=whole) <= 1e-12


KINDS = [
    pytest.param({"kind": "layer", "sizes": (2, 5, 12), "dim": -1}, id="layer-last"),
    pytest.param({"kind": "layer", "sizes": (2, 12, 3, 3), "dim": 1}, id="layer-first"),
    pytest.param({"kind": "rms", "sizes": (2, 5, 12), "dim": -1, "bias": False}, id="rms"),
    pytest.param({"kind": "group", "sizes": (2, 12, 3, 3), "dim": 1, "groups": 3}, id="group"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_constants_matter(kind):
    case = Case(**kind)
    expected = case.small(case.dense(case.x))
    case.narrow.gone_mean.zero_()
    case.narrow.gone_var.zero_()
    assert relative(case.narrow(case.small(case.x)), expected) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_dense_norms(kind):
    case = Case(**kind)
    whole, part = case.x.clone().requires_grad_(), case.small(case.x).requires_grad_()
    for value in case.affine.values():
        value.requires_grad_()
    expected = case.small(case.dense(whole))
    target = torch.randn(expected.shape, generator=generator(7), dtype=torch.float64)
    (expected * target).sum().backward()
    case.narrow.train()
    (case.narrow(part) * target).sum().backward()
    assert relative(part.grad, case.small(whole.grad)) <= 1e-12
    for name, value in case.affine.items():
        assert relative(getattr(case.narrow, name).grad, value.grad[case.positions]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_any_float_dtype_with_statistics_no_coarser_than_float32(kind, dtype):
    case = Case(**kind, dtype=dtype)
    case.x = case.x * 200  # squares beyond float16's range
    case.narrow.gone_mean *= 200
    case.narrow.gone_var *= 4e4 if dtype != torch.float16 else 0
    if dtype == torch.float16:  # whose range the variance of these constants exceeds
        gone = torch.ones(case.x.shape[case.dim], dtype=torch.bool).index_fill_(0, case.positions, False)
        case.x.index_fill_(case.dim, gone.nonzero().flatten(), 100.0)
        case.narrow.gone_mean.fill_(100.0)
    found = case.narrow(case.small(case.x))
    assert found.dtype == dtype
    expected = case.small(case.dense(case.x)).float()
    assert relative(found.float(), expected) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_eps_none_is_the_resolution_of_the_statistics(dtype):
    case = Case("rms", sizes=(2, 12), dim=-1, bias=False, dtype=dtype, eps=None)
    case.x = case.x * 1e-4 if dtype != torch.float64 else case.x * 1e-8
    case.narrow.gone_mean.zero_()
    case.narrow.gone_var.zero_()
    gone = torch.ones(12, dtype=torch.bool).index_fill_(0, case.positions, False)
    case.x[:, gone] = 0
    found, expected = case.narrow(case.small(case.x)).double(), case.small(case.dense(case.x)).double()
    assert relative(found, expected) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dense", "narrow"),
    [
        (nn.LayerNorm(6), KeptStatisticsNorm("layer", dim=-1, dense=6, kept=6, eps=1e-5)),
        (nn.LayerNorm(6, bias=False), KeptStatisticsNorm("layer", dim=-1, dense=6, kept=6, eps=1e-5, bias=False)),
        (nn.RMSNorm(6, eps=1e-5), KeptStatisticsNorm("rms", dim=-1, dense=6, kept=6, eps=1e-5, bias=False)),
        (nn.GroupNorm(2, 6), KeptStatisticsNorm("group", dim=1, dense=3, kept=3, groups=2, eps=1e-5)),
        (
            nn.GroupNorm(2, 6, affine=False),
            KeptStatisticsNorm("group", dim=1, dense=3, kept=3, groups=2, eps=1e-5, affine=False),
        ),
    ],
    ids=["layer", "layer-no-bias", "rms", "group", "group-plain"],
)
def test_starts_as_the_layer_it_replaces_under_the_same_names(dense, narrow):
    assert [(n, p.shape) for n, p in narrow.named_parameters()] == [(n, p.shape) for n, p in dense.named_parameters()]
    missing, unexpected = narrow.load_state_dict(dense.state_dict(), strict=False)
    assert (missing, unexpected) == (["gone_mean", "gone_var"], [])
    x = torch.randn(4, 6, generator=generator(1))
    torch.testing.assert_close(narrow(x), dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_carries_the_constants(kind):
    case = Case(**kind)
    fresh = Case(**kind, seed=5).narrow
    fresh.load_state_dict(case.narrow.state_dict())
    x = case.small(case.x)
    assert torch.equal(fresh(x), case.narrow(x))
    assert torch.equal(copy.deepcopy(case.narrow)(x), case.narrow(x))


@pytest.mark.parametrize("kind", KINDS)
def test_on_meta_and_through_torch_export_at_any_batch_size(kind):
    case = Case(**kind)
    x = case.small(case.x)
    assert copy.deepcopy(case.narrow).to("meta")(x.to("meta")).shape == x.shape
    program = torch.export.export(case.narrow, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    more = torch.cat([x, x.flip(0), x * 2])
    assert torch.equal(program(more), case.narrow(more))


def test_through_onnx_at_any_batch_size(tmp_path):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Case("layer", sizes=(2, 12, 3, 3), dtype=torch.float32).narrow
            self.last = Case("layer", sizes=(2, 3, 3, 12), dim=-1, dtype=torch.float32).narrow
            self.rms = Case("rms", sizes=(2, 3, 3, 12), dim=-1, dtype=torch.float32, bias=False).narrow
            self.group = Case("group", sizes=(2, 12, 3, 3), groups=3, dtype=torch.float32).narrow

        def forward(self, x):
            y = x.permute(0, 2, 3, 1)
            return self.first(x), self.last(y), self.rms(y), self.group(x)

    found = export_onnx(Norms(), torch.randn(2, 6, 3, 3, generator=generator(2)), tmp_path / "norms.onnx")
    assert found.parity.max_rel <= 1e-5


def test_channels_last_stays():
    for options in ({"kind": "layer"}, {"kind": "group", "groups": 3}):
        case = Case(**options, sizes=(2, 12, 3, 3))
        x = case.small(case.x).contiguous(memory_format=torch.channels_last)
        found = case.narrow(x)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative(found, case.small(case.dense(case.x))) <= 1e-12


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sequences_of_several_lengths():
    case = Case("layer", sizes=(2, 5, 12), dim=-1)
    whole = case.small(case.x)
    with torch.no_grad():
        found = case.narrow(torch.nested.as_nested_tensor([whole[0], whole[1, :2]])).unbind()
    expected = case.narrow(whole)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1, :2])


def test_repr_tells_how_many_channels_are_left():
    layer = KeptStatisticsNorm("layer", dim=-1, dense=8, kept=5, eps=1e-6)
    assert repr(layer) == "KeptStatisticsNorm(layer, kept=5 of 8, dim=-1, eps=1e-06, affine=True)"
    group = KeptStatisticsNorm("group", dim=1, dense=8, kept=5, groups=2, eps=1e-6, affine=False)
    assert repr(group) == "KeptStatisticsNorm(group, kept=5 of 8, groups=2, eps=1e-06, affine=False)"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("layr", {}, "the kind of norm 'layr'"),
        ("layr", {}, "did you mean 'layer'?"),
        ("layer", {"kept": 0}, "a norm with 0 of 8 channels kept"),
        ("layer", {"kept": 9}, "a norm with 9 of 8 channels kept"),
        ("layer", {"groups": 2}, "a layer norm of 2 groups"),
        ("group", {"groups": 0, "dim": 1}, "a group norm of 0 groups"),
        ("group", {"groups": 2}, "a group norm over axis -1"),
    ],
)
def test_impossible_sizes_are_refused(kind, options, message):
    with pytest.raises(SurgeryError) as caught:
        KeptStatisticsNorm(kind, **{"dim": -1, "dense": 8, "kept": 4, "eps": EPS, **options})
    assert message in str(caught.value)
