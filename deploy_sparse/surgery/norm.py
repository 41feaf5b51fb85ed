"""A normalisation layer that lost channels and keeps the statistics it had with them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from ..errors import SurgeryError, nearest

NormKind = Literal["layer", "rms", "group"]


class KeptStatisticsNorm(nn.Module):
    """A LayerNorm, RMSNorm or GroupNorm over channels some of which are gone, with the dense layer's statistics.

    The removed channels held constants, so all that they contributed to the statistics of an example is their number,
    mean and variance. With ``kept`` of ``dense`` channels left, ``r = kept / dense`` and the mean ``g`` and biased
    variance ``v`` of the constants, the dense mean and variance are::

        μ  = r · mean(x) + (1 - r) · g
        σ² = r · mean((x - μ)²) + (1 - r) · ((g - μ)² + v)

    and the dense mean square of RMSNorm is ``r · mean(x²) + (1 - r) · (g² + v)``. Statistics are taken in float32 for
    inputs of half precision; the output has the input's dtype. Parameters are named as in torch's layers.

    Args:
        kind: ``"layer"`` and ``"rms"`` normalise each position over the axis ``dim``, ``"group"`` normalises
            ``[batch, channels, ...]`` over the channels of a group and all positions.
        dim: the channel axis of the input, counted from the end where negative; 1 for ``"group"``.
        dense: channels of one group in the dense network; the whole axis for ``"layer"`` and ``"rms"``.
        kept: how many of them are left.
        groups: number of groups.
        eps: added to the variance; None is the resolution of the dtype that the statistics are taken in, as in
            :class:`torch.nn.RMSNorm`.
        affine: the layer scales its output by ``weight``, ``[groups * kept]``.
        bias: it also adds ``bias``, ``[groups * kept]``.
        device: where its tensors lie.
        dtype: of its tensors.

    Attributes:
        gone_mean: the mean of the removed channels' constants, ``[groups]``; zero until it is set.
        gone_var: their biased variance, ``[groups]``; zero until it is set.

    Raises:
        SurgeryError: sizes or a kind that no such layer has.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    gone_mean: torch.Tensor
    gone_var: torch.Tensor

    def __init__(
        self,
        kind: NormKind,
        *,
        dim: int,
        dense: int,
        kept: int,
        groups: int = 1,
        eps: float | None,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(kind, dim, dense, kept, groups)
        self.kind, self.dim, self.groups, self.eps = kind, dim, groups, eps
        self.dense, self.kept = dense, kept
        channels = groups * kept
        for name, wanted, value in (("weight", affine, 1.0), ("bias", affine and bias, 0.0)):
            full = torch.full((channels,), value, device=device, dtype=dtype or torch.get_default_dtype())
            self.register_parameter(name, nn.Parameter(full) if wanted else None)
        for name in ("gone_mean", "gone_var"):
            self.register_buffer(name, torch.zeros(groups, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x``, an input as the dense layer takes it without the removed channels; same shape and dtype."""
        if x.is_nested:  # torch.nn.TransformerEncoder makes these of padded batches
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        axis = self.dim % x.dim()
        half = x.dtype in (torch.float16, torch.bfloat16)
        y = x.float() if half else x
        if self.kind == "group":
            grouped = torch.unflatten(y, 1, (self.groups, -1))
            y = self._normalised(grouped, tuple(range(2, grouped.dim()))).flatten(1, 2)
        else:
            y = self._normalised(y, (axis,))
        shape = (-1, *[1] * (x.dim() - 1 - axis))
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    def _normalised(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """``x`` with the dense network's statistics over ``dims``; its axis 1 holds the groups where there are any."""
        share = self.kept / self.dense
        shape = (-1, *[1] * (x.dim() - 2)) if self.kind == "group" else (1,)
        mean, variance = self.gone_mean.to(x.dtype).view(shape), self.gone_var.to(x.dtype).view(shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if self.kind == "rms":
            square = share * x.square().mean(dims, keepdim=True) + (1 - share) * (mean.square() + variance)
            return x * torch.rsqrt(square + eps)
        # Means of differences, not torch.var_mean: as accurate, and several times faster on a CPU.
        center = share * x.mean(dims, keepdim=True) + (1 - share) * mean
        x = x - center
        spread = share * x.square().mean(dims, keepdim=True) + (1 - share) * ((mean - center).square() + variance)
        return x * torch.rsqrt(spread + eps)

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.kind == "group" else f", dim={self.dim}"
        return (
            f"{self.kind}, kept={self.kept} of {self.dense}{groups}, eps={self.eps}, affine={self.weight is not None}"
        )


def _check(kind: str, dim: int, dense: int, kept: int, groups: int) -> None:
    if kind not in get_args(NormKind):
        raise SurgeryError(
            f"the kind of norm {kind!r}",
            expected="one of " + ", ".join(map(repr, get_args(NormKind))),
            fix=f"{nearest(kind, list(get_args(NormKind)))}name the layer that is replaced",
        )
    if not 0 < kept <= dense:
        raise SurgeryError(
            f"a norm with {kept} of {dense} channels kept",
            expected="at least one channel kept, and no more than there were",
            fix="count the channels of one group",
        )
    if kind == "group" and dim != 1:
        raise SurgeryError(
            f"a group norm over axis {dim}", expected="axis 1, as in torch.nn.GroupNorm", fix="pass dim=1"
        )
    if groups < 1 or (kind != "group" and groups != 1):
        raise SurgeryError(
            f"a {kind} norm of {groups} groups",
            expected="at least one group, and exactly one unless the kind is 'group'",
            fix="pass the groups of the layer that is replaced",
        )
