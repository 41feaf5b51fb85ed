"""A linear layer whose weight is a few dense blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SurgeryError
from ._packed import Packed, check_layer, joined
from .packing import Packing


class PackedLinear(Packed):
    """What an ``nn.Linear`` computes whose weight is zero outside of the blocks of a packing.

    Looking features up along the last axis copies number by number, several times slower than the products it spares.
    So inputs are transposed for the look-up, and a layer that restores the order of its rows computes all of it
    transposed, as a convolution with a kernel of 1×1 whose weights are shaped ``[rows, columns, 1, 1]``.

    Made by :meth:`pack`, :meth:`of` or :meth:`shell`.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if packing.kernel:
            raise SurgeryError(
                f"a packing with a kernel of {packing.kernel} for a Linear",
                expected="the packing of a mask [out, in]",
                fix="use PackedConv2d",
            )
        turned = packing.restores
        stacked, tail = turned and packing.form in ("disjoint", "equal"), (1, 1) if turned else ()
        super().__init__(packing, stacked=stacked, tail=tail, bias=bias, device=device, dtype=dtype)

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, packing: Packing) -> PackedLinear:
        """The packed layer with the blocks of a dense weight ``[out, in]`` and a dense bias ``[out]``.

        Raises:
            SurgeryError: the packing is of another weight.
        """
        made = cls(packing, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        made._fill_(weight, bias)
        return made

    @classmethod
    def of(cls, layer: nn.Linear, packing: Packing) -> PackedLinear:
        """The packed form of a layer, with copies of its weights and in its mode.

        Raises:
            SurgeryError: no plain Linear, or the packing is of another weight.
        """
        check_layer(layer, nn.Linear)
        return cls.pack(layer.weight, layer.bias, packing)._like(layer)

    @classmethod
    def shell(cls, layer: nn.Linear, packing: Packing, device: torch.device | str = "meta") -> PackedLinear:
        """As :meth:`of`, with zeros for weights, to load a state dict into.

        Raises:
            SurgeryError: no plain Linear, or the packing is of another weight.
        """
        check_layer(layer, nn.Linear)
        packing.check_weight(layer.weight.shape)
        return cls(packing, bias=layer.bias is not None, device=device, dtype=layer.weight.dtype)._like(layer)

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.packing.in_channels

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.packing.out_channels

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``.

        Raises:
            SurgeryError: another number of features.
        """
        x = input
        self._check_input(x, -1, "[..., features]")
        if x.dim() == 1:
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        return self._turned(x) if self._restores else self._straight(x)

    def _straight(self, x: torch.Tensor) -> torch.Tensor:
        """A product for each block, features last."""
        if self._gathers:
            x = x.transpose(-1, -2).index_select(-2, self.columns).transpose(-1, -2)
        reads = x.split([wide for _, wide in self._sizes], dim=-1)  # type: ignore[no-untyped-call]
        y = joined([F.linear(read, kernel) for read, kernel in zip(reads, self._kernels(), strict=True)], -1)
        return y if self.bias is None else y + self.bias

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """A convolution over images of one column, features first."""
        if x.numel() == 0:  # which no convolution takes
            return x.new_zeros(*x.shape[:-1], self.out_features)
        image = x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)  # [N, positions, in]
        y = self._convolved(image.transpose(1, 2).unsqueeze(-1), 1).squeeze(-1).transpose(1, 2)
        if x.dim() == 2:
            return y.squeeze(0)
        return torch.unflatten(y, 1, x.shape[1:-1]) if x.dim() > 3 else y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._format()}"
