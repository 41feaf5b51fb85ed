"""Pieces of random networks on feature maps ``[N, C, H, W]``: convolutions, shortcuts, norms, shared layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_pieces import Piece, Rows, on_maps, unit
from surgery_nets import ACTS
from torch import nn


@on_maps
class Chain(Piece):
    free = ("body.0.weight",)

    def construct(self, c, spec, size):
        self.body = unit(c, spec.width, spec, 3, padding=int(min(size) < 5 or spec.bias))

    def forward(self, x):
        return self.body(x)


@on_maps
class Strided(Piece):
    free = ("body.0.weight",)

    def construct(self, c, spec, size):
        self.body, self.pool = unit(c, spec.width, spec, 3, stride=2), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        return self.pool(self.body(x))


@on_maps
class Residual(Piece):
    free = ("body.0.weight",)

    def construct(self, c, spec, size):
        self.body = unit(c, c, spec, 3)

    def forward(self, x):
        return x + self.body(x)


@on_maps
class Projection(Piece):
    free = ("a.0.weight", "b.0.weight", "short.weight")

    def construct(self, c, spec, size):
        self.a, self.b = unit(c, spec.width, spec, 3), unit(spec.width, spec.width, spec)
        self.short = nn.Conv2d(c, spec.width, 1, bias=spec.bias)

    def forward(self, x):
        y = self.b(self.a(x))
        y += self.short(x)
        return torch.relu_(y)


@on_maps
class StochasticDepth(Piece):
    """Whole samples of a branch are dropped in training."""

    free = ("body.0.weight",)
    random = True

    def construct(self, c, spec, size):
        self.body, self.rate = unit(c, c, spec, 3), 0.5

    def forward(self, x):
        y = F.dropout(self.body(x), self.rate, self.training)
        if self.training:
            y = y * (torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device) > self.rate) / (1 - self.rate)
        return x + y


@on_maps
class Concat(Piece):
    """DenseNet: a norm of all that came before, new channels appended."""

    free = ("body.0.weight",)

    def construct(self, c, spec, size):
        self.norm, self.body = nn.BatchNorm2d(c), unit(c, spec.width, spec, 3)

    def forward(self, x):
        return torch.cat([x, self.body(torch.relu(self.norm(x)))], 1)


@on_maps
class Branches(Piece):
    free = ("one.0.weight", "three.0.weight", "after.0.weight", "mix.weight")

    def construct(self, c, spec, size):
        w = spec.width
        self.one, self.three, self.after = unit(c, w, spec), unit(c, w + 1, spec, 3), unit(c, w, spec)
        self.mix = nn.Conv2d(3 * w + 1, w, 3, padding=1)

    def forward(self, x):
        return self.mix(torch.cat([self.one(x), self.three(x), self.after(F.max_pool2d(x, 3, 1, 1))], dim=1))


@on_maps
class Inverted(Piece):
    """Expansion, depthwise filters, projection, around them a shortcut."""

    free = ("expand.0.weight", "depthwise.0.weight", "project.weight")

    def construct(self, c, spec, size):
        w = 2 * spec.width
        self.expand, self.depthwise = unit(c, w, spec), unit(w, w, spec, 3, groups=w)
        self.project = nn.Conv2d(w, c, 1, bias=spec.bias)

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


@on_maps
class Multiplier(Piece):
    """Two depthwise filters for each channel."""

    silent = ("enter.0.weight", "leave.weight")

    def construct(self, c, spec, size):
        w = spec.width
        self.enter, self.depthwise = unit(c, w, spec), unit(w, 2 * w, spec, 3, groups=w)
        self.leave = nn.Conv2d(2 * w, w, 1)

    def forward(self, x):
        return self.leave(self.depthwise(self.enter(x)))


@on_maps
class Grouped(Piece):
    free = ("leave.weight",)

    def construct(self, c, spec, size):
        w = self.w = spec.width
        self.enter, self.mid = unit(c, 2 * w, spec), unit(2 * w, 2 * w, spec, 3, groups=2)
        self.leave = nn.Conv2d(2 * w, w, 1)

    def grids(self):
        return {"enter.0.weight": Rows((2, self.w), {"in": 1}), "mid.0.weight": Rows((2, self.w), {"out": 1})}

    def forward(self, x):
        return self.leave(self.mid(self.enter(x)))


@on_maps
class Transposed(Piece):
    def construct(self, c, spec, size):
        w = self.w = spec.width
        self.up, self.norm, self.act = nn.ConvTranspose2d(c, w, 2, 2, bias=spec.bias), nn.BatchNorm2d(w), nn.ReLU()
        self.same = nn.ConvTranspose2d(w, w, 3, padding=1)

    def grids(self):
        return {name: Rows((self.w,), live=True, dim=1) for name in ("up.weight", "same.weight")}

    def forward(self, x):
        return self.same(self.act(self.norm(self.up(x))))


@on_maps
class ConvNeXt(Piece):
    """Depthwise filters, LayerNorm channels-last, two Linear layers, layer scale, shortcut."""

    free = ("fc1.weight", "leave.weight")
    silent = ("enter.weight", "depthwise.weight", "fc2.weight")

    def construct(self, c, spec, size):
        w = spec.width
        self.enter, self.depthwise = nn.Conv2d(c, w, 1), nn.Conv2d(w, w, 3, padding=1, groups=w)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(w), nn.Linear(w, 2 * w), nn.Linear(2 * w, w)
        self.scale, self.leave = nn.Parameter(torch.ones(w, 1, 1)), nn.Conv2d(w, w, 3, padding=1)

    def forward(self, x):
        x = self.enter(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return self.leave(x + self.scale * y)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Normed(Piece):
    """A norm that is no BatchNorm, over a stream that two layers write."""

    free = ("leave.weight",)
    silent = ("enter.weight", "body.weight")

    def norm_of(self, width):
        raise NotImplementedError

    def construct(self, c, spec, size):
        w = self.w = 2 * spec.width
        self.enter, self.body = nn.Conv2d(c, w, 1, bias=spec.bias), nn.Conv2d(w, w, 3, padding=1, bias=spec.bias)
        self.norm, self.last, self.act = self.norm_of(w), self.norm_of(w), ACTS[spec.act]()
        self.leave = nn.Conv2d(w, spec.width, 3, padding=1)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(self.act(self.last(x + self.body(self.act(self.norm(x))))))


@on_maps
class LayerNormFirst(Normed):
    def norm_of(self, width):
        return LayerNorm2d(width)


@on_maps
class OneGroup(Normed):
    def norm_of(self, width):
        return nn.GroupNorm(1, width)


@on_maps
class TwoGroups(Normed):
    silent = ()

    def norm_of(self, width):
        return nn.GroupNorm(2, width)

    def grids(self):
        return dict.fromkeys(("enter.weight", "body.weight"), Rows((2, self.w // 2), {"channel": 1}))


@on_maps
class Instance(Normed):
    def norm_of(self, width):
        return nn.InstanceNorm2d(width, affine=True)


class RMSNormLast(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.rms = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x):
        return self.rms(x.movedim(1, -1)).movedim(-1, 1)


@on_maps
class RootMeanSquare(Normed):
    def norm_of(self, width):
        return RMSNormLast(width)


@on_maps
class SharedModule(Piece):
    """One block, called twice."""

    free = ("leave.weight",)
    silent = ("enter.weight", "body.0.weight")

    def construct(self, c, spec, size):
        w = spec.width
        self.enter, self.body, self.leave = nn.Conv2d(c, w, 1), unit(w, w, spec, 3), nn.Conv2d(w, w, 1)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.body(x)
        return self.leave(x + self.body(x))


@on_maps
class TiedWeights(Piece):
    """Two convolutions with one weight, each with its own bias."""

    free = ("leave.weight",)
    silent = ("enter.weight", "first.weight")

    def construct(self, c, spec, size):
        w = spec.width
        self.enter, self.leave = nn.Conv2d(c, w, 1), nn.Conv2d(w, w, 1)
        self.first, self.second = nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.leave(torch.relu(self.second(torch.relu(self.first(self.enter(x))))))
