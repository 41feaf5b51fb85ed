"""From a ticket to an ordinary smaller module, and from a saved one back to it without the ticket."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import nn

from .. import artifact
from ..errors import ExportError, SurgeryError
from ..ticket import Ticket
from ..ties import retied, tie_, ties, untied
from .graph import Inputs, as_tuple
from .narrow import narrowed
from .plan import REMAKE, Norms, Shortcuts, SurgeryPlan, decide
from .program import FILE as PROGRAM
from .program import program_bytes
from .verify import Parity, verify

_PAYLOAD = "compact.safetensors"
_SEED = 20220714


@dataclass(frozen=True)
class Compact:
    """A physically smaller network that computes the masked network's function.

    Attributes:
        module: an ordinary module in evaluation mode: no masks, no hooks.
        plan: how it was made, with cost and parity.
        example_inputs: what it was traced with, batch first.
    """

    module: nn.Module
    plan: SurgeryPlan
    example_inputs: tuple[torch.Tensor, ...] = field(repr=False)

    @property
    def parity(self) -> Parity:
        """How closely it follows the masked dense network; measured before it was handed out."""
        assert self.plan.parity is not None
        return self.plan.parity

    def save(self, folder: str | Path) -> Path:
        """Write weights and plan atomically into ``folder`` and return the folder. Saving twice is a no-op.

        Raises:
            ArtifactError: ``folder`` holds something else, or cannot be written.
        """
        state = self.module.state_dict()
        aliases = ties(state)
        tensors = {name: t.detach().cpu().contiguous() for name, t in untied(state, aliases).items()}
        payload, body = {_PAYLOAD: bytes_from_tensors(tensors)}, self.plan.to_json() | {"ties": aliases}
        try:
            payload[PROGRAM] = program_bytes(self.module, self.example_inputs)
        except ExportError as problem:
            body["program"] = problem.given
        return artifact.write_artifact(Path(folder), "plan", payload, body).folder


def compact(
    ticket: Ticket,
    factory: Callable[[], nn.Module],
    example_inputs: Inputs | None = None,
    *,
    multiple: int = 1,
    norms: Norms = "exact",
    shortcuts: Shortcuts = "union",
) -> Compact:
    """Cut every channel that the ticket's masks make superfluous, and prove that the function is the same.

    Args:
        ticket: weights and masks.
        factory: makes the dense architecture; its weights do not matter.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs; real data makes the proof
            stronger. By default two seeded random samples of ``ticket.model.input_shape``.
        multiple: round each group's kept width up to this multiple, never above its dense size.
        norms: whether channels that a norm counts may go, see :func:`~.plan.plan_from_ticket`.
        shortcuts: what layers write whose masks disagree, see there.

    Raises:
        TicketError: the ticket is invalid or for another architecture.
        SurgeryError: the network cannot be traced or narrowed, or the result is not the same function.
    """
    module = _dense(factory)
    inputs = _default_inputs(ticket) if example_inputs is None else example_inputs
    decision = decide(ticket, module, inputs, multiple=multiple, norms=norms, shortcuts=shortcuts)
    parity = verify(decision.dense, decision.compact, inputs, exact=decision.exact)
    return Compact(decision.compact, replace(decision.plan, ticket=ticket.hash, parity=parity), as_tuple(inputs))


def load_compact(folder: str | Path, factory: Callable[[], nn.Module]) -> nn.Module:
    """The module that :meth:`Compact.save` wrote, in evaluation mode; its ticket is not needed.

    Args:
        folder: the artifact's folder, or a file in it.
        factory: makes the dense architecture.

    Raises:
        ArtifactError: missing, another kind of artifact, truncated or altered.
        SurgeryError: the factory makes another architecture than the plan is for.
    """
    found = artifact.read_artifact(Path(folder), "plan", remake=REMAKE)
    plan = SurgeryPlan.from_json(found.body)
    aliases = dict(found.body.get("ties", {}))
    tensors = retied(tensors_from_bytes((found.folder / _PAYLOAD).read_bytes()), aliases)
    module = narrowed(_skeleton(factory), plan.shape)
    _refuse_other_architecture(module.state_dict(), tensors, plan)
    module.load_state_dict(tensors, assign=True)
    tie_(module, aliases)
    return module.eval()


def _dense(factory: Callable[[], nn.Module]) -> nn.Module:
    _refuse_no_factory(factory)
    with torch.random.fork_rng(devices=[]):  # random initialisation must not disturb the caller's random numbers
        return _module(factory())


def _skeleton(factory: Callable[[], nn.Module]) -> nn.Module:
    """The architecture without memory for its weights, where every tensor it has comes from the state dict."""
    _refuse_no_factory(factory)
    try:
        with torch.device("meta"):
            module = _module(factory())
    except (RuntimeError, NotImplementedError, TypeError):
        return _dense(factory)  # a constructor that computes with numbers out of tensors needs real ones
    stored = set(module.state_dict())
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    plain = any(isinstance(value, torch.Tensor) for part in module.modules() for value in vars(part).values())
    return module if tensors <= stored and not plain else _dense(factory)


def _refuse_no_factory(factory: object) -> None:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise _no_factory(f"{'an instance of ' if isinstance(factory, nn.Module) else ''}{_kind(factory)}")
    try:
        inspect.signature(factory).bind()
    except TypeError:
        raise _no_factory(f"{factory!r}, which needs arguments") from None
    except ValueError:
        return  # written in C, without a signature to look at


def _module(made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise _no_factory(f"one that returns {_kind(made)}")
    return made


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _no_factory(given: str) -> SurgeryError:
    return SurgeryError(
        f"factory must be a function without arguments that returns the dense nn.Module; got {given}",
        expected="a class or function whose call makes a new network each time",
        fix="pass the function itself, for example factory=lambda: MyNet(width=16)",
    )


def _default_inputs(ticket: Ticket) -> torch.Tensor:
    if not ticket.model.input_shape:
        raise SurgeryError(
            "the ticket does not say the shape of one input sample",
            expected="example inputs, or a ticket whose model has an input_shape",
            fix="pass example_inputs=…",
        )
    generator = torch.Generator().manual_seed(_SEED)
    floating = (t.dtype for t in ticket.weights.values() if t.is_floating_point())
    dtype = next(floating, torch.float32)
    return torch.randn(2, *ticket.model.input_shape, generator=generator, dtype=torch.float64).to(dtype)


def _refuse_other_architecture(
    expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], plan: SurgeryPlan
) -> None:
    for name in [*expected, *tensors]:
        if name in tensors and name in expected and tensors[name].shape == expected[name].shape:
            continue
        saved = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
        made = f"shape {tuple(expected[name].shape)}" if name in expected else "nothing"
        raise SurgeryError(
            f"the factory makes another architecture: {name!r} is saved with {saved}, the narrowed network has {made}",
            expected=f"the network the plan was made for ({plan.model.name} {dict(plan.model.arguments)})",
            fix="pass the factory of that network",
        )
