"""From a ticket to a surgery plan: which positions of which tensors stay, and why. Holds no weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from .. import artifact
from ..errors import SurgeryError, TicketError
from ..flags import all_along, any_along, nonzero
from ..ticket import ModelRef, Ticket
from ..ties import ties
from ._nodes import Node
from ._sizes import analyse_at_any_size
from ._skeleton import own_tensors, to_meta, with_tensors
from ._substitute import with_open_attention
from .cost import Cost, cost_of, cost_of_trace
from .graph import Inputs, as_tuple
from .inputs import checked_inputs
from .narrow import narrowed
from .notes import notes_of, readable
from .parts import Blueprint, Carry, Cut, Fold, GroupPlan, Layer, Rescale
from .settle import Settler
from .verify import Parity

REMAKE = "deploy-sparse compact <ticket>"
Norms = Literal["exact", "leave"]
Shortcuts = Literal["union", "spread"]


@dataclass(frozen=True)
class SurgeryPlan:
    """Everything that makes the compact network from the dense one, except weights.

    Attributes:
        model: the dense network.
        ticket: hash of the ticket.
        multiple: kept widths were rounded up to this multiple.
        groups: channel groups in the order of their first producer.
        shape: what changes in the network, without weights.
        carries: columns that take up constants of removed channels.
        rescales: rows multiplied because attention divides by the root of a head size that has shrunk.
        partly_filled: density left in weights whose masks do not vanish with whole channels.
        unknown: operations without a rule; the channels that reach them stay.
        layers: every weight of two or more axes with its dense and its compact shape.
        cost_before: cost of the dense network.
        cost_after: cost of the compact network.
        parity: compact against masked dense network, None until measured.
        unverified: why a saved compact network has no parity.
        choice: what was timed and chosen, in lines; or why nothing is cut or packed, where that was asked for.
        format: the format that was asked for, ``"auto"`` where timing chose it; empty where nobody said.
        target: what a format chosen by timing holds for: target, batches and widths; else empty.
    """

    model: ModelRef
    ticket: str
    multiple: int
    groups: tuple[GroupPlan, ...]
    shape: Blueprint
    carries: tuple[Carry, ...]
    rescales: tuple[Rescale, ...]
    partly_filled: Mapping[str, float]
    unknown: tuple[str, ...]
    layers: tuple[Layer, ...]
    cost_before: Cost
    cost_after: Cost
    parity: Parity | None = None
    unverified: str = ""
    choice: tuple[str, ...] = ()
    format: str = ""
    target: str = ""

    def __repr__(self) -> str:
        before, after = self.cost_before, self.cost_after
        narrower = sum(len(group.kept) < group.size for group in self.groups)
        return (
            f"SurgeryPlan({self.model.name}, {narrower} of {len(self.groups)} channel groups narrower, "
            f"{readable(before.parameters)} → {readable(after.parameters)} parameters, "
            f"{readable(before.macs)} → {readable(after.macs)} MACs)"
        )

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Positions that stay, for every tensor axis that loses some."""
        return self.shape.cuts

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Biases that take up constants of removed channels."""
        return self.shape.folds

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; positions as short texts like ``"0-15,18"``."""
        return dict(_ADAPTER.dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> SurgeryPlan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            SurgeryError: a missing entry or one of another type.
        """
        try:
            return _ADAPTER.validate_python(dict(body))
        except ValidationError as problem:
            detail = problem.errors()[0]
            where = ".".join(str(part) for part in detail["loc"])
            raise SurgeryError(
                f"the plan's entry {where!r} is not readable ({detail['msg']})",
                expected="a plan written by this toolkit",
                fix="make the compact network again from its ticket",
            ) from None

    @classmethod
    def load(cls, folder: str | Path) -> SurgeryPlan:
        """The plan of a saved compact network, after checking the artifact's hashes.

        Raises:
            ArtifactError: missing, another kind of artifact, truncated or altered.
            SurgeryError: not a plan of this toolkit.
        """
        return cls.from_json(artifact.read_artifact(Path(folder), "plan", remake=REMAKE).body)

    def layer_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Column titles and one row of texts for every weight of two or more axes; of packed ones the blocks."""
        packings = {f"{pack.module}.weight": pack.packing for pack in self.shape.packs}
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            shown, held = "×".join(map(str, layer.compact)), math.prod(layer.compact)
            if (packing := packings.get(layer.name)) is not None:
                shown += f", {len(packing.blocks)} {packing.form} blocks"
                held = sum(len(block.rows) * len(block.columns) for block in packing.blocks)
            dense = "×".join(map(str, layer.dense))
            rows.append((layer.name, dense, shown, f"{held / math.prod(layer.dense):.1%}"))
        return ("weight", "dense", "compact", "kept"), rows

    def notes(self) -> list[str]:
        """What a reader should know besides the table: cost, what stays and why, folds, partly filled weights."""
        return notes_of(self)

    def summary(self) -> dict[str, Any]:
        """What ``deploy-sparse show --json`` prints; JSON values only."""
        return {
            "kind": "plan",
            "model": self.model.name,
            "ticket": self.ticket,
            "multiple": self.multiple,
            "parameters": {"before": self.cost_before.parameters, "after": self.cost_after.parameters},
            "macs": {"before": self.cost_before.macs, "after": self.cost_after.macs},
            "parity": None if self.parity is None else asdict(self.parity),
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "kept": len(group.kept),
                    "stays": [{"kind": s.kind, "channels": len(s.channels), "reason": s.reason} for s in group.stays],
                }
                for group in self.groups
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "format": self.format,
            "packed": {pack.module: pack.packing.form for pack in self.shape.packs},
            "choice": list(self.choice),
            "notes": self.notes(),
        }


