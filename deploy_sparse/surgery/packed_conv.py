"""A convolution whose weight is a few dense blocks."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SurgeryError, nearest
from ._packed import Packed, check_layer
from .packing import Packing

Pair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class PackedConv2d(Packed):
    """What an ``nn.Conv2d`` with ``groups=1`` computes whose weight is zero outside of the blocks of a packing.

    Options mean what they do in :class:`torch.nn.Conv2d`. Made by :meth:`pack`, :meth:`of` or :meth:`shell`.

    Raises:
        SurgeryError: the packing of a Linear, or options that no Conv2d has.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        unrolls = packing.form == "positions"
        stacked, tail = packing.form in ("disjoint", "equal"), (1, 1) if unrolls else packing.kernel
        if not packing.kernel:
            raise SurgeryError(
                "the packing of a Linear for a Conv2d", expected="a mask [out, in, kh, kw]", fix="use PackedLinear"
            )
        super().__init__(packing, stacked=stacked, tail=tail, bias=bias, device=device, dtype=dtype)
        self.kernel_size = packing.kernel
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode = padding_mode
        self._unrolls = unrolls
        self._border = self._checked_border()
        # A convolution pads by itself where that is symmetric and with zeros.
        top, bottom, left, right = self._border
        self._pads_alone = padding_mode == "zeros" and (top, left) == (bottom, right) and not unrolls

    @classmethod
    def pack(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        packing: Packing,
        *,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
    ) -> PackedConv2d:
        """The packed layer with the blocks of a dense weight ``[out, in, kh, kw]`` and a dense bias ``[out]``.

        Raises:
            SurgeryError: the packing is of another weight, or options that no Conv2d has.
        """
        made = cls(
            packing,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        made._fill_(weight, bias)
        return made

    @classmethod
    def of(cls, layer: nn.Conv2d, packing: Packing) -> PackedConv2d:
        """The packed form of a layer, with copies of its weights and in its mode.

        Raises:
            SurgeryError: no plain Conv2d with ``groups=1``, or the packing is of another weight.
        """
        check_layer(layer, nn.Conv2d)
        return cls.pack(layer.weight, layer.bias, packing, **_options(layer))._like(layer)

    @classmethod
    def shell(cls, layer: nn.Conv2d, packing: Packing, device: torch.device | str = "meta") -> PackedConv2d:
        """As :meth:`of`, with zeros for weights, to load a state dict into.

        Raises:
            SurgeryError: no plain Conv2d with ``groups=1``, or the packing is of another weight.
        """
        check_layer(layer, nn.Conv2d)
        packing.check_weight(layer.weight.shape)
        bias, dtype = layer.bias is not None, layer.weight.dtype
        return cls(packing, **_options(layer), bias=bias, device=device, dtype=dtype)._like(layer)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[N, in, H, W]`` to ``[N, out, H', W']``, or both without ``N``.

        Raises:
            SurgeryError: another number of channels.
        """
        x, axis = input, input.dim() - 3
        self._check_input(x, axis, "[N, channels, height, width]")
        top, bottom, left, right = self._border
        inner = (top, left)
        if not self._pads_alone:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, inner = (F.pad(x, (left, right, top, bottom), mode) if any(self._border) else x), (0, 0)
        if self._unrolls:
            return self._convolved(self._unrolled(x, axis), axis)
        return self._convolved(x, axis, stride=self.stride, padding=inner, dilation=self.dilation)

    def _unrolled(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """For each tap of the kernel the positions of a padded input that it meets: ``[N, taps · in, H', W']``."""
        offsets, counts = [], []
        for size, kernel, dilation, stride in zip(
            x.shape[-2:], self.kernel_size, self.dilation, self.stride, strict=True
        ):
            if size <= dilation * (kernel - 1):
                raise SurgeryError(
                    f"an input of {' × '.join(map(str, x.shape[-2:]))}, padding included",
                    expected=f"at least the extent of the {' × '.join(map(str, self.kernel_size))} kernel",
                    fix="feed what the dense layer takes",
                )
            offsets.append([tap * dilation for tap in range(kernel)])
            counts.append((size - dilation * (kernel - 1) - 1) // stride * stride + 1)
        return torch.cat(
            [
                x[..., top : top + counts[0] : self.stride[0], left : left + counts[1] : self.stride[1]]
                for top in offsets[0]
                for left in offsets[1]
            ],
            axis,
        )

    def _checked_border(self) -> tuple[int, int, int, int]:
        """Rows and columns added at the top, bottom, left and right."""
        reasons = []
        if self.padding_mode not in get_args(PaddingMode):
            did_you = nearest(str(self.padding_mode), get_args(PaddingMode))
            reasons.append(f"padding_mode={self.padding_mode!r} ({did_you}one of {', '.join(get_args(PaddingMode))})")
        if min(*self.stride, *self.dilation) < 1:
            reasons.append(f"stride={self.stride} and dilation={self.dilation} (both from 1 on)")
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                reasons.append(f"padding={self.padding!r} ('same', 'valid' or numbers)")
            elif self.padding == "same" and self.stride != (1, 1):
                reasons.append(f"padding='same' with stride={self.stride} (numbers, or stride 1)")
        elif min(self.padding) < 0:
            reasons.append(f"padding={self.padding} (from 0 on)")
        if reasons:
            raise SurgeryError(
                f"a convolution with {'; '.join(reasons)}",
                expected="options as torch.nn.Conv2d takes them",
                fix="pass those of the dense layer, or use PackedConv2d.of(layer, packing)",
            )
        if not isinstance(self.padding, str):
            vertical, horizontal = self.padding
            return vertical, vertical, horizontal, horizontal
        if self.padding == "valid":
            return 0, 0, 0, 0
        spans = [dilation * (kernel - 1) for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        return spans[0] // 2, spans[0] - spans[0] // 2, spans[1] // 2, spans[1] - spans[1] // 2

    def extra_repr(self) -> str:
        parts = [str(self.in_channels), str(self.out_channels), f"kernel_size={self.kernel_size}"]
        plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)}" for name, usual in plain.items() if getattr(self, name) != usual]
        return ", ".join([*parts, self._format()])


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _options(layer: nn.Conv2d) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
