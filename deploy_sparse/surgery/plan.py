"""From a ticket to a surgery plan: which positions of which tensors stay, and why. Holds no weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from .. import artifact
from ..errors import SurgeryError
from ..ticket import ModelRef, Ticket
from ._sizes import analyse_at_any_size
from .choose import choose, cuts_of
from .cost import Cost, cost_of
from .graph import NETWORK_OUTPUT, Inputs, as_tuple
from .liveness import fold
from .narrow import narrow_
from .parts import Cut, Fold, GroupPlan, Layer
from .verify import Parity

REMAKE = "deploy-sparse compact <ticket>"
LISTED = 3  # partly filled layers that get a note each; more share one


@dataclass(frozen=True)
class SurgeryPlan:
    """Everything that makes the compact network from the dense one, except weights.

    Attributes:
        model: the dense network.
        ticket: hash of the ticket.
        multiple: kept widths were rounded up to this multiple.
        groups: channel groups in the order of their first producer.
        cuts: positions that stay, for every tensor axis that loses some.
        folds: biases that take up constants of removed channels.
        partly_filled: density left in weights whose masks do not vanish with whole channels.
        unknown: operations without a rule; the channels that reach them stay.
        layers: every weight of two or more axes with its dense and its compact shape.
        cost_before: cost of the dense network.
        cost_after: cost of the compact network.
        parity: compact against masked dense network, None until measured.
    """

    model: ModelRef
    ticket: str
    multiple: int
    groups: tuple[GroupPlan, ...]
    cuts: tuple[Cut, ...]
    folds: tuple[Fold, ...]
    partly_filled: Mapping[str, float]
    unknown: tuple[str, ...]
    layers: tuple[Layer, ...]
    cost_before: Cost
    cost_after: Cost
    parity: Parity | None = None

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
        """Column titles and one row of texts for every weight of two or more axes."""
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            share = math.prod(layer.compact) / math.prod(layer.dense)
            rows.append(
                (layer.name, *("×".join(map(str, shape)) for shape in (layer.dense, layer.compact)), f"{share:.1%}")
            )
        return ("weight", "dense", "compact", "kept"), rows

    def notes(self) -> list[str]:
        """What a reader should know besides the table: cost, what stays and why, folds, partly filled weights."""
        before, after = self.cost_before, self.cost_after
        lines = [
            f"parameters {before.parameters} → {after.parameters} ({after.parameters / before.parameters:.1%})",
            f"MACs of one sample {before.macs} → {after.macs} ({after.macs / max(1, before.macs):.1%})",
        ]
        for group in self.groups:
            lines += [
                f"{group.name}: {len(stay.channels)} of {group.size} channels stay ({stay.kind}): {stay.reason}"
                for stay in group.stays
                if (stay.kind, stay.reason) != ("pinned", NETWORK_OUTPUT)  # true of every network
            ]
        lines += [
            f"{entry.weight}: constants of {entry.channels} removed columns went into {entry.bias}"
            f"{', which is new' if entry.created else ''}"
            for entry in self.folds
        ]
        return [*lines, *self._filling()]

    def _filling(self) -> list[str]:
        """The notes on partly filled weights: one each for a few layers, one for all of them otherwise."""
        shares = self.partly_filled
        left = {layer.name: math.prod(layer.compact) for layer in self.layers if layer.name in shares}
        if len(left) <= LISTED:
            return [f"{name}: {share:.1%} of the weights left are unmasked" for name, share in shares.items()]
        together = sum(shares[name] * count for name, count in left.items()) / sum(left.values())
        order = sorted(left, key=lambda name: shares[name])
        least, most = (f"{name} ({shares[name]:.1%})" for name in (order[0], order[-1]))
        return [
            f"{len(left)} layers are partly filled: {together:.1%} of the weights left in them are unmasked, "
            f"least in {least}, most in {most}"
        ]

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
            "notes": self.notes(),
        }


_ADAPTER = TypeAdapter(SurgeryPlan)


@dataclass(frozen=True)
class Decision:
    """A plan, the masked dense network it is for, and the compact network it gives.

    ``exact`` is the compact network in float64 where constants were folded (see :func:`verify`), else None.
    """

    plan: SurgeryPlan
    dense: nn.Module
    compact: nn.Module
    exact: nn.Module | None


def plan_from_ticket(ticket: Ticket, module: nn.Module, example_inputs: Inputs, *, multiple: int = 1) -> SurgeryPlan:
    """Decide what goes. The plan is tried on a copy (so its cost is known), but its parity is not measured.

    Args:
        ticket: weights and masks.
        module: the dense architecture; it is not changed.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.
        multiple: round each group's kept width up to this multiple, never above its dense size.

    Raises:
        TicketError: the ticket is invalid or does not fit the module.
        SurgeryError: ``multiple`` below 1, a network that cannot be traced, or one that does not run when narrowed.
    """
    return decide(ticket, module, example_inputs, multiple=multiple).plan


def decide(ticket: Ticket, module: nn.Module, example_inputs: Inputs, *, multiple: int) -> Decision:
    """:func:`plan_from_ticket` together with the masked and the compact network."""
    if multiple < 1:
        raise SurgeryError(f"multiple {multiple}", expected="1 or more", fix="use 1 to cut every dead channel")
    ticket.validate(module)
    inputs = as_tuple(example_inputs)
    dense = masked_copy(module, ticket)
    problem = ""
    # Sizes written into view() may come from the tensor's own shape (harmless) or from the code; the graph shows
    # the same number for both. So they are trusted first, and pinned where the narrowed network then fails.
    for fixed_sizes in (False, True):
        ledger = analyse_at_any_size(dense, inputs, fixed_sizes=fixed_sizes)
        before, expected = cost_of(dense, inputs)
        groups, removed = choose(ledger, multiple)
        gains = fold(ledger, removed)
        cuts = cuts_of(ledger, removed, gains)
        compact = narrow_(copy.deepcopy(dense), cuts, gains, gains)
        try:
            after, shapes = cost_of(compact, inputs)
        except Exception as error:  # the user's own forward() may raise anything when a size does not fit
            problem = str(error).strip() or type(error).__name__
            continue
        if shapes != expected:
            problem = f"outputs of shape {[list(s) for s in shapes]} instead of {[list(s) for s in expected]}"
            continue
        plan = SurgeryPlan(
            model=ticket.model,
            ticket=ticket.hash,
            multiple=multiple,
            groups=groups,
            cuts=cuts,
            folds=tuple(gains),
            partly_filled=_partly_filled(ticket, cuts),
            unknown=tuple(ledger.unknown),
            layers=_layers(dense, compact),
            cost_before=before,
            cost_after=after,
        )
        exact = narrow_(copy.deepcopy(dense).double(), cuts, gains, gains) if gains else None
        return Decision(plan, dense, compact, exact)
    raise SurgeryError(
        f"the narrowed network does not run: {problem.splitlines()[0]}",
        expected="a network whose forward() takes its sizes from its tensors and layers",
        fix="replace numbers written into forward() by x.shape or -1",
    )


def masked_copy(module: nn.Module, ticket: Ticket) -> nn.Module:
    """A copy of ``module`` in evaluation mode that holds the ticket's masked weights, in the ticket's precision."""
    dense = copy.deepcopy(module)
    dense.load_state_dict({k: v.detach().clone() for k, v in ticket.masked_weights().items()}, assign=True)
    return dense.eval()


def _layers(dense: nn.Module, compact: nn.Module) -> tuple[Layer, ...]:
    smaller = dict(compact.named_parameters())
    weights = [(name, tensor) for name, tensor in dense.named_parameters() if tensor.dim() > 1]
    return tuple(Layer(name, tuple(tensor.shape), tuple(smaller[name].shape)) for name, tensor in weights)


def _partly_filled(ticket: Ticket, cuts: tuple[Cut, ...]) -> dict[str, float]:
    masks = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 1}
    for cut in cuts:
        if cut.name in masks:
            masks[cut.name] = masks[cut.name].index_select(cut.dim, torch.tensor(cut.kept))
    shares = {name: float(mask.float().mean()) for name, mask in masks.items()}
    return {name: round(share, 6) for name, share in shares.items() if share < 1}
