"""From a ticket to an ordinary smaller module, and from a saved one back to it without the ticket."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import nn
from torch.utils import _pytree as pytree

from .. import artifact
from ..errors import ExportError, SurgeryError, nearest
from ..ticket import Ticket
from ..ties import retied, tie_, ties, untied
from ._skeleton import to_meta, with_tensors
from .graph import Inputs
from .inputs import checked_inputs, kind_of
from .narrow import narrowed
from .notes import readable
from .pack import Layers, shells_, with_packed_layers
from .plan import REMAKE, Norms, Shortcuts, SurgeryPlan, decide, uncut
from .program import FILE as PROGRAM
from .program import program_bytes
from .verify import Parity, verify

Format = Literal["dense", "channels", "packed"]
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
    _verified: str = field(init=False, repr=False, compare=False)  # of the weights that the parity is of

    def __post_init__(self) -> None:
        object.__setattr__(self, "_verified", _fingerprint(self.module))

    @property
    def parity(self) -> Parity:
        """How closely it follows the masked dense network; measured before it was handed out."""
        assert self.plan.parity is not None
        return self.plan.parity

    def __repr__(self) -> str:
        before, after = self.plan.cost_before, self.plan.cost_after
        parameters = f"{readable(before.parameters)} → {readable(after.parameters)} parameters"
        macs = f"{readable(before.macs)} → {readable(after.macs)} MACs"
        return f"Compact({type(self.module).__name__}, {parameters}, {macs})"

    def save(self, folder: str | Path, *, program: bool = True) -> Path:
        """Write the network atomically into ``folder`` and return the folder. Saving twice is a no-op.

        Written are the plan as ``plan.json``, the weights as ``compact.safetensors``, and the whole network as
        ``compact.pt2``, which :func:`~.program.load_program` loads without the factory. Where ``torch.export`` does
        not take the network, the last is left out, and the plan's entry ``"program"`` says why. Of weights that were
        changed since they were verified, as by training, the plan tells no parity, and its notes say so.

        Args:
            folder: where to.
            program: write ``compact.pt2`` too. It holds the weights again, and takes some seconds.

        Raises:
            ArtifactError: ``folder`` holds something else, or cannot be written.
        """
        state = self.module.state_dict()
        aliases = ties(state)
        stored = untied(state, aliases)
        tensors = {name: t.detach().cpu().contiguous() for name, t in stored.items()}
        unlisted = {name: t.detach().cpu().clone() for name, t in _unlisted(self.module).items() if not t.is_meta}
        plan = self.plan
        if _fingerprint(self.module) != self._verified:
            plan = replace(plan, parity=None, unverified=_CHANGED)
        payload = {_PAYLOAD: bytes_from_tensors({**tensors, **unlisted})}
        body = plan.to_json() | {"ties": aliases, **({"unlisted": sorted(unlisted)} if unlisted else {})}
        if inner := [name for name, t in stored.items() if _channels_innermost(t)]:
            body["channels_last"] = inner
        if program:
            try:
                payload[PROGRAM] = program_bytes(self.module, self.example_inputs)
            except ExportError as problem:
                body["program"] = problem.given
        return artifact.write_artifact(Path(folder), "plan", payload, body).folder


def _unlisted(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that the network reads and its state dict lacks, by name: plain attributes, such as views of weights, and
    buffers that are not persistent."""
    listed = module.state_dict(keep_vars=True).keys()
    found = {name: x for name, x in module.named_buffers() if name not in listed}
    for path, part in module.named_modules():
        for key, x in vars(part).items():
            if isinstance(x, torch.Tensor):
                found[f"{path}.{key}" if path else key] = x
    return found


_CHANGED = "not compared with the ticket's network: the weights were changed after the comparison, as by training"