_ADAPTER = TypeAdapter(SurgeryPlan)


@dataclass(frozen=True)
class Decision:
    """A plan, the masked dense network it is for, and the compact network it gives.

    ``in_float64`` makes the compact network in float64 where constants were folded, else it is None.
    """

    plan: SurgeryPlan
    dense: nn.Module
    compact: nn.Module
    in_float64: Callable[[], nn.Module] | None

    @property
    def exact(self) -> nn.Module | None:
        """The compact network in float64, made anew, where constants were folded (see :func:`verify`), else None."""
        return None if self.in_float64 is None else self.in_float64()


def plan_from_ticket(
    ticket: Ticket,
    module: nn.Module,
    example_inputs: Inputs,
    *,
    multiple: int = 1,
    norms: Norms = "exact",
    shortcuts: Shortcuts = "union",
) -> SurgeryPlan:
    """Decide what goes. The plan is tried without memory (so its cost is known), but its parity is not measured.

    Args:
        ticket: weights and masks.
        module: the dense architecture; it is not changed, and may lie on ``meta``.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.
        multiple: round each group's kept width up to this multiple, never above its dense size.
        norms: ``"exact"``: channels that a LayerNorm, RMSNorm or GroupNorm counts may go, and the norm is replaced by
            one that keeps counting them. ``"leave"``: such channels stay.
        shortcuts: where layers that write into one shortcut lost different channels, those stay that any of them
            writes. ``"union"``: all of the layers write them. ``"spread"``: a layer leaves out its rows of zeros, and
            looks the others up, which costs a copy of its output.

    Raises:
        TicketError: the ticket is invalid or does not fit the module.
        SurgeryError: ``multiple`` below 1, inputs that the network does not take, a network that cannot be traced, or
            one that does not run when narrowed.
    """
    inputs = checked_inputs(example_inputs, module)
    plan = decide(ticket, module, inputs, multiple=multiple, norms=norms, shortcuts=shortcuts).plan
    return replace(plan, ticket=ticket.hash)


def decide(
    ticket: Ticket,
    module: nn.Module,
    example_inputs: Inputs,
    *,
    multiple: int = 1,
    norms: Norms = "exact",
    shortcuts: Shortcuts = "union",
) -> Decision:
    """:func:`plan_from_ticket` together with the masked and the compact network; the plan lacks the ticket's hash."""
    with _collection_paused():
        return _decide(ticket, module, as_tuple(example_inputs), multiple, norms, shortcuts)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Graphs and copies of modules are many small objects, none of them garbage yet: looking for some takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _decide(
    ticket: Ticket, module: nn.Module, inputs: tuple[Any, ...], multiple: int, norms: Norms, shortcuts: Shortcuts
) -> Decision:
    for name, given, known in (("norms", norms, get_args(Norms)), ("shortcuts", shortcuts, get_args(Shortcuts))):
        if given not in known:
            raise SurgeryError(f"{name}={given!r}", expected=f"one of {', '.join(known)}", fix="choose one of them")
    if multiple < 1:
        raise SurgeryError(f"multiple {multiple}", expected="1 or more", fix="use 1 to cut every dead channel")
    ticket.validate(module)
    weights = _retied(ticket, module)
    plain = with_tensors(module, lambda _, x: to_meta(x)).eval()
    shell, attention = plain, tuple[str, ...]()
    if any(isinstance(part, nn.MultiheadAttention) for part in plain.modules()):
        shell, attention = with_open_attention(with_tensors(plain, lambda _, x: x))
    tensors = {name: weights.get(name, x) for name, x in own_tensors(module).items()}
    seen = {name: _started(x, ticket.masks.get(name)) for name, x in tensors.items()}
    ledger, setups = analyse_at_any_size(shell, inputs, seen)
    for each in (ledger, *(setup.ledger for setup in setups if setup.ledger is not None)):
        for use in each.norms:
            if norms == "leave" or use.module is None:
                each.atoms.pin(use.atoms, use.fixed or f"{use.place} is to keep its width")
    settled = Settler(ledger, setups, tensors, plain, inputs, multiple, attention, shortcuts == "spread").run()
    made = settled.made
    plan = SurgeryPlan(
        model=ticket.model,
        ticket="",
        multiple=multiple,
        groups=settled.groups,
        shape=made.shape,
        carries=made.carries,
        rescales=made.rescales,
        partly_filled=_partly_filled(ticket, made.shape.cuts),
        unknown=tuple(ledger.unknown),
        layers=_layers(plain, settled.shell),
        cost_before=_cost(ledger.traced.calls, plain, inputs),
        cost_after=_cost(settled.calls, settled.shell, inputs),
    )
    written = ledger.traced.written  # the ticket's own are not to change
    dense = with_tensors(module, lambda name, _: tensors[name].clone() if name in written else tensors[name]).eval()
    compact = narrowed(module, made.shape, made.tensor).eval()
    if ledger.traced.real:  # the shell did not run
        plan = replace(plan, cost_after=cost_of(compact, inputs)[0])

    def in_float64() -> nn.Module:
        return narrowed(module, made.shape, lambda name, x: made.tensor(name, x, torch.float64)).eval()

    return Decision(plan, dense, compact, in_float64 if made.rounded else None)


