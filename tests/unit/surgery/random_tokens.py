"""Pieces of random networks on token sequences ``[N, L, HEADS * DIMS]``: attention, gated and mixing layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_pieces import DIMS, HEADS, Piece, Rows, on_tokens
from torch import nn

HEADS_OR_DIMS = {"heads": 0, "dims": 1}


@on_tokens
class Mlp(Piece):
    """LayerNorm, two Linear layers, layer scale, shortcut."""

    free, silent = ("fc1.weight",), ("fc2.weight",)

    def construct(self, c, spec, size):
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(c), nn.Linear(c, 2 * spec.width), nn.Linear(2 * spec.width, c)
        self.scale = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


@on_tokens
class GatedMlp(Piece):
    """RMSNorm, and one Linear layer for values and gates."""

    silent = ("out.weight",)

    def construct(self, c, spec, size):
        self.w = spec.width
        self.norm, self.both = nn.RMSNorm(c, eps=1e-6), nn.Linear(c, 2 * self.w, bias=spec.bias)
        self.out = nn.Linear(self.w, c)

    def grids(self):
        return {"both.weight": Rows((2, self.w), {"half": 1}, live=True)}

    def forward(self, x):
        value, gate = self.both(self.norm(x)).chunk(2, dim=-1)
        return x + self.out(value * F.silu(gate))


class Fused(Piece):
    """Attention with one Linear layer for queries, keys and values."""

    silent = ("proj.weight",)

    def construct(self, c, spec, size):
        self.heads, self.scale = HEADS, DIMS**-0.5
        self.norm, self.qkv = nn.LayerNorm(c), nn.Linear(c, 3 * HEADS * DIMS, bias=spec.bias)
        self.proj = nn.Linear(HEADS * DIMS, c)

    def grids(self):
        return {"qkv.weight": Rows((3, HEADS, DIMS), {"heads": 1, "dims": 2})}

    def mix(self, q, k, v):
        raise NotImplementedError

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(self.mix(q, k, v).transpose(1, 2).reshape(n, length, -1))


@on_tokens
class FusedSoftmax(Fused):
    def mix(self, q, k, v):
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@on_tokens
class FusedSdpa(Fused):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


@on_tokens
class ThreeSdpa(Piece):
    """Three Linear layers; the head size is an attribute that the code reads, the scale comes from the tensor."""

    silent = ("out.weight",)

    def construct(self, c, spec, size):
        self.heads, self.head_size = HEADS, DIMS
        self.q, self.k, self.v = (nn.Linear(c, HEADS * DIMS, bias=spec.bias) for _ in range(3))
        self.out = nn.Linear(HEADS * DIMS, c)

    def grids(self):
        return dict.fromkeys(("q.weight", "k.weight", "v.weight"), Rows((HEADS, DIMS), HEADS_OR_DIMS))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, self.heads, self.head_size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return x + self.out(self.mix(q, k, v).transpose(1, 2).contiguous().view(n, length, -1))


@on_tokens
class ThreeSoftmax(ThreeSdpa):
    def mix(self, q, k, v):
        return torch.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.5, -1).matmul(v)


@on_tokens
class Coupled(Piece):
    """The width of the stream is taken for that of all heads together: they could only shrink alike."""

    silent = ("leave.weight",)

    def construct(self, c, spec, size):
        width = HEADS * DIMS
        self.heads, self.enter, self.leave = HEADS, nn.Linear(c, width), nn.Linear(width, c)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        y = self.enter(x)
        n, length, c = y.shape
        q, k, v = self.qkv(y).reshape(n, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = y + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, c))
        return x + self.leave(y)


@on_tokens
class Multihead(Piece):
    """``nn.MultiheadAttention``, with and without its weights asked for."""

    silent = ("attention.out_proj.weight",)

    def construct(self, c, spec, size):
        self.attention = nn.MultiheadAttention(c, HEADS, bias=spec.bias, batch_first=True)
        self.norm, self.weights = nn.LayerNorm(c), spec.norm

    def grids(self):
        return {"attention.in_proj_weight": Rows((3, HEADS, DIMS), {"heads": 1, "dims": 2})}

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=self.weights)[0]


@on_tokens
class EncoderLayer(Piece):
    """``nn.TransformerEncoderLayer``, whose inference runs one fused kernel in the dense network."""

    free = ("layer.linear1.weight",)
    silent = ("layer.linear2.weight", "layer.self_attn.out_proj.weight")

    def construct(self, c, spec, size):
        self.layer = nn.TransformerEncoderLayer(
            c, HEADS, 2 * spec.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=spec.norm
        )

    def grids(self):
        return {"layer.self_attn.in_proj_weight": Rows((3, HEADS, DIMS), {"heads": 1, "dims": 2})}

    def forward(self, x):
        return self.layer(x)


@on_tokens
class ClassToken(Piece):
    """A learned token in front, and a learned vector added at every position."""

    fixed = True

    def construct(self, c, spec, size):
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, c)), nn.Parameter(torch.zeros(1, size[0] + 1, c))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions


@on_tokens
class Mixer(Piece):
    """Linear layers along the tokens: they keep their sizes, while the stream's channels may go."""

    fixed, patterns = True, True

    def construct(self, c, spec, size):
        self.norm = nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(size[0], 2 * spec.width), nn.Linear(2 * spec.width, size[0])

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x).transpose(1, 2)))).transpose(1, 2)


@on_tokens
class Convolution1d(Piece):
    """Convolutions along the tokens, depthwise ones among them."""

    free = ("enter.weight", "depthwise.weight")
    silent = ("leave.weight",)

    def construct(self, c, spec, size):
        w = 2 * spec.width
        self.enter, self.depthwise = nn.Conv1d(c, w, 1, bias=spec.bias), nn.Conv1d(w, w, 3, padding=1, groups=w)
        self.norm, self.leave = nn.BatchNorm1d(w), nn.Conv1d(w, c, 1)

    def forward(self, x):
        y = self.norm(self.depthwise(self.enter(x.transpose(1, 2))))
        return x + self.leave(F.silu(y)).transpose(1, 2)


@on_tokens
class ByHand(Piece):
    """A LayerNorm written out: channels meet each other, so only what lies behind it can go."""

    silent = ("leave.weight",)

    def construct(self, c, spec, size):
        self.enter, self.leave = nn.Linear(c, spec.width), nn.Linear(spec.width, c)

    def forward(self, x):
        y = self.enter(x)
        return x + self.leave((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 0.1))