def _fingerprint(module: nn.Module) -> str:
    """A digest of the state dict: names, types, shapes, numbers, and which names are one tensor."""
    state = module.state_dict()
    aliases = ties(state)
    digest = hashlib.sha256(repr(aliases).encode())
    for name, tensor in untied(state, aliases).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compact(
    ticket: Ticket,
    factory: Callable[[], nn.Module],
    example_inputs: Inputs | None = None,
    *,
    format: Format = "channels",
    layers: Layers | None = None,
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
        format: ``"channels"``: cut. ``"packed"``: and run the layers that are left with masks of blocks as blocks, see
            :mod:`.pack`. ``"dense"``: leave the masked network as it is.
        layers: paths of the layers to pack, all that can be by default; a mapping gives the style of each besides
            (:class:`.packing.Style`, None: the fastest as a rule).
        multiple: round each group's kept width up to this multiple, never above its dense size.
        norms: whether channels that a norm counts may go, see :func:`~.plan.plan_from_ticket`.
        shortcuts: what layers write whose masks disagree, see there.

    Raises:
        TicketError: the ticket is invalid or for another architecture.
        SurgeryError: inputs that the network does not take; a network that cannot be traced or narrowed; an unknown
            format, or layers that cannot be packed; or the result is not the same function.
    """
    _refuse_format(format, layers)
    module = _dense(factory)
    inputs = checked_inputs(_default_inputs(ticket) if example_inputs is None else example_inputs, module)
    if _derives_when_loaded(module):
        module = _with_views(copy.deepcopy(module), module)
        module.load_state_dict(ticket.validate(module).masked_weights())
    decision = decide(ticket, module, inputs, multiple=multiple, norms=norms, shortcuts=shortcuts)
    if format == "packed":
        decision = with_packed_layers(decision, ticket.masks, inputs, layers)
    elif format == "dense":
        decision = uncut(decision, ticket)
    parity = verify(decision.dense, decision.compact, inputs, exact=decision.exact)
    return Compact(decision.compact, replace(decision.plan, ticket=ticket.hash, parity=parity, format=format), inputs)


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
    stored = tensors_from_bytes((found.folder / _PAYLOAD).read_bytes())
    stored |= {name: _with_channels_innermost(stored[name]) for name in found.body.get("channels_last", ())}
    unlisted = {name: stored.pop(name) for name in found.body.get("unlisted", ())}
    tensors = retied(stored, aliases)
    dense = _skeleton(factory)
    shell = narrowed(with_tensors(dense, lambda _, x: to_meta(x)), plan.shape)
    narrow = {name: x for name, x in shell.state_dict().items() if name.rpartition(".")[0] in plan.shape.packed}
    shells_(shell, plan.shape.packs)
    _refuse_other_architecture(shell.state_dict(), tensors, plan)
    # Parameters that the network also keeps in lists are the same ones there.
    known = {**unlisted, **tensors, **narrow}
    module = narrowed(dense, plan.shape, lambda name, own: known.get(name, own))
    _set_unlisted_(module, unlisted)
    shells_(module, plan.shape.packs)
    for path in plan.shape.packed:
        layer = module.get_submodule(path)
        layer.load_state_dict({name: tensors[f"{path}.{name}"] for name in layer.state_dict()}, assign=True)
    tie_(module, aliases)
    return module.eval()


def _set_unlisted_(module: nn.Module, unlisted: Mapping[str, torch.Tensor]) -> None:
    """Give plain attributes what they held when the network was saved."""
    for name, tensor in unlisted.items():
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        own = vars(part).get(key)
        if isinstance(own, torch.Tensor):
            setattr(part, key, tensor.to(own.device))


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
    plain = any(
        _holds_a_tensor(value) for part in module.modules() for key, value in vars(part).items() if key != "_buffers"
    )
    return module if tensors <= stored and not plain else _dense(factory)


def _with_views(copied: nn.Module, module: nn.Module) -> nn.Module:
    """Give plain attributes of the copy, in place, the views of its own parameters that the original's are."""
    own = {x.untyped_storage().data_ptr(): name for name, x in module.named_parameters() if x.numel()}
    parts = zip(module.modules(), copied.modules(), strict=True)
    parameters = dict(copied.named_parameters())
    for part, made in parts:
        for key, x in vars(part).items():
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in own:
                base = parameters[own[x.untyped_storage().data_ptr()]]
                vars(made)[key] = base.data.as_strided(x.shape, x.stride(), x.storage_offset())
    return copied


def _derives_when_loaded(module: nn.Module) -> bool:
    """Whether loading weights changes more than them: views of them as plain attributes, or hooks."""
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers()) if x.numel()} - {0}
    for part in module.modules():
        if part._load_state_dict_post_hooks or part._load_state_dict_pre_hooks:
            return True
        for key, value in vars(part).items():
            for x in () if key in ("_parameters", "_buffers", "_modules") else pytree.tree_leaves(value):
                plain = isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)
                if plain and x.untyped_storage().data_ptr() in own:
                    return True
    return False


def _holds_a_tensor(value: object) -> bool:
    """Whether a plain attribute is a tensor, or a container of tensors that are no parameters."""
    if isinstance(value, dict | list | tuple):
        return any(isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) for x in pytree.tree_leaves(value))
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


def _refuse_format(format: str, layers: Layers | None) -> None:
    if format not in get_args(Format):
        known = get_args(Format)
        raise SurgeryError(
            f"format={format!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"{nearest(str(format), known)}choose one of them",
        )
    if layers is not None and format != "packed":
        raise SurgeryError(
            f"layers to pack in the format {format!r}",
            expected="layers in the format 'packed' only",
            fix="leave them out, or use format='packed'",
        )
    if isinstance(layers, str):
        raise SurgeryError(f"layers={layers!r}", expected="a list of paths of layers", fix=f"pass layers=[{layers!r}]")


def _refuse_no_factory(factory: object) -> None:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise _no_factory(f"{'an instance of ' if isinstance(factory, nn.Module) else ''}{kind_of(factory)}")
    try:
        inspect.signature(factory).bind()
    except TypeError:
        raise _no_factory(f"{factory!r}, which needs arguments") from None
    except ValueError:
        return  # written in C, without a signature to look at


def _module(made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise _no_factory(f"one that returns {kind_of(made)}")
    return made


def _no_factory(given: str) -> SurgeryError:
    return SurgeryError(
        f"factory must be a function without arguments that returns the dense nn.Module; got {given}",
        expected="a class or function whose call makes a new network each time",
        fix="pass the function itself, for example factory=lambda: MyNet(width=16)",
    )


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_innermost(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in the memory format ``channels_last``, by strides where its shape leaves that open."""
    layout = _LAYOUTS.get(tensor.dim())
    if layout is None or not tensor.is_contiguous(memory_format=layout):
        return False
    return tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def _with_channels_innermost(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=_LAYOUTS[tensor.dim()]).copy_(tensor)


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
