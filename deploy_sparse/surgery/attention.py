"""Multi-head attention whose stream width, number of heads and head size are independent of each other."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SurgeryError

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


def unsupported(mha: nn.MultiheadAttention) -> str | None:
    """Why :class:`NarrowAttention` cannot stand in for ``mha``; None where it can."""
    if mha.bias_k is not None or mha.bias_v is not None:
        return "add_bias_kv appends a learned position to the keys and values"
    if mha.add_zero_attn:
        return "add_zero_attn appends a position of zeros to the keys and values"
    if type(mha).forward is not nn.MultiheadAttention.forward:
        return f"{type(mha).__name__} has a forward of its own"
    if not isinstance(mha.out_proj, nn.Linear):
        return f"its out_proj is of the type {type(mha.out_proj).__name__}"
    computed = [name for name in _PROJECTIONS if name not in mha._parameters]
    computed += [f"out_proj.{name}" for name in ("weight", "bias") if name not in mha.out_proj._parameters]
    return f"its {computed[0]} is computed, not a parameter" if computed else None


class NarrowAttention(nn.Module):
    """What :class:`torch.nn.MultiheadAttention` computes, with every size read from the weights.

    It holds the very parameters of the layer it replaces, under the same names, so state dicts fit both ways. Heads,
    dims of heads, or channels of the stream are removed by slicing the weights (the same dims of every head, and of
    queries and keys) and setting ``num_heads`` and ``parts``; nothing else depends on a size.

    Args:
        mha: the layer to stand in for.

    Attributes:
        num_heads: number of heads that the rows of each projection divide into.
        parts: rows of the packed projection that are queries, keys and values.
        scale: factor of the scores, the dense head size to the power -1/2; it stays when dims of heads are removed.
        batch_first: batched inputs are ``[batch, length, width]``, not ``[length, batch, width]``.
        dropout: probability of dropping an attention weight in training.

    Raises:
        SurgeryError: :func:`unsupported` has a reason.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    # torch.nn.TransformerEncoderLayer reads it and, finding False, leaves its fused kernel: that one takes the scale
    # and all sizes from the width of the stream.
    _qkv_same_embed_dim = False

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        if reason := unsupported(mha):
            raise SurgeryError(
                f"attention that cannot be narrowed: {reason}",
                expected="a plain torch.nn.MultiheadAttention without add_bias_kv and add_zero_attn",
                fix="leave its channels in place",
            )
        self.num_heads: int = mha.num_heads
        self.parts: list[int] = [mha.embed_dim] * 3
        self.scale: float = mha.head_dim**-0.5
        self.batch_first: bool = mha.batch_first
        self.dropout: float = mha.dropout
        for name in _PROJECTIONS:
            self.register_parameter(name, getattr(mha, name))
        projection = mha.out_proj
        self.out_proj = nn.Linear(projection.in_features, projection.out_features, device="meta")
        self.out_proj.weight, self.out_proj.bias = projection.weight, projection.bias
        self.train(mha.training)

    @classmethod
    def of(cls, mha: nn.MultiheadAttention) -> NarrowAttention:
        """The layer that stands in for ``mha`` and shares its parameters.

        Raises:
            SurgeryError: :func:`unsupported` has a reason.
        """
        return cls(mha)

    @property
    def embed_dim(self) -> int:
        """Width of the queries."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        assert weight is not None  # a layer has the one or the other
        return weight.shape[1]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.out_proj.weight.shape[1] // self.num_heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, as :meth:`torch.nn.MultiheadAttention.forward` does.

        Args:
            query: ``[L, E]``, or batched ``[N, L, E]`` with ``batch_first`` and ``[L, N, E]`` without.
            key: ``[S, E]``, batched like ``query``.
            value: like ``key``.
            key_padding_mask: ``[N, S]`` or unbatched ``[S]``; True, or an added -inf, hides a key.
            need_weights: return the attention weights as well.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; True hides, floats are added to the scores.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            the output, shaped like ``query``, and None or the weights: ``[N, L, S]``, with a head axis behind ``N``
            unless they are averaged, without ``N`` for unbatched inputs.

        Raises:
            SurgeryError: a mask of another shape or type, or ``is_causal`` without a mask.
        """
        if query.is_nested:
            return self._nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise SurgeryError(
                "is_causal without attn_mask", expected="the causal mask that it hints at", fix="pass attn_mask as well"
            )
        batched, itself = query.dim() == 3, query is key and key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, query, key)
        q, k, v = (
            torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2)
            for part in self._projected(query, None if itself else (key, value))
        )
        dropout = self.dropout if self.training else 0.0
        weights: torch.Tensor | None = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _projected(
        self, query: torch.Tensor, others: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, ``[N, length, heads * head size]``; ``others`` is None where all are ``query``."""
        if others is None and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split(self.parts, dim=-1)  # type: ignore[no-any-return, no-untyped-call]
        key, value = others or (query, query)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        packed = self.in_proj_weight
        weights = cast(tuple[torch.Tensor, ...], separate) if packed is None else packed.split(self.parts)  # type: ignore[no-untyped-call]
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(self.parts)  # type: ignore[no-untyped-call]
        return tuple(
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _mask(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """What both masks add to the scores, to be broadcast to ``[N, heads, L, S]``."""
        batch, length, source = query.shape[0], query.shape[1], key.shape[1]
        masks: list[torch.Tensor] = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            shape = (batch * self.num_heads, length, source) if per_head else (length, source)
            added = _added("attn_mask", attn_mask, shape, query.dtype)
            masks.append(torch.unflatten(added, 0, (-1, self.num_heads)) if per_head else added)
        if padding is not None:
            added = _added("key_padding_mask", padding, (batch, source), query.dtype)
            masks.append(added.unsqueeze(1).unsqueeze(1))
        return sum(masks[1:], masks[0]) if masks else None

    def _nested(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, need_weights: bool, average: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention of sequences of several lengths, which torch.nn.TransformerEncoder makes of padded batches."""
        if not (query is key and key is value and self.batch_first):
            raise SurgeryError(
                "nested tensors in attention between different sequences, or without batch_first",
                expected="self-attention with batch_first, as in torch.nn.MultiheadAttention",
                fix="pass padded tensors and a key_padding_mask",
            )
        lengths = [part.shape[0] for part in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        positions = torch.arange(max(lengths), device=query.device)
        padding = positions >= torch.tensor(lengths, device=query.device).unsqueeze(1)
        output, weights = self(padded, padded, padded, padding, need_weights, None, average)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(output, lengths, strict=True)]), weights

    def extra_repr(self) -> str:
        return f"width={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, scale={self.scale:.6g}"


def _added(name: str, mask: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The mask in floats to add to scores: -inf where a boolean one is True."""
    if tuple(mask.shape) != shape:
        raise SurgeryError(
            f"{name} of shape {list(mask.shape)}",
            expected=f"shape {list(shape)}",
            fix="make the mask of the attention's own sizes; heads may have been removed",
        )
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise SurgeryError(
            f"{name} of dtype {mask.dtype}", expected="bool or a floating dtype", fix="convert it, e.g. with .bool()"
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
