"""Pieces of random networks on feature maps ``[N, C, H, W]``: what happens between layers, from gates to windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_pieces import DIMS, HEADS, Piece, Rows, on_maps, unit
from torch import nn


class Pointwise(Piece):
    """Something done to channels one by one, between two convolutions."""

    free = ("enter.0.weight", "leave.weight")

    def construct(self, c, spec, size):
        self.enter, self.leave = unit(c, spec.width, spec), nn.Conv2d(spec.width, spec.width, 3, padding=1)
        self.prepare(spec.width, spec)

    def prepare(self, width, spec):
        pass

    def between(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.leave(self.between(self.enter(x)))


@on_maps
class PReLU(Pointwise):
    def prepare(self, width, spec):
        self.prelu = nn.PReLU(width)

    def between(self, x):
        return self.prelu(x)


@on_maps
class UserParameters(Pointwise):
    """Parameters of the network's own, and a convolution with one."""

    free = ("enter.0.weight", "kernel", "leave.weight")

    def prepare(self, width, spec):
        self.scale, self.shift = nn.Parameter(torch.ones(width, 1, 1)), nn.Parameter(torch.ones(width))
        self.kernel = nn.Parameter(torch.ones(width, width, 1, 1))

    def between(self, x):
        return F.conv2d(x * self.scale - self.shift.view(1, -1, 1, 1), self.kernel)


@on_maps
class Branching(Pointwise):
    """Leaky by hand: a comparison chooses."""

    def between(self, x):
        return torch.where(x > 0.1, x - 0.1, 0.1 * x).clamp(max=3.0)


@on_maps
class PoolFull(Pointwise):
    def between(self, x):
        return F.avg_pool2d(x, 2, 1) + F.max_pool2d(x, 2, 1)


@on_maps
class PoolPadded(Pointwise):
    """Zeros of the padding are averaged in: a live channel is no constant behind it."""

    free, silent = ("leave.weight",), ("enter.0.weight",)

    def between(self, x):
        return F.avg_pool2d(x, 3, 1, 1)


@on_maps
class Interpolate(Pointwise):
    def between(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


@on_maps
class Excite(Pointwise):
    """Squeeze-excite: one gate for each channel."""

    free = ("enter.0.weight", "down.weight", "up.weight", "leave.weight")

    def prepare(self, width, spec):
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def between(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


@on_maps
class Opaque(Pointwise):
    """An operation nobody knows; only what lies behind it can go."""

    free = ("leave.weight",)

    def between(self, x):
        return x.cumsum(1)


@on_maps
class Mixed(Pointwise):
    """A norm written out by hand: channels meet each other."""

    free = ("leave.weight",)

    def between(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1)


@on_maps
class SkipUp(Piece):
    """A coarse branch scaled up to the size of the fine one, and appended to it."""

    free = ("coarse.0.weight", "leave.weight")

    def construct(self, c, spec, size):
        self.coarse, self.leave = unit(c, spec.width, spec, 3), nn.Conv2d(c + spec.width, c, 3, padding=1)

    def forward(self, x):
        coarse = self.coarse(F.max_pool2d(x, 2, 2, ceil_mode=True))
        return self.leave(torch.cat([x, F.interpolate(coarse, size=x.shape[-2:])], 1))


class Halves(Piece):
    """Two halves of one layer's channels, one gating the other."""

    free = ("leave.weight",)

    def construct(self, c, spec, size):
        w = self.w = spec.width
        self.enter, self.leave = unit(c, 2 * w, spec), nn.Conv2d(w, w, 3, padding=1)

    def grids(self):
        return {"enter.0.weight": Rows((2, self.w), {"half": 1}, live=True)}

    def halves(self, x):
        raise NotImplementedError

    def forward(self, x):
        value, gate = self.halves(self.enter(x))
        return self.leave(value * torch.sigmoid(gate))


@on_maps
class Chunk(Halves):
    def halves(self, x):
        return x.chunk(2, 1)


@on_maps
class SplitByShape(Halves):
    def halves(self, x):
        return x.split(x.shape[1] // 2, dim=1)


@on_maps
class SplitByAttribute(Halves):
    """The code reads a number that construction left; whether it can follow is the surgeon's affair."""

    def grids(self):
        return {}

    def halves(self, x):
        return torch.split(x, [self.w, self.w], 1)


@on_maps
class Sliced(Halves):
    """Positions written into the code."""

    def grids(self):
        return {}

    def halves(self, x):
        return x[:, : self.w], x[:, self.w :]


@on_maps
class Shuffle(Piece):
    """ShuffleNet: half of the channels pass by, then the halves are interleaved."""

    free = ("leave.weight",)

    def construct(self, c, spec, size):
        w = self.w = spec.width
        self.enter, self.branch, self.leave = unit(c, 2 * w, spec), unit(w, w, spec, 3), nn.Conv2d(2 * w, w, 1)

    def grids(self):
        return {"enter.0.weight": Rows((2, self.w), {"half": 1}), "branch.0.weight": Rows((self.w,), {"half": 0})}

    def forward(self, x):
        passing, treated = self.enter(x).chunk(2, dim=1)
        x = torch.cat([passing, self.branch(treated)], dim=1)
        n, c, h, w = x.shape
        return self.leave(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@on_maps
class PixelShuffle(Piece):
    free = ("leave.weight",)

    def construct(self, c, spec, size):
        self.w = spec.width
        self.enter, self.leave = unit(c, 4 * spec.width, spec), nn.Conv2d(spec.width, spec.width, 3, padding=1)

    def grids(self):
        return {"enter.0.weight": Rows((self.w, 4), {"channel": 0})}

    def forward(self, x):
        return self.leave(F.pixel_shuffle(self.enter(x), 2))


@on_maps
class PixelUnshuffle(Piece):
    free = ("enter.0.weight", "leave.weight")

    def construct(self, c, spec, size):
        self.enter, self.leave = unit(c, spec.width, spec), nn.Conv2d(4 * spec.width, spec.width, 1)

    def forward(self, x):
        return self.leave(F.pixel_unshuffle(F.interpolate(self.enter(x), scale_factor=2), 2))


@on_maps
class Windows(Piece):
    """Attention in windows with a table of relative positions, as in Swin; maps are padded to whole windows."""

    window = 4
    free = ("leave.weight",)
    silent = ("enter.weight", "proj.weight")

    def construct(self, c, spec, size):
        width, side = HEADS * DIMS, self.window
        self.heads, self.scale = HEADS, DIMS**-0.5
        self.enter, self.norm = nn.Conv2d(c, width, 1), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=spec.bias), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, HEADS))
        at = torch.arange(side * side)
        rows, columns = at // side, at % side
        apart = (rows[:, None] - rows + side - 1) * (2 * side - 1) + columns[:, None] - columns + side - 1
        self.register_buffer("index", apart.flatten())
        self.leave = nn.Conv2d(width, spec.width, 1)

    def grids(self):
        return {"qkv.weight": Rows((3, HEADS, DIMS), {"heads": 1, "dims": 2})}

    def attend(self, x):  # [windows, positions, width]
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].view(length, length, -1).permute(2, 0, 1).unsqueeze(0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))

    def forward(self, x):
        stream, side = self.enter(x), self.window
        x = self.norm(stream.permute(0, 2, 3, 1))
        n, height, width, c = x.shape
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(n, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side * side, c)
        x = self.attend(x).view(n, rows, columns, side, side, -1).transpose(2, 3)
        x = x.reshape(n, rows * side, columns * side, -1)[:, :height, :width]
        return self.leave(stream + x.permute(0, 3, 1, 2))
