"""What is known about every tensor of a traced network: which channel each element belongs to, and constant values.

A channel is an integer *atom*. Atoms that must live and die together are joined (union-find). Both the atoms and the
constants of a tensor are kept at the tensor's own shape, with stride 0 along every axis on which nothing changes, so
reshaping, slicing and concatenating them are the very operations the network applies to its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

UNTRACKED = -1
"""The atom of elements that belong to no channel one could remove."""


@dataclass(frozen=True)
class Value:
    """One tensor of the traced network.

    Attributes:
        atoms: int64, the tensor's shape; the channel of each element, or ``UNTRACKED``.
        constant: float64, the tensor's shape; the element's value where it is the same for every input, else NaN.
        producer: weight name of the one layer that writes these channels, None after a merge.
        why: for untracked elements, what hides their channels; completes "meets …" in a message.
        state: the tensor is a parameter or a buffer, no activation.
    """

    atoms: torch.Tensor
    constant: torch.Tensor
    producer: str | None = None
    why: str = ""
    state: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.atoms.shape

    @property
    def tracked(self) -> bool:
        return bool((lean(self.atoms) >= 0).any())


def untracked(shape: Sequence[int], why: str, constant: torch.Tensor | None = None) -> Value:
    """A tensor of ``shape`` without removable channels; its values are unknown unless ``constant`` is given."""
    atoms = torch.full((), UNTRACKED).expand(tuple(shape))
    return Value(atoms, unknown_constant(shape) if constant is None else constant, why=why)


def unknown_constant(shape: Sequence[int]) -> torch.Tensor:
    """Float64 NaN of ``shape``: nothing is known about any element."""
    return torch.full((), torch.nan, dtype=torch.float64).expand(tuple(shape))


def lean(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with size 1 along each axis on which it is only repeated."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def compressed(tensor: torch.Tensor) -> torch.Tensor:
    """The same content and shape, with stride 0 along each axis on which the content does not change."""
    shape, small = tensor.shape, lean(tensor)
    for dim in range(small.dim()):
        if small.size(dim) > 1:
            first = small.narrow(dim, 0, 1)
            same = small == first
            if small.is_floating_point():
                same = same | (small.isnan() & first.isnan())
            small = first if bool(same.all()) else small
    return small.expand(shape)


def varying(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes of a compressed tensor along which its content changes."""
    return tuple(d for d in range(tensor.dim()) if tensor.size(d) > 1 and tensor.stride(d) != 0)


def along(vector: torch.Tensor, dim: int, shape: Sequence[int]) -> torch.Tensor:
    """``vector`` ``[shape[dim]]`` laid along axis ``dim`` of ``shape``, repeated along all others."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.reshape(view).expand(tuple(shape))


def even(constant: torch.Tensor, dims: Iterable[int]) -> torch.Tensor:
    """``constant`` with size 1 along ``dims``; NaN where it changes along them."""
    first = constant
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    changing = tuple(sorted(set(varying(constant)) & set(dims)))
    if not changing:
        return first
    return torch.where((lean(constant) == lean(first)).all(dim=changing, keepdim=True), first, torch.nan)


class Atoms:
    """Union-find over channels, with the reason for each channel that must stay."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pins: dict[int, str] = {}

    def fresh(self, count: int) -> torch.Tensor:
        """``count`` new channels, int64 ``[count]``, ascending."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, atom: int) -> int:
        """The smallest atom joined with ``atom``."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, atoms: torch.Tensor) -> torch.Tensor:
        """The same tensor with each atom replaced by the smallest one joined with it."""
        small = lean(atoms)
        values, where = torch.unique(small, return_inverse=True)
        found = torch.tensor([self.find(a) if a >= 0 else a for a in values.tolist()], dtype=torch.int64)
        return found[where].expand(atoms.shape)

    def unify(self, left: torch.Tensor, right: torch.Tensor, why: str) -> None:
        """Join two broadcastable atom tensors element by element; a channel that meets an untracked one is pinned."""
        left, right = lean(left), lean(right)
        left, right = left + torch.zeros_like(right), right + torch.zeros_like(left)  # both at the common shape
        pairs = torch.stack([left.reshape(-1), right.reshape(-1)], dim=1)  # [n, 2]
        for a, b in torch.unique(pairs, dim=0).tolist():
            if a < 0 or b < 0:
                self._pin_one(max(a, b), why)
            else:
                first, second = sorted((self.find(a), self.find(b)))
                self._parent[second] = first

    def pin(self, atoms: torch.Tensor, why: str) -> None:
        """Make every channel in ``atoms`` stay; the first reason given is the one reported."""
        for atom in torch.unique(lean(atoms)).tolist():
            self._pin_one(atom, why)

    def pins(self) -> dict[int, str]:
        """Reason by channel (its smallest atom); the reason given first wins."""
        found: dict[int, str] = {}
        for atom, why in self._pins.items():
            found.setdefault(self.find(atom), why)
        return found

    def _pin_one(self, atom: int, why: str) -> None:
        if atom >= 0:
            self._pins.setdefault(atom, why)
