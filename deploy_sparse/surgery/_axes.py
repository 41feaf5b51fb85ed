"""The ledger of one analysis: which parameter axis holds which channels, who writes them and who reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.fx import Node

from ._values import Atoms, Value, along, lean, untracked, varying
from .trace import Traced, layer_of, place

Role = Literal["producer", "bias", "norm", "shared", "statistics", "consumer"]


@dataclass(frozen=True)
class Axis:
    """Channels along one axis of one tensor of the state dict.

    Attributes:
        name: state-dict name.
        dim: the axis.
        atoms: int64 ``[size of the axis]``.
        role: what the axis is to its channels.
        producer: for ``"producer"``, ``"bias"`` and ``"norm"``: weight name of the layer it belongs to.
    """

    name: str
    dim: int
    atoms: torch.Tensor
    role: Role
    producer: str | None = None


@dataclass(frozen=True)
class Read:
    """One use of a weight whose columns read channels; what decides whether a column may go.

    Attributes:
        weight: state-dict name of the weight.
        layer: path of the layer, for messages.
        atoms: channel read by each column, ``[columns]``.
        constant: the value each column reads where it is constant, else NaN, float64 ``[columns]``.
        uneven: the column reads known values that differ from place to place, bool ``[columns]``.
        ignored: the column's weights are all zero, bool ``[columns]``.
        padded: the layer pads its input with zeros.
        bias: the bias that can take a constant up, or None with the reason in ``no_fold``.
        no_fold: why constants cannot be folded.
    """

    weight: str
    layer: str
    atoms: torch.Tensor
    constant: torch.Tensor
    uneven: torch.Tensor
    ignored: torch.Tensor
    padded: bool
    bias: str | None
    no_fold: str = ""


@dataclass(frozen=True)
class Leak:
    """Why a channel stays although a layer writes nothing but a constant into it.

    Attributes:
        cause: completes "constant 0.3 …"; equal for all channels of one reader and one reason.
        constant: the value, NaN where there is no single one.
    """

    cause: str
    constant: float


@dataclass
class Ledger:
    """Filled in while the graph is walked once."""

    traced: Traced
    module: nn.Module
    fixed_sizes: bool
    values: dict[Node, Value | tuple[Value, ...]] = field(default_factory=dict)
    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # rows, which of them are constant
    lost: dict[int, Leak] = field(default_factory=dict)  # by channel: where its constant first became unknown
    unknown: list[str] = field(default_factory=list)
    reshaped_state: dict[str, str] = field(default_factory=dict)

    def tensor(self, node: Node) -> torch.Tensor:
        """The content of a parameter or buffer node, float64 on the CPU."""
        return self.traced.tensors[self.name(node)].to("cpu", torch.float64)

    def is_state(self, node: object) -> bool:
        """Whether ``node`` is a tensor of the state dict itself, not computed from one."""
        return isinstance(node, Node) and node.name in self.traced.state

    def name(self, node: Node) -> str:
        """State-dict name of a parameter or buffer node."""
        return self.traced.state[node.name]

    def value(self, node: Node) -> Value:
        """The value of one tensor; a parameter read outside the layers with rules of their own is entered here."""
        if node not in self.values:
            self.values[node] = self._state_value(node) if self.is_state(node) else self._free_value(node)
        found = self.values[node]
        if not isinstance(found, Value):
            raise TypeError(f"{node} holds several tensors")
        return found

    def enter(self, name: str, dim: int, atoms: torch.Tensor, role: Role, producer: str | None = None) -> None:
        """Record that axis ``dim`` of tensor ``name`` holds ``atoms``; a second use of the tensor joins both."""
        known = self.axes.setdefault((name, dim), Axis(name, dim, atoms, role, producer))
        if known.atoms is not atoms:
            self.atoms.unify(known.atoms, atoms, f"{name!r} is used in several places")

    def rows(self, name: str, count: int) -> torch.Tensor:
        """The channels written by the rows of weight ``name``, ``[count]``; the same ones at each use."""
        known = self.axes.get((name, 0))
        atoms = known.atoms if known is not None else self.atoms.fresh(count)
        self.enter(name, 0, atoms, "producer", name)
        return atoms

    def pin(self, value: Value, why: str) -> None:
        """Make every channel of ``value`` stay."""
        self.atoms.pin(value.atoms, why)

    def lose(self, atoms: torch.Tensor, before: torch.Tensor, after: torch.Tensor, cause: str) -> None:
        """Note why channels whose constant was known ``before`` have none ``after``; all three broadcastable."""
        small = [lean(before), lean(after), lean(atoms)]
        before, after, atoms = torch.broadcast_tensors(*small)  # type: ignore[no-untyped-call]
        gone = ~before.isnan() & after.isnan() & (atoms >= 0)
        for atom, constant in zip(atoms[gone].tolist(), before[gone].tolist(), strict=True):
            self.lost.setdefault(atom, Leak(cause, constant))

    def _state_value(self, node: Node) -> Value:
        name = self.name(node)
        tensor = self.traced.tensors[name]
        constant = _known(tensor)
        axes = [d for d in range(tensor.dim()) if tensor.size(d) > 1]
        if len(axes) != 1:
            if axes:
                self.reshaped_state.setdefault(name, f"parameter {name!r} is also used outside its layer")
            value = untracked(tensor.shape, f"parameter {name!r}, which spans several axes", constant)
            return Value(value.atoms, value.constant, why=value.why, state=True)
        (dim,) = axes
        known = self.axes.get((name, dim))
        atoms = known.atoms if known is not None else self.atoms.fresh(tensor.size(dim))
        self.enter(name, dim, atoms, "shared" if name in self.traced.parameters else "statistics")
        return Value(along(atoms, dim, tensor.shape), constant, state=True)

    def _free_value(self, node: Node) -> Value:
        if node.name in self.traced.constants:
            tensor = self.traced.constants[node.name]
            return untracked(tensor.shape, f"constant tensor {node.target!s}", _known(tensor))
        return untracked(node.meta["val"].shape, "the network input")


def columns(ledger: Ledger, value: Value, dim: int, node: Node) -> torch.Tensor:
    """The channels along the axis a layer reads, ``[value.shape[dim]]``; pinned where they lie along other axes too."""
    others = [d for d in varying(value.atoms) if d != dim % len(value.shape)]
    if others:
        ledger.pin(value, f"channels lie along another axis than {place(node)} reads")
        return torch.full((value.shape[dim],), -1)
    atoms = lean(value.atoms)  # size 1 everywhere but along dim
    return atoms.reshape(-1).expand(value.shape[dim]) if atoms.numel() == 1 else atoms.reshape(-1)


def layer_name(node: Node) -> str:
    """The layer's path for messages, or the operation where no module owns it."""
    return layer_of(node) or str(node.target)


def _known(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.detach().to("cpu", torch.float64)
    return torch.full((), torch.nan, dtype=torch.float64).expand(tensor.shape)
