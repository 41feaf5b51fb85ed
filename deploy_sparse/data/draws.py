"""Random numbers by position: the same key gives the same numbers, whoever asks and in whatever order."""

from __future__ import annotations

from enum import IntEnum

import torch

# SplitMix64 (Steele, Lea and Flood 2014); its constants as signed 64-bit numbers, whose products wrap alike
_STEP, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # fmt: skip


class Stream(IntEnum):
    """What numbers are for: the first part of their key, so that no two uses share any."""

    AUGMENTATION = 0
    TASK = 1
    PICTURES = 2


def uniforms(count: int, *key: int | torch.Tensor) -> torch.Tensor:
    """``count`` numbers in [0, 1) for each key, float64 ``[n, count]``.

    Args:
        key: the parts of the key: whole numbers, or ``[n]`` int64 for n keys at once.
    """
    state = torch.zeros(1, dtype=torch.int64)
    for part in key:
        state = _mixed(state + _STEP + torch.as_tensor(part, dtype=torch.int64))
    steps = _STEP * torch.arange(1, count + 1)  # [count]
    words = _mixed(state[:, None] + steps)  # [n, count]
    return _shifted_right(words, 11).to(torch.float64) * 2.0**-53


def _mixed(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shifted_right(words, 30)) * _FIRST
    words = (words ^ _shifted_right(words, 27)) * _SECOND
    return words ^ _shifted_right(words, 31)


def _shifted_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)  # >> alone repeats the sign
