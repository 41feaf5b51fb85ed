"""Random networks: pieces of every kind in a row between a stem and a head.

``NETWORKS`` is the hypothesis strategy. A drawn network is a value (:class:`Drawn`); ``build()`` is its factory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import random_gates  # noqa: F401 - fills MAPS
import random_maps  # noqa: F401 - fills MAPS
import random_tokens  # noqa: F401 - fills TOKENS
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_pieces import DIMS, HEADS, MAPS, TOKENS, Piece, Rows, Spec, unit
from surgery_nets import ACTS, randomised
from torch import nn

TRACED, OTHER = (2, 3, 8, 8), (3, 3, 12, 10)
LARGEST = 16  # positions along an axis; larger maps are pooled
MAP_HEADS, TOKEN_HEADS = ("pool", "flatten", "whole", "two"), ("mean", "first")


@dataclass(frozen=True)
class Drawn:
    """A random network in float64: a stem, pieces on maps, pieces on tokens where there are any, and a head.

    ``frozen``: every second parameter takes no gradient.
    """

    maps: tuple[Spec, ...]
    tokens: tuple[Spec, ...] = ()
    head: str = "pool"
    frozen: bool = False

    def build(self) -> RandomNetwork:
        network = RandomNetwork(self)
        for number, parameter in enumerate(network.parameters()):
            parameter.requires_grad_(not self.frozen or number % 2 == 0)
        return network.double()


class ToTokens(Piece):
    """2 × 2 patches as tokens."""

    silent = ("patches.weight",)

    def construct(self, c, spec, size):
        self.patches = nn.Conv2d(c, HEADS * DIMS, 2, 2, padding=int(min(size) < 2), bias=spec.bias)

    def forward(self, x):
        return self.patches(x).flatten(2).transpose(1, 2)


class Head(Piece):
    """A hidden Linear layer and the classifier, behind one of several ways to reach a fixed length."""

    free = ("hidden.weight",)

    def construct(self, c, spec, size):
        self.kind = spec.kind
        c = c * {"flatten": 4, "whole": math.prod(size)}.get(spec.kind, 1)
        self.hidden, self.out = nn.Linear(c, 6), nn.Linear(6, 5)
        self.second = nn.Linear(6, 2) if spec.kind == "two" else None
        self.fixed = spec.kind == "whole"

    def features(self, x):
        if self.kind in TOKEN_HEADS:
            return x.mean(1) if self.kind == "mean" else x[:, 0]
        pooled = x if self.kind == "whole" else F.adaptive_avg_pool2d(x, 2 if self.kind == "flatten" else 1)
        return torch.flatten(pooled, 1)

    def forward(self, x):
        hidden = F.gelu(self.hidden(self.features(x)))
        return self.out(hidden) if self.second is None else {"out": self.out(hidden), "second": self.second(hidden)}


class RandomNetwork(nn.Module):
    """What :class:`Drawn` describes. Each piece is built for the channels and the size that reach it."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.stem, self.steps = unit(TRACED[1], 4, Spec("", norm=True), 3), nn.ModuleList()
        x = torch.zeros(TRACED[0], 4, *TRACED[2:])
        for spec in drawn.maps:
            x = self._append(MAPS[spec.kind], spec, x)
            if max(x.shape[2:]) > LARGEST:
                self.steps.append(nn.AvgPool2d(2))
                x = self.steps[-1](x)
        if drawn.tokens:
            x = self._append(ToTokens, Spec("", bias=drawn.tokens[0].bias), x)
            for spec in drawn.tokens:
                x = self._append(TOKENS[spec.kind], spec, x)
        self._append(Head, Spec(drawn.head), x)
        self.train()

    def forward(self, x):
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return x

    def _append(self, kind: type[Piece], spec: Spec, x: torch.Tensor) -> torch.Tensor:
        c, size = (x.shape[1], tuple(x.shape[2:])) if x.dim() == 4 else (x.shape[2], (x.shape[1],))
        self.steps.append(kind(c, spec, size).eval())
        with torch.no_grad():
            return self.steps[-1](x)

    def pieces(self) -> dict[str, Piece]:
        return {f"steps.{n}.": step for n, step in enumerate(self.steps) if isinstance(step, Piece)}

    def shrinks(self) -> dict[str, Rows]:
        """Every weight whose emptied rows must go, by its name in the state dict."""
        found = {"stem.0.weight": Rows((4,), live=True)}
        on_stream = [piece for piece in self.pieces().values() if isinstance(piece, (ToTokens, *TOKENS.values()))]
        held = len(on_stream) > 2 and any(piece.patterns for piece in on_stream)
        for prefix, piece in self.pieces().items():
            stays = piece.silent if held and piece in on_stream else ()
            found |= {prefix + name: rows for name, rows in piece.shrinks().items() if name not in stays}
        return found

    def takes(self, shape: tuple[int, ...]) -> bool:
        return shape[1:] == TRACED[1:] or not any(p.fixed for p in self.pieces().values())

    def is_random(self) -> bool:
        """Two runs in training mode differ."""
        return any(p.random for p in self.pieces().values())


def dense_of(drawn: Drawn, seed: int) -> RandomNetwork:
    """The drawn network with random weights and statistics."""
    network = drawn.build()
    randomised(network, seed)
    return network


def _specs(kinds: Mapping[str, type[Piece]]) -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec,
        kind=st.sampled_from(sorted(kinds)),
        width=st.integers(3, 6),
        bias=st.booleans(),
        norm=st.booleans(),
        act=st.sampled_from(sorted(ACTS)),
    )


def networks(
    maps: Mapping[str, type[Piece]] = MAPS, tokens: Mapping[str, type[Piece]] = TOKENS
) -> st.SearchStrategy[Drawn]:
    """Networks of one to four pieces on maps and, for a third of them, one or two on tokens."""
    on_maps = st.lists(_specs(maps), min_size=1, max_size=4).map(tuple)
    plain = st.builds(Drawn, on_maps, st.just(()), st.sampled_from(MAP_HEADS), st.booleans())
    few_maps = st.lists(_specs(maps), max_size=1).map(tuple)
    on_tokens = st.lists(_specs(tokens), min_size=1, max_size=2).map(tuple)
    transformers = st.builds(Drawn, few_maps, on_tokens, st.sampled_from(TOKEN_HEADS), st.booleans())
    return st.one_of(plain, plain, transformers)


NETWORKS = networks()
ALONE = {
    **{kind: Drawn((Spec(kind),)) for kind in MAPS},
    **{kind: Drawn((), (Spec(kind),), head="mean") for kind in TOKENS},
    **{f"head {head}": Drawn((Spec("Chain"),), head=head) for head in MAP_HEADS},
    "head first": Drawn((), (Spec("ClassToken"), Spec("FusedSdpa")), head="first"),
}
"""One small network for each kind and each head."""
