"""The calls pipelines make that need more than one room: they resolve zoo names and target names for surgery."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from . import zoo
from .config import Config
from .engine.target import load_target
from .errors import ConfigError, TicketError
from .surgery.compact import Compact
from .surgery.compact import compact as compact_ticket
from .surgery.compact import load_compact as load_compact_folder
from .surgery.plan import SurgeryPlan
from .ticket import ModelRef, Ticket

Factory = Callable[[], torch.nn.Module]


def compact(
    ticket: Ticket | str | Path,
    *,
    factory: Factory | None = None,
    example_inputs: tuple[torch.Tensor, ...] | None = None,
    format: Literal["auto", "channels"] = "auto",
    target: str | Path | Config | None = None,
) -> Compact:
    """Cut a ticket's dead channels out and verify that the smaller network computes the same function.

    Args:
        ticket: a ticket, or the folder of one.
        factory: constructs the dense network, without arguments; may be left out for a zoo network.
        example_inputs: what the network is traced and verified with, batch first, for example ``(x,)`` with ``x`` of
            shape ``[2, 3, 32, 32]``; seeded noise of the ticket's input shape by default.
        format: ``"channels"`` removes channels; ``"auto"`` chooses, and channels are the only format so far.
        target: a target's name or file: kept widths are rounded up to the multiple that the target likes, by dead
            channels that stay.

    Returns:
        the compact network (``.module``, in evaluation mode), the plan (``.plan``) and the verification (``.parity``).

    Raises:
        TicketError: the ticket does not fit the network, or no factory is known.
        SurgeryError: the network cannot be traced, or the result is not equal.
        ConfigError: unknown format or target.
    """
    if format not in ("auto", "channels"):
        raise ConfigError(f"format {format!r}", expected="'auto' or 'channels'", fix="leave it out")
    ticket = ticket if isinstance(ticket, Ticket) else Ticket.load(ticket)
    multiple = 1
    if target is not None:
        found: Any = target if isinstance(target, Config) else load_target(target)
        multiple = found.width_multiple
    return compact_ticket(
        ticket, factory or zoo_factory(ticket.model, "compact(ticket, factory=…)"), example_inputs, multiple=multiple
    )


def load_compact(folder: str | Path, *, factory: Factory | None = None) -> torch.nn.Module:
    """Load a compact network without its ticket, in evaluation mode.

    Args:
        folder: what :meth:`Compact.save` wrote: ``plan.json`` and ``compact.safetensors``.
        factory: constructs the *dense* network; may be left out for a zoo network.

    Raises:
        ArtifactError: missing, truncated or altered.
        TicketError: no factory is known.
        SurgeryError: ``factory`` constructs another architecture.
    """
    if factory is None:
        factory = zoo_factory(SurgeryPlan.load(folder).model, "load_compact(folder, factory=…)")
    return load_compact_folder(folder, factory)


def zoo_factory(model: ModelRef, call: str) -> Factory:
    """The factory of a zoo network.

    Raises:
        TicketError: ``model`` is the caller's own network; the message names ``call``, which takes its factory.
    """
    if model.name not in zoo.ZOO:
        raise TicketError(
            f"the ticket is of {model.name!r}, which is no zoo network",
            expected=f"a factory for it, or one of {', '.join(zoo.ZOO)}",
            fix=f"pass the function that constructs the dense network: {call}",
        )
    return partial(zoo.build, model.name, **model.arguments)
