"""The ledger of one analysis: which parameter axis holds which channels, who writes them and who reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from ._nodes import Node
from ._provenance import Expr, Setting
from ._values import Atoms, Value, along, lean, untracked, varying
from ._weights import Part, Usage
from .trace import Traced, layer_of

Role = Literal["producer", "bias", "norm", "shared", "statistics", "consumer"]


@dataclass(frozen=True)
class Axis:
    """Channels along one axis of one tensor of the state dict.

    Attributes:
        name: state-dict name.
        dim: the axis.
        atoms: int64 ``[size of the axis]``, or ``[k, size]`` where each position serves k channels, as the input
            positions of a grouped convolution do.
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

    The weight is seen as ``groups`` matrices of ``ro`` rows and ``ci`` columns (see ``_weights``).

    Attributes:
        weight: state-dict name of the weight.
        layer: path of the layer, for messages.
        groups: groups of a convolution, 1 otherwise.
        transposed: the weight's axis 0 holds the columns.
        part: first and last-but-one position of the used part of axis 0, None for the whole weight.
        rows: channel written by each row, ``[groups · ro]``.
        atoms: channel read by each column, ``[groups · ci]``.
        constant: the value each column reads where it is constant, else NaN, float64 ``[groups · ci]``.
        uneven: the column reads known values that differ from place to place, bool ``[groups · ci]``.
        ignored: the column's weights are all zero, bool ``[groups · ci]``.
        silent_rows: the row's weights are all zero, bool ``[groups · ro]``.
        bends: a constant input does not give a constant output: zero padding, or a transposed convolution.
        bias: the bias that can take a constant up, or None with the reason in ``no_fold``.
        no_fold: why constants cannot be folded.
        alone: the weight is used here only, so that its columns may change.
    """

    weight: str
    layer: str
    groups: int
    transposed: bool
    part: tuple[int, int] | None
    rows: torch.Tensor
    atoms: torch.Tensor
    constant: torch.Tensor
    uneven: torch.Tensor
    ignored: torch.Tensor
    silent_rows: torch.Tensor
    bends: bool
    bias: str | None
    no_fold: str
    alone: bool


@dataclass(frozen=True)
class Mixing:
    """Channels that a product or a reduction of activations reads: needed where anything they go into is.

    Attributes:
        source: channels read, any shape.
        target: channels written, broadcastable to ``source``; ``UNTRACKED`` counts as needed.
        harmless: the channel adds nothing (it is zero), bool, broadcastable to ``source``.
        place: for messages.
    """

    source: torch.Tensor
    target: torch.Tensor
    harmless: torch.Tensor
    place: str


@dataclass(frozen=True)
class NormUse:
    """A norm over channels, whose statistics count those that go.

    Attributes:
        kind: which norm.
        module: path of the module that can be replaced by one that keeps the dense statistics; None with the reason
            in ``fixed``.
        dim: the channel axis of the module's input, counted from the end for ``"layer"`` and ``"rms"``.
        atoms: ``[groups, channels of one group]``.
        constant: the constants in its input, NaN where there is none or it changes from place to place; as ``atoms``.
        eps: as given to the operation; None leaves it to the precision.
        place: for messages.
    """

    kind: Literal["layer", "rms", "group"]
    module: str | None
    fixed: str
    dim: int
    atoms: torch.Tensor
    constant: torch.Tensor
    eps: float | None
    place: str


@dataclass(frozen=True)
class Grid:
    """Channels along several axes of one tensor: what stays must be a product of positions.

    Attributes:
        atoms: a channel for each combination of positions.
        fixed: axes whose number of positions is written into the code.
    """

    atoms: torch.Tensor
    fixed: frozenset[int] = frozenset()


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
    """Filled in while the graph is walked once.

    Attributes:
        grids: channels that lie along several axes of one tensor; what stays must be a product of positions.
        settings: numbers that count positions: axis 0 of the channels beside them.
        balanced: equal parts of an axis, which keep equally many positions: the channels of each, ``[positions, any]``,
            and where.
        divided: attentions that divide by the root of the head size.
    """

    traced: Traced
    module: nn.Module
    values: dict[Node, Value | tuple[Value, ...]] = field(default_factory=dict)
    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    norms: list[NormUse] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    settings: list[tuple[Expr, torch.Tensor]] = field(default_factory=list)
    biases: dict[str, str] = field(default_factory=dict)  # by weight
    divided: list[Node] = field(default_factory=list)
    balanced: list[tuple[tuple[torch.Tensor, ...], str]] = field(default_factory=list)
    written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # rows, which of them are constant
    lost: dict[int, Leak] = field(default_factory=dict)  # by channel: where its constant first became unknown
    unknown: list[str] = field(default_factory=list)
    reshaped_state: dict[str, str] = field(default_factory=dict)
    users: dict[Node, list[Node]] = field(default_factory=dict)
    usage: dict[tuple[str, int, bool, Part], Usage] = field(default_factory=dict)
    by_layer: dict[str, list[Node]] = field(default_factory=dict)
    axis_roots: dict[tuple[str, int], tuple[int, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.traced.nodes:
            for source in node.all_input_nodes:
                self.users.setdefault(source, []).append(node)
            if node.op == "call_function":
                self.by_layer.setdefault(layer_of(node), []).append(node)

    def uses(self, node: Node) -> int:
        """How many operations read a tensor."""
        return len(self.users.get(node, ()))

    def tensor(self, node: Node) -> torch.Tensor:
        """The content of a parameter or buffer node, float64 on the CPU."""
        return known_numbers(self.traced.tensors[self.name(node)])

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

    def roots_of(self, axis: Axis) -> np.ndarray:
        """The smallest joined atoms of a tensor's axis, shaped like its atoms; looked up once while none are joined."""
        key = axis.name, axis.dim
        known = self.axis_roots.get(key)
        if known is None or known[0] != self.atoms.joins:
            known = self.axis_roots[key] = self.atoms.joins, self.atoms.roots(axis.atoms).numpy()
        return known[1]

    def rows(self, name: str, dim: int, count: int) -> torch.Tensor:
        """The channels written by axis ``dim`` of weight ``name``, ``[count]``; the same ones at each use."""
        known = self.axes.get((name, dim))
        atoms = known.atoms if known is not None else self.atoms.fresh(count)
        self.enter(name, dim, atoms, "producer", name)
        return atoms

    def count(self, node: Node, argument: str, owner: str, number: int) -> Expr:
        """Where a number of groups comes from: an attribute of the layer, or what the code gives."""
        try:
            found = getattr(self.module.get_submodule(owner), argument, None)
        except AttributeError:
            found = None
        if found == number and layer_of(node) == owner:
            return Setting(owner, argument)
        stated = node.meta.get("sizes", {}).get(argument)
        return stated[0] if stated else number

    def pin(self, value: Value, why: str) -> None:
        """Make every channel of ``value`` stay."""
        self.atoms.pin(value.atoms, why)

    def fix(self, value: Value, dims: set[int], why: str) -> None:
        """Keep the number of positions along ``dims``; along other axes channels may still go."""
        axes = varying(value.atoms)
        rank = len(value.shape)
        fixed = {d % rank for d in dims} & set(axes)
        if not fixed:
            return
        if fixed == set(axes):
            self.atoms.pin(value.atoms, why)
            return
        # One channel that stays at every position along the fixed axes keeps them whole.
        small = lean(value.atoms)
        anchor = small.amin(dim=[d for d in axes if d not in fixed], keepdim=True)
        held = self.atoms.fresh(anchor.numel()).reshape(anchor.shape)
        self.atoms.pin(held, why)
        self.link([small, held], sorted(fixed), whole=True)

    def link(self, parts: list[torch.Tensor], shared: list[int], *, whole: bool = False) -> None:
        """A position along the axes ``shared`` stays in all ``parts`` (equal there) or in none; ``whole``: in all."""
        laid = []
        for part in parts:
            moved = part.movedim(shared, list(range(len(shared))))
            laid.append(moved.reshape(*moved.shape[: len(shared)], -1))
        self.grids.append(Grid(torch.cat(laid, dim=-1), frozenset(range(len(shared))) if whole else frozenset()))

    def balance(self, parts: Sequence[torch.Tensor], dim: int, where: str) -> None:
        """Record that equal ``parts`` of an axis keep equally many positions along ``dim``."""
        laid = [lean(part).movedim(dim, 0) for part in parts]
        self.balanced.append((tuple(part.reshape(part.shape[0], -1) for part in laid), where))

    def lose(self, atoms: torch.Tensor, before: torch.Tensor, after: torch.Tensor, cause: str) -> None:
        """Note why channels whose constant was known ``before`` have none ``after``; all three broadcastable."""
        small = [lean(before), lean(after), lean(atoms)]
        before, after, atoms = torch.broadcast_tensors(*small)  # type: ignore[no-untyped-call]
        gone = ~before.isnan() & after.isnan() & (atoms >= 0)
        if bool(gone.any()):
            found, first = np.unique(atoms[gone].numpy(), return_index=True)
            for atom, constant in zip(found.tolist(), before[gone].numpy()[first].tolist(), strict=True):
                self.lost.setdefault(atom, Leak(cause, constant))

    def _state_value(self, node: Node) -> Value:
        name = self.name(node)
        tensor = self.traced.tensors[name]
        constant = known_numbers(tensor)
        axes = [d for d in range(tensor.dim()) if tensor.size(d) > 1]
        if len(axes) != 1:
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
            return untracked(tensor.shape, "a constant tensor", known_numbers(tensor))
        return untracked(node.meta["val"].shape, "the network input")


def columns(ledger: Ledger, value: Value, dim: int) -> torch.Tensor:
    """The channels along the axis a layer reads, ``[value.shape[dim]]``; those that share a position are joined."""
    dim = dim % len(value.shape)
    atoms = lean(value.atoms)
    others = [d for d in varying(value.atoms) if d != dim]
    if others:
        first = atoms.amin(dim=others, keepdim=True)
        ledger.atoms.unify(first, atoms, value.why)
        atoms = first
    return atoms.reshape(-1).expand(value.shape[dim])


def layer_name(node: Node) -> str:
    """The layer's path for messages, or the operation where no module owns it."""
    return layer_of(node) or str(node.target)


def known_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The content in float64 on the CPU; NaN where there is none to look at."""
    if tensor.is_meta or tensor.is_complex():
        return torch.full((), torch.nan, dtype=torch.float64).expand(tensor.shape)
    return tensor.detach().to("cpu", torch.float64)
