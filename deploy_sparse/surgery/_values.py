"""What is known about every tensor of a traced network: which channel each element belongs to, and constant values.

A channel is an integer *atom*. Atoms that must live and die together are joined (union-find). Both the atoms and the
constants of a tensor are kept at the tensor's own shape, with stride 0 along every axis on which nothing changes, so
reshaping, slicing and concatenating them are the very operations the network applies to its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
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
        sums_to_one: along the last axis, as after a softmax.
        scales_with: weight name of the layer whose rows and bias this tensor is a multiple of, None where it is not.
    """

    atoms: torch.Tensor
    constant: torch.Tensor
    producer: str | None = None
    why: str = ""
    state: bool = False
    scales_with: str | None = None
    sums_to_one: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.atoms.shape

    @cached_property
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
    strides = tensor.stride()
    if 0 not in strides:
        return tensor
    return tensor.as_strided([min(n, 1) if s == 0 else n for n, s in zip(tensor.shape, strides, strict=True)], strides)


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
        self._parent = np.array([UNTRACKED])  # the last one, which -1 finds, stands for untracked elements
        self._pin = np.empty(0, dtype=np.int64)  # number of the reason, -1 for none
        self._whys: list[str] = []
        self._settled = False
        self.count = 0
        self.joins = 0  # grows whenever smallest atoms change

    def fresh(self, count: int) -> torch.Tensor:
        """``count`` new channels, int64 ``[count]``, ascending."""
        start, self.count = self.count, self.count + count
        if self.count >= len(self._parent):
            room = max(1024, 2 * self.count)
            parent, pin = np.arange(room, dtype=np.int64), np.full(room, -1, dtype=np.int64)
            parent[:start], pin[:start] = self._parent[:start], self._pin[:start]
            parent[-1] = UNTRACKED
            self._parent, self._pin = parent, pin
        return torch.arange(start, self.count)

    def find(self, atom: int) -> int:
        """The smallest atom joined with ``atom``."""
        return int(self._roots(np.array([atom]))[0])

    def roots(self, atoms: torch.Tensor) -> torch.Tensor:
        """The same tensor with each atom replaced by the smallest one joined with it."""
        small = lean(atoms)
        found = self._roots(small.reshape(-1).numpy())
        return torch.from_numpy(found).reshape(small.shape).expand(atoms.shape)

    def unify(self, left: torch.Tensor, right: torch.Tensor, why: str) -> None:
        """Join two broadcastable atom tensors element by element; a channel that meets an untracked one is pinned."""
        pair = torch.broadcast_tensors(lean(left), lean(right))  # type: ignore[no-untyped-call]
        a, b = (x.reshape(-1).numpy() for x in pair)
        for known, unknown in ((a, b), (b, a)):
            self._pin_all(known[(known >= 0) & (unknown < 0)], why)
        both = (a >= 0) & (b >= 0)
        a, b = a[both], b[both]
        while len(a):
            a, b = self._roots(a), self._roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            self._settled = self._settled and not len(a)
            self.joins += len(a)
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def pin(self, atoms: torch.Tensor, why: str) -> None:
        """Make every channel in ``atoms`` stay; the first reason given is the one reported."""
        flat = lean(atoms).reshape(-1).numpy()
        self._pin_all(flat[flat >= 0], why)

    def pins(self) -> dict[int, str]:
        """Reason by channel (its smallest atom); the reason given first wins."""
        atoms = np.flatnonzero(self._pin[: self.count] >= 0)
        reasons, roots = self._pin[atoms], self._roots(atoms)
        found: dict[int, int] = {}
        for root, reason in zip(roots.tolist(), reasons.tolist(), strict=True):
            found[root] = min(reason, found.get(root, reason))
        return {root: self._whys[reason] for root, reason in found.items()}

    def settle(self) -> None:
        """Find all smallest atoms at once; quick as long as no more are joined."""
        self._roots(np.arange(self.count))
        self._settled = True

    def _roots(self, atoms: np.ndarray) -> np.ndarray:
        roots: np.ndarray = self._parent[atoms]
        if self._settled:
            return roots
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[atoms] = roots
        return roots

    def _pin_all(self, atoms: np.ndarray, why: str) -> None:
        if not len(atoms):
            return
        free = atoms[self._pin[atoms] < 0]
        if len(free):
            if why not in self._whys[-1:]:
                self._whys.append(why)
            self._pin[free] = len(self._whys) - 1
