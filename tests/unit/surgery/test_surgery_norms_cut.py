"""LayerNorm, RMSNorm and GroupNorm over channels that go: replaced by one that counts the constants they held."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_masks import X, cut, ticket_of
from surgery_nets import outputs, randomised, rows_masked, ticket
from torch import nn

from deploy_sparse.errors import SurgeryError
from deploy_sparse.surgery import channel_groups, compact, load_compact, plan_from_ticket
from deploy_sparse.surgery.layers import KeptStatisticsNorm

GONE, LEFT = [1, 4], [0, 2, 3, 5]


class ChannelsFirst(nn.LayerNorm):
    """ConvNeXt's LayerNorm2d."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OnLast(nn.Module):
    """A norm of the last axis, between two permutations of the network's own."""

    def __init__(self, norm):
        super().__init__()
        self.inner = norm

    def forward(self, x):
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Normed(nn.Module):
    """Constants ``sigmoid(bias)`` in the emptied channels of ``a``, a norm over all channels, a convolution."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.c = nn.Conv2d(3, 6, 1), norm(), nn.Conv2d(6, 2, 1)
        self.double()

    def forward(self, x):
        return self.c(self.norm(torch.sigmoid(self.a(x))))


NORMS = {
    "layer last": (lambda: OnLast(nn.LayerNorm(6)), "norm.inner", "layer", -1),
    "layer first": (lambda: ChannelsFirst(6), "norm", "layer", 1),
    "layer without bias": (lambda: OnLast(nn.LayerNorm(6, bias=False)), "norm.inner", "layer", -1),
    "layer without scale": (lambda: OnLast(nn.LayerNorm(6, elementwise_affine=False)), "norm.inner", "layer", -1),
    "rms": (lambda: OnLast(nn.RMSNorm(6, eps=1e-3)), "norm.inner", "rms", -1),
    "rms, default eps": (lambda: OnLast(nn.RMSNorm(6)), "norm.inner", "rms", -1),
    "one group": (lambda: nn.GroupNorm(1, 6), "norm", "group", 1),
}


def masks_of(dense, gone=GONE):
    """Rows of ``a`` are emptied (their biases live on), and nothing reads those channels behind the norm."""
    masks = rows_masked(dense, {"a.weight": gone})
    masks["c.weight"] = torch.ones_like(dense.c.weight, dtype=torch.bool)
    masks["c.weight"][:, gone] = False
    return masks


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_keeps_counting_the_constants_of_channels_that_went(case):
    norm, path, kind, dim = NORMS[case]
    dense = randomised(Normed(norm))
    result = cut(ticket_of(dense, masks_of(dense)), lambda: Normed(norm))
    made, old = result.module.get_submodule(path), dense.get_submodule(path)
    assert isinstance(made, KeptStatisticsNorm)
    assert (made.kind, made.dim % 4, made.dense, made.kept, made.groups) == (kind, dim % 4, 6, 4, 1)
    constant = torch.sigmoid(dense.a.bias.detach()[GONE])
    assert torch.allclose(made.gone_mean, constant.mean(), rtol=1e-14, atol=0)
    assert torch.allclose(made.gone_var, constant.var(correction=0), rtol=1e-12, atol=0)
    for name in ("weight", "bias"):
        own = getattr(old, name, None)
        assert (getattr(made, name) is None) == (own is None)
        assert own is None or torch.equal(getattr(made, name), own[LEFT])
    assert result.plan.groups[0].kept == tuple(LEFT)
    (entry,) = result.plan.shape.norms
    assert (entry.module, entry.kind, entry.dense, entry.kept) == (path, kind, 6, 4)


@pytest.mark.parametrize("case", ["layer first", "rms", "one group"])
def test_a_channel_that_is_read_behind_the_norm_stays(case):
    """Normalised together with live values, a constant is none any more."""
    norm = NORMS[case][0]
    dense = randomised(Normed(norm))
    result = cut(ticket_of(dense, rows_masked(dense, {"a.weight": GONE})), lambda: Normed(norm))
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    (stay,) = result.plan.groups[0].stays
    assert (stay.kind, stay.channels) == ("leak", tuple(GONE))
    assert "would be normalised together with values that depend on the input in aten." in stay.reason


def test_a_norm_whose_scale_is_zero_gives_a_constant_that_is_folded():
    norm = NORMS["layer first"][0]
    dense = randomised(Normed(norm))
    masks = rows_masked(dense, {"a.weight": GONE})
    masks["norm.weight"] = torch.ones(6, dtype=torch.bool)
    masks["norm.weight"][GONE] = False  # the shift stays alive
    result = cut(ticket_of(dense, masks), lambda: Normed(norm))
    assert result.plan.groups[0].kept == tuple(LEFT)
    assert [(f.bias, f.channels) for f in result.plan.folds] == [("c.bias", 2)]
    shift = dense.c.weight.detach()[:, GONE, 0, 0] @ dense.norm.bias.detach()[GONE]
    assert torch.allclose(result.module.c.bias, dense.c.bias + shift, rtol=1e-14, atol=0)


def test_whole_groups_of_a_group_norm_go_and_it_stays_what_it_was():
    def factory():
        return Normed(lambda: nn.GroupNorm(3, 6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense, [2, 3])), factory)
    norm = result.module.norm
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.num_channels) == (2, 4)
    assert torch.equal(norm.weight, dense.norm.weight[[0, 1, 4, 5]])
    assert [(a.module, a.name, a.compact) for a in result.plan.shape.attributes] == [("norm", "num_groups", 2)]


def test_the_same_position_of_every_group_goes_and_each_group_counts_its_own():
    def factory():
        return Normed(lambda: nn.GroupNorm(2, 6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense, [1, 4])), factory)
    norm = result.module.norm
    assert isinstance(norm, KeptStatisticsNorm)
    assert (norm.kind, norm.groups, norm.dense, norm.kept) == ("group", 2, 3, 2)
    assert torch.allclose(norm.gone_mean, torch.sigmoid(dense.a.bias.detach()[[1, 4]]), rtol=1e-14, atol=0)
    assert torch.equal(norm.gone_var, torch.zeros(2, dtype=torch.float64))


def test_other_positions_in_every_group_of_a_norm_stay():
    def factory():
        return Normed(lambda: nn.GroupNorm(2, 6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense, [0, 4])), factory)
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    assert [stay.kind for stay in result.plan.groups[0].stays] == ["product"]


def test_a_norm_called_twice_keeps_channels_whose_constants_differ():
    class Twice(Normed):
        def forward(self, x):
            y = torch.sigmoid(self.a(x))
            return self.c(self.norm(y) + self.norm(y * 0.5))

    def factory():
        return Twice(lambda: ChannelsFirst(6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense)), factory)
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    assert result.plan.groups[0].stays


def test_norms_can_be_left_as_they_are():
    norm = NORMS["layer first"][0]
    dense = randomised(Normed(norm))
    made = ticket_of(dense, masks_of(dense))
    plan = plan_from_ticket(made, Normed(norm), X, norms="leave")
    assert plan.shape.norms == plan.cuts == ()
    assert plan.groups[0].stays[0].kind == "pinned"
    assert plan.groups[0].stays[0].reason == "aten.layer_norm.default in layer 'norm' is to keep its width"
    assert plan_from_ticket(made, Normed(norm), X).shape.norms != ()
    free, kept = (channel_groups(Normed(norm), X, norms=norms)[0] for norms in (True, False))
    assert free.pinned is None
    assert kept.pinned == plan.groups[0].stays[0].reason


def test_a_norm_written_out_in_the_networks_code_cannot_be_replaced():
    class Functional(Normed):
        def forward(self, x):
            y = torch.sigmoid(self.a(x)).permute(0, 2, 3, 1)
            y = F.layer_norm(y, (6,), self.norm.weight, self.norm.bias)
            return self.c(y.permute(0, 3, 1, 2))

    def factory():
        return Functional(lambda: nn.LayerNorm(6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense)), factory)
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    assert "aten.layer_norm.default in the network itself is written out in" in result.plan.groups[0].stays[0].reason


def test_a_layer_that_does_more_than_its_norm_is_not_replaced():
    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2

    def factory():
        return Normed(lambda: Scaled(6))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense)), factory)
    reason = result.plan.groups[0].stays[0].reason
    assert reason == "layer 'norm' does more than aten.layer_norm.default in layer 'norm'"
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)


def test_a_norm_over_several_axes_keeps_them():
    def factory():
        return Normed(lambda: nn.LayerNorm((6, 8, 8)))

    dense = randomised(factory())
    result = cut(ticket_of(dense, masks_of(dense)), factory)
    assert result.plan.groups[0].kept == (0, 1, 2, 3, 4, 5)
    assert "normalises over several axes" in result.plan.groups[0].stays[0].reason


@pytest.mark.parametrize("case", NORMS)
def test_in_single_precision_the_constants_are_rounded_and_that_is_told(case):
    norm, path, _, _ = NORMS[case]

    def factory():
        return Normed(norm).float()

    dense = randomised(factory())
    result = compact(ticket(dense, masks_of(dense)), factory, X.float())
    made = result.module.get_submodule(path)
    constant = torch.sigmoid(dense.a.bias.detach().double()[GONE])
    assert result.plan.groups[0].kept == tuple(LEFT)
    assert made.gone_mean.dtype == torch.float32
    assert torch.equal(made.gone_mean, constant.mean().float().reshape(1))
    assert result.parity.float64.max_rel < 1e-13
    assert result.parity.rounding is not None


def test_a_saved_network_with_replaced_norms_comes_back(tmp_path):
    norm = NORMS["layer last"][0]
    dense = randomised(Normed(norm))
    result = cut(ticket_of(dense, masks_of(dense)), lambda: Normed(norm))
    loaded = load_compact(result.save(tmp_path / "small"), lambda: Normed(norm))
    assert isinstance(loaded.norm.inner, KeptStatisticsNorm)
    assert torch.equal(loaded.norm.inner.gone_mean, result.module.norm.inner.gone_mean)
    assert torch.equal(outputs(loaded, X), outputs(result.module, X))
    with pytest.raises(SurgeryError, match="pass the factory of that network"):
        load_compact(tmp_path / "small", lambda: Normed(lambda: nn.Identity()))
