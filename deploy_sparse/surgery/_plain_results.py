"""Results of common operations on tensors without memory, where PyTorch takes long to tell them or does not check."""

from __future__ import annotations

from typing import Any

import torch

from ._words import names

_ELEMENTWISE = names("relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu mish softmax")
_IN_PLACE = frozenset(f"{name}_" for name in _ELEMENTWISE)
_SAME_SHAPE = frozenset({"add", "mul", "sub"})


def refuse_unfit(name: str, args: Any) -> None:
    """What PyTorch does not check for tensors without memory."""
    if name == "linear" and args[0].dtype != args[1].dtype:
        raise RuntimeError(f"linear of numbers in {args[0].dtype} by a weight in {args[1].dtype}")
    if name.startswith("conv_transpose") and args[0].dim() == args[1].dim() and args[0].shape[1] != args[1].shape[0]:
        raise RuntimeError(f"{name} of {args[0].shape[1]} channels by a weight for {args[1].shape[0]}")


def without_work(name: str, args: Any, kwargs: Any) -> Any:
    """A tensor like the result of an ATen operation on tensors without memory, None where that is not plain."""
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor) or not first.is_meta or not first.is_floating_point() or kwargs:
        return None
    if name in _IN_PLACE:
        return first
    if name in _ELEMENTWISE and not any(isinstance(a, torch.dtype) for a in args):
        return _like(first)
    if name in _SAME_SHAPE and isinstance(args[1], torch.Tensor):
        alike = args[1].shape == first.shape and args[1].dtype == first.dtype and args[1].stride() == first.stride()
        return _like(first) if alike else None
    if name == "batch_norm" and not args[5] and first.dim() > 1:
        fitting = all(t is None or (t.shape == first.shape[1:2] and t.dtype == first.dtype) for t in args[1:5])
        return _like(first) if fitting else None
    if name == "conv2d":
        return _convolved(*args)
    if name == "adaptive_avg_pool2d" and first.dim() == 4 and first.is_contiguous() and len(args[1]) == 2:
        return first.new_empty([*first.shape[:2], *args[1]]) if min(first.shape) > 0 else None
    if name == "layer_norm":
        last = list(first.shape[-len(args[1]) :])
        fitting = all(t is None or (list(t.shape) == last and t.dtype == first.dtype) for t in args[2:4])
        return (
            torch.empty_like(first, memory_format=torch.contiguous_format)
            if fitting and list(args[1]) == last
            else None
        )
    return None


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> torch.Tensor | None:
    fitting = x.dim() == 4 and x.is_contiguous() and weight.is_contiguous() and weight.dtype == x.dtype
    fitting = fitting and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    fitting = fitting and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
    if not fitting or isinstance(padding, str) or not len(stride) == len(padding) == len(dilation) == 2:
        return None
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    return x.new_empty([x.shape[0], weight.shape[0], *size]) if min(x.shape) > 0 and min(size) > 0 else None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if not plain:
        return torch.empty_like(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
