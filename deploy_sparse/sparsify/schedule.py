"""When how much survives: densities after each step of a pruning schedule. Pure numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import ConfigError


def geometric(rate: float, rounds: int) -> float:
    """The density after ``rounds`` rounds of IMP: ``(1 - rate)^rounds`` (Chen et al. 2022, section 3.1).

    Raises:
        ConfigError: ``rate`` outside (0, 1), or a negative number of rounds.
    """
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"pruning rate {rate}", expected="a number inside (0, 1)", fix="choose for example 0.2")
    if rounds < 0:
        raise ConfigError(f"{rounds} rounds", expected="0 or more", fix="0 is the dense network")
    return float((1.0 - rate) ** rounds)


def one_shot(density: float, steps: int = 1) -> tuple[float, ...]:
    """Everything in the first of ``steps`` steps."""
    _refuse(density, steps)
    return (density,) * steps


def exponential(density: float, steps: int) -> tuple[float, ...]:
    """``density^(k / steps)`` after step k: the same share of the survivors goes in every step (SynFlow)."""
    _refuse(density, steps)
    return (*(float(density ** (k / steps)) for k in range(1, steps)), density)


def cubic(density: float, steps: int) -> tuple[float, ...]:
    """Sparsity ``s · (1 - (1 - k / steps)³)`` after step k: fast first, slow at the end (Zhu and Gupta 2017)."""
    _refuse(density, steps)
    return (*(density + (1.0 - density) * (1.0 - k / steps) ** 3 for k in range(1, steps)), density)


SCHEDULES: Mapping[str, Callable[[float, int], tuple[float, ...]]] = {
    "one_shot": one_shot,
    "exponential": exponential,
    "cubic": cubic,
}
"""By name: from the final density and the number of steps to the density after each step, never rising."""


def _refuse(density: float, steps: int) -> None:
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density {density}", expected="a number inside (0, 1]", fix="1 keeps everything")
    if steps < 1:
        raise ConfigError(f"{steps} pruning steps", expected="1 or more", fix="1 prunes at once")
