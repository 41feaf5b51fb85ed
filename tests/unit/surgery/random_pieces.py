"""What the kinds of random networks have in common: what is drawn, what a kind promises, and the registries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from surgery_nets import ACTS
from torch import nn

HEADS, DIMS = 3, 4
"""Attention heads and the size of each; the stream of token networks is as wide as all heads together."""


@dataclass(frozen=True)
class Spec:
    """What is drawn of one piece: its kind by class name, its width, and the variations every kind reads as it can."""

    kind: str
    width: int = 4
    bias: bool = True
    norm: bool = True
    act: str = "leaky"


@dataclass(frozen=True)
class Rows:
    """Channels that a weight writes, laid out as a grid (heads × dims, parts × channels), row-major along ``dim``.

    Attributes:
        shape: the grid; one axis for ordinary weights.
        axes: grid axes, by name, along which whole coordinates can go. Weights of one piece with the same names lose
            the same coordinates. Empty for ordinary weights, of which any channel can go.
        live: the rows go even where biases and norms stay alive, so that the channels hold constants.
        dim: the weight's output dimension.
    """

    shape: tuple[int, ...]
    axes: Mapping[str, int] = field(default_factory=dict)
    live: bool = False
    dim: int = 0


class Piece(nn.Module):
    """One step of a random network, from ``c`` channels at ``size`` positions to however many it gives.

    Every piece leaves the channels it reads and those it writes free: what constrains or pins channels happens
    between an own ``enter`` and an own ``leave`` layer. So what must shrink is known for each kind by itself.

    Attributes:
        free: ordinary weights whose emptied rows must go, whether or not biases and norms are masked too.
        silent: those that must go where everything that belongs to the channel is masked.
        fixed: it takes the size it was built for only.
        random: it draws random numbers in training mode.
        patterns: silent channels of the stream hold a pattern of constants behind it, which a later norm counts.
    """

    free: ClassVar[tuple[str, ...]] = ()
    silent: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[bool] = False
    random: ClassVar[bool] = False
    patterns: ClassVar[bool] = False

    def __init__(self, c: int, spec: Spec, size: tuple[int, ...]) -> None:
        super().__init__()
        self.construct(c, spec, size)

    def construct(self, c: int, spec: Spec, size: tuple[int, ...]) -> None:
        raise NotImplementedError

    def grids(self) -> dict[str, Rows]:
        """Weights whose channels go by whole coordinates of a grid, or lie along another dimension than the first."""
        return {}

    def shrinks(self) -> dict[str, Rows]:
        """Every weight of this piece whose emptied rows must go."""
        plain = {name: Rows((len(self.get_parameter(name)),), live=True) for name in self.free}
        return plain | {name: Rows((len(self.get_parameter(name)),)) for name in self.silent} | self.grids()


MAPS: dict[str, type[Piece]] = {}
"""Kinds on feature maps ``[N, C, H, W]``, by class name."""
TOKENS: dict[str, type[Piece]] = {}
"""Kinds on token sequences ``[N, L, HEADS * DIMS]``, by class name; they keep the width."""


def on_maps(kind: type[Piece]) -> type[Piece]:
    MAPS[kind.__name__] = kind
    return kind


def on_tokens(kind: type[Piece]) -> type[Piece]:
    TOKENS[kind.__name__] = kind
    return kind


def unit(c_in: int, c_out: int, spec: Spec, kernel: int = 1, **options: int) -> nn.Sequential:
    """Convolution, BatchNorm where ``spec.norm``, activation; padded unless told otherwise."""
    options = {"padding": kernel // 2, **options}
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, bias=spec.bias, **options)]
    if spec.norm:
        layers.append(nn.BatchNorm2d(c_out))
    return nn.Sequential(*layers, ACTS[spec.act]())