def uncut(decision: Decision, ticket: Ticket) -> Decision:
    """The masked dense network as it is, with a plan that changes nothing."""
    before = decision.plan
    plan = replace(
        before,
        multiple=1,
        groups=tuple(replace(group, kept=tuple(range(group.size)), stays=()) for group in before.groups),
        shape=Blueprint(()),
        carries=(),
        rescales=(),
        partly_filled=_partly_filled(ticket, ()),
        layers=tuple(replace(layer, compact=layer.dense) for layer in before.layers),
        cost_after=before.cost_before,
        choice=("dense: the masked network as it is",),
    )
    return Decision(plan, decision.dense, with_tensors(decision.dense, lambda _, x: x.clone()).eval(), None)


def _cost(calls: tuple[Node, ...], module: nn.Module, inputs: tuple[Any, ...]) -> Cost:
    batch = next((x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim()), 1)
    return cost_of_trace(calls, sum(p.numel() for p in module.parameters()), batch)


def _started(weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A weight of nothing but zeros is a start, as of positions and residual branches: what no mask took counts."""
    if weight.dim() < 2 or weight.is_meta or not weight.is_floating_point():
        return weight
    if any(bool(any_along(nonzero(x))) for x in (weight[:1], weight[:, :1], weight)):  # most show it at once
        return weight
    unknown = torch.full_like(weight, torch.nan)
    return unknown if mask is None else torch.where(mask.to(weight.device), unknown, weight)


def _retied(ticket: Ticket, module: nn.Module) -> dict[str, torch.Tensor]:
    """The masked weights, with what the network ties masked wherever one of the names is.

    Raises:
        TicketError: the ticket holds different weights for tied names.
    """
    weights = ticket.masked_weights()
    for alias, canonical in ties(module.state_dict()).items():
        if weights[alias] is weights[canonical]:
            continue
        if not torch.equal(ticket.weights[alias], ticket.weights[canonical]):
            raise TicketError(
                f"{alias!r} and {canonical!r} differ in the ticket, and are one tensor in the network",
                expected="equal weights under tied names",
                fix="make the ticket from the tied network, or untie the names in the factory",
            )
        both = torch.where(weights[alias] != 0, weights[canonical], torch.zeros_like(weights[canonical]))
        weights[alias] = weights[canonical] = both
    return weights


def _layers(dense: nn.Module, compact: nn.Module) -> tuple[Layer, ...]:
    smaller = dict(compact.named_parameters())
    weights = [(name, tensor) for name, tensor in dense.named_parameters() if tensor.dim() > 1]
    return tuple(Layer(name, tuple(tensor.shape), tuple(smaller[name].shape)) for name, tensor in weights)


def _partly_filled(ticket: Ticket, cuts: tuple[Cut, ...]) -> dict[str, float]:
    own: dict[str, dict[int, torch.Tensor]] = {}
    for cut in cuts:
        own.setdefault(cut.name, {})[cut.dim] = torch.tensor(cut.kept)
    shares = {name: _share(x, own.get(name, {})) for name, x in ticket.masks.items() if x.dim() > 1}
    return {name: round(share, 6) for name, share in shares.items() if share < 1}


def _share(mask: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> float:
    """Part of a mask that is True at the positions that stay."""
    for dim, positions in sorted(kept.items(), key=lambda entry: entry[0]):
        if dim and bool(all_along(mask, 0).index_select(dim - 1, positions).all()):
            return 1.0  # most are; along the other axes picking takes long
        mask = mask.index_select(dim, positions)
    return int(mask.count_nonzero()) / max(1, mask.numel())
