"""How much each layer keeps, given how much the network keeps. Pure numbers; scores are not looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from ..errors import ConfigError, TicketError, nearest

Distribution = Literal["global", "uniform", "erk", "layer"]
Shapes = Mapping[str, Sequence[int]]
"""Shapes of weights by name."""

Share = float | Fraction
"""A part of something; fractions stay exact, floats count as the decimal number they print as."""

Shares = Share | Mapping[str, Share]
"""The surviving share: one number is of all layers together (scores decide which), a mapping is layer by layer."""


def densities(
    shapes: Shapes, density: float | Mapping[str, float], distribution: Distribution = "global"
) -> float | dict[str, float]:
    """How much each layer keeps.

    * ``"global"``: one pool; the scores decide, so the density itself is returned.
    * ``"uniform"``: the same share of every layer.
    * ``"erk"``: Erdős–Rényi with kernel (Evci et al. 2020): a layer's density is ``ε · Σ shape / Π shape``, so that
      small layers stay denser. ε makes the whole come to ``density``; layers that would exceed 1 stay dense, and ε is
      solved again for the others.
    * ``"layer"``: ``density`` is the mapping by name itself.

    Raises:
        ConfigError: an unknown distribution, a density outside (0, 1], or one that is not of the kind asked for.
        TicketError: ``"layer"`` densities that do not name exactly the layers.
    """
    kinds = ("global", "uniform", "erk", "layer")
    if distribution not in kinds:
        raise ConfigError(
            f"unknown distribution {distribution!r}",
            expected=f"one of {', '.join(kinds)}",
            fix=f"{nearest(distribution, kinds)}mend the name",
        )
    if isinstance(density, Mapping) != (distribution == "layer"):
        raise ConfigError(
            f"distribution {distribution!r} with {'densities by layer' if isinstance(density, Mapping) else density}",
            expected="densities by layer for 'layer', one number for the others",
            fix="give the other kind of density, or another distribution",
        )
    if isinstance(density, Mapping):
        return _as_given(shapes, density)
    _refuse_density("density", density)
    if distribution == "uniform":
        return dict.fromkeys(shapes, density)
    return density if distribution == "global" else erk(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Densities by layer, none above 1, whose weights come to ``density`` of all weights together."""
    _refuse_density("density", density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        full = {name for name in shapes if name not in dense and scale * raw[name] >= 1.0}
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= full  # making them dense raises the scale, so none of them would have to be undone
    return dict.fromkeys(shapes, 1.0)


def counts(shapes: Shapes, shares: Shares) -> int | dict[str, int]:
    """Shares as numbers of weights: of all layers together, or by layer and at least one each.

    The numbers of the layers come to the rounded total, the largest remainders being rounded up.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if not isinstance(shares, Mapping):
        return round(exact(shares) * sum(sizes.values()))
    wanted = {name: exact(shares[name]) * size for name, size in sizes.items()}
    found = _rounded(wanted, round(sum(wanted.values(), Fraction(0))))
    return {name: max(1, count) for name, count in found.items()}


def apportion(parts: Mapping[str, Share], room: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers in proportion to ``parts``, none above its room, that come to ``total`` or to all the room.

    What does not fit into one goes to the others. Each is one at least, at the cost of the largest.

    Args:
        parts: positive numbers by name.
        room: whole numbers of one or more, by the same names.
        total: as many as names, or more.
    """
    total = min(total, sum(room.values()))
    weights = {name: exact(part) for name, part in parts.items()}
    full: set[str] = set()
    while True:
        left = total - sum(room[name] for name in full)
        scale = Fraction(left) / sum((weights[name] for name in weights if name not in full), Fraction(0))
        over = {name for name in weights if name not in full and weights[name] * scale >= room[name]}
        full |= over
        if not over or len(full) == len(weights):
            break
    wanted = {name: Fraction(room[name]) if name in full else weights[name] * scale for name in weights}
    found = {name: max(1, count) for name, count in _rounded(wanted, total).items()}
    while sum(found.values()) > total:  # what ones at least cost
        found[max(found, key=lambda name: found[name])] -= 1
    return found


def _rounded(wanted: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole numbers that come to ``total``, the largest remainders being rounded up, equal ones in order."""
    found = {name: math.floor(share) for name, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: found[name] - wanted[name])
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


def exact(share: Share) -> Fraction:
    """The number that was meant: 1 - 0.7 is 3/10, not the float's 0.30000000000000004."""
    return share if isinstance(share, Fraction) else Fraction(share).limit_denominator(10**12)


def _as_given(shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    for name, share in density.items():
        _refuse_density(f"density of layer {name!r}", share)
    if density.keys() != shapes.keys():
        odd = next(iter(density.keys() ^ shapes.keys()))
        raise TicketError(
            f"densities are given for other layers than are pruned; for example {odd!r} is in one of the two only",
            expected=f"densities of {', '.join(list(shapes)[:4])} …",
            fix=f"{nearest(odd, list(shapes)) if odd in density else ''}name every layer once",
        )
    return {name: density[name] for name in shapes}


def _refuse_density(what: str, density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"{what} {density}", expected="a number inside (0, 1]", fix="1 keeps everything")
