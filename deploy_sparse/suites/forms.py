"""From a form in a suite to a network that is proven equal to the masked dense one, or to what lies in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from .. import zoo
from ..api import load_compact, oneshot_ticket, zoo_factory
from ..artifact import kind_of
from ..engine.entry import Engine, open_entry
from ..engine.target import Target
from ..errors import ArtifactError, ConfigError
from ..sparsify.imp import dense_masks
from ..sparsify.regroup import RegroupRule
from ..structure import density
from ..surgery.compact import compact
from ..surgery.cost import cost_of, layer_macs
from ..surgery.plan import SurgeryPlan
from ..ticket import OWN, ModelRef, Provenance, Ticket
from ..tune.formats import choose_format
from ..tune.layer_bench import layer_times_folder
from .channels import channel_masks
from .config import DENSE, Form, Network

Factory = Callable[[], nn.Module]
Poll = Callable[[], None]
Say = Callable[[str], None]
RANDOM = "one-shot on random weights"
_ATTEMPTS = 4


@dataclass(frozen=True)
class Made:
    """A network in one form, ready to be built.

    Attributes:
        module: in evaluation mode; None where the folder holds an engine.
        how: how it was made, in words.
        parameters, macs: its cost, MACs of one sample; None where nobody said.
        dense_macs: those of the dense network.
        whole_macs: those of the dense network's layers that lost nothing.
        parity: how closely surgery followed the masked network, in words; empty where nothing was cut here.
        accuracy: a fraction, where known.
        ticket: its hash, where there is one.
        engine: of a folder that holds an engine.
    """

    module: nn.Module | None
    how: str
    parameters: int | None
    macs: int | None
    dense_macs: int
    whole_macs: int | None = None
    parity: str = ""
    accuracy: float | None = None
    ticket: str | None = None
    engine: Engine | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Maker:
    """Makes one network of a suite in its forms; the weights are the same each time.

    Attributes:
        network: the suite's entry.
        batches: those the suite times it at; the first is what a format is chosen for.
        seconds: timed seconds where a format is chosen.
        seed: of weights and inputs.
    """

    network: Network
    batches: tuple[int, ...]
    seconds: float
    seed: int
    poll: Poll
    say: Say

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Two samples of noise, float32 ``[2, C, H, W]``."""
        shape = self.network.input or zoo.entry(self.network.network).input_shape
        return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(self.seed)),)

    def dense(self) -> nn.Module:
        """The network in evaluation mode, with random weights and the statistics that its norms have on the inputs.

        With those the numbers stay of one size through all layers, so that comparing outputs means something.
        """
        model = self.architecture()
        model.load_state_dict(self._weights)
        return model

    def architecture(self) -> nn.Module:
        """The network in evaluation mode, with its first weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return zoo.build(self.network.network, **self.network.arguments).eval()

    @cached_property
    def _weights(self) -> dict[str, torch.Tensor]:
        model = self.architecture()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.reset_running_stats()
                part.momentum = None  # the average over all batches, of which there is one
                part.train()
        with torch.no_grad():
            model(*self.inputs)
        return model.state_dict()

    def make(self, name: str, form: Form | None, target: Target) -> Made:
        """The network in a form; None is the dense one.

        Raises:
            ConfigError, TicketError, SurgeryError, ArtifactError, ExportError, BuildError, EngineError: it cannot be
                made, cut, chosen or found.
        """
        self.poll()
        if form is None or name == DENSE:
            module = self.dense()
            cost, _ = cost_of(module, self.inputs)
            how = "the dense network, random weights"
            return Made(
                module, how, cost.parameters, cost.macs, cost.macs, whole_macs=None, accuracy=self.network.accuracy
            )
        if form.structure == "folder":
            return self._found(form, target)
        return self._cut(form, self._ticket(form, target), target, self.architecture, RANDOM)

    def _ticket(self, form: Form, target: Target) -> Ticket:
        multiple = form.multiple or target.width_multiple
        model = self.dense()
        reference = ModelRef(OWN, input_shape=tuple(self.inputs[0].shape[1:]))
        if form.structure == "channels":
            masks = channel_masks(model, self.inputs, form, multiple)
            origin = Provenance(RANDOM, form.model_dump(mode="json"), self.seed)
            return Ticket(model.state_dict(), masks, reference, origin).validate(model)
        return self._blocks(form, model, multiple, reference)

    def _blocks(self, form: Form, model: nn.Module, multiple: int, reference: ModelRef) -> Ticket:
        """A ticket of blocks with the stated share of weights left, or a little more.

        Budgets are met from below, and what no block reads goes besides, so more is asked for until enough is left.
        """
        keep = form.keep or 1.0
        linear = [n for n in dense_masks(model) if model.get_parameter(n).dim() == 2]  # regroup is for convolutions
        asked = keep
        for attempt in range(_ATTEMPTS):
            self.poll()
            rule = RegroupRule(
                "budget",
                "channel",
                form.blocks,
                parts=form.parts,
                density=asked if form.rule == "even" else 0.0,
                tile=16,
                multiple=multiple if form.blocks == "equal" else 1,
                coupling="group",
            )
            ticket = oneshot_ticket(
                model,
                self.inputs,
                "blocks",
                1.0 - asked,
                rule=rule,
                exclude=(*form.exclude, *linear),
                seed=self.seed,
                reference=reference,
            )
            left = ticket.provenance.metrics["density"]
            wider = min(0.99, asked * (keep / left + 0.005))
            if left >= keep or attempt == _ATTEMPTS - 1 or wider <= asked:
                break
            asked = wider
        return ticket

    def _cut(self, form: Form, ticket: Ticket, target: Target, factory: Factory, how: str) -> Made:
        """The ticket's network, proven equal to the masked one."""
        self.poll()
        multiple = form.multiple or target.width_multiple
        if form.structure == "channels":
            multiple = 1  # its masks have such widths already
        if form.deployed == "auto":
            made, choice = choose_format(
                ticket,
                factory,
                target,
                self.inputs,
                batch=self.batches[0],
                duration_s=self.seconds,
                cache=layer_times_folder(),
                poll=self.poll,
            )
            self.say("\n".join(choice.lines()))
            how += f"; fastest at batch {self.batches[0]}: {choice.name}"
        else:
            made = compact(ticket, factory, self.inputs, format=form.deployed, multiple=multiple)
        plan = made.plan
        if plan.shape.packs:
            how += (
                f"; {len(plan.shape.packs)} layers run as blocks; {density(ticket.masks):.1%} of the weights are left"
            )
        return Made(
            made.module,
            how,
            plan.cost_after.parameters,
            plan.cost_after.macs,
            plan.cost_before.macs,
            whole_macs=self._whole(plan, factory),
            parity=_parity(plan),
            accuracy=form.accuracy,
            ticket=plan.ticket,
        )

    def _whole(self, plan: SurgeryPlan, factory: Factory) -> int:
        """Multiply-accumulates of the dense network's layers that are as they were."""
        packed = {f"{pack.module}.weight" for pack in plan.shape.packs}
        cut = {layer.name for layer in plan.layers if layer.dense != layer.compact} | packed
        return sum(macs for name, macs in layer_macs(factory().eval(), self.inputs).items() if name not in cut)

    def _found(self, form: Form, target: Target) -> Made:
        """What lies in a folder: a ticket is cut, a compact network loaded, an engine opened."""
        path = Path(str(form.path))
        kind = kind_of(path) if path.exists() else None
        dense, _ = cost_of(self.dense(), self.inputs)
        if kind == "engine":
            engine = open_entry(path)
            facts = engine.manifest.get("parameters"), engine.manifest.get("macs")
            return Made(None, f"engine {path}", *facts, dense.macs, accuracy=form.accuracy, engine=engine)
        if kind == "plan":
            plan = SurgeryPlan.load(path)
            module = load_compact(path).eval()
            cost = plan.cost_after
            self._refuse_another(plan.model.input_shape, path)
            return Made(
                module,
                f"compact network {path}",
                cost.parameters,
                cost.macs,
                dense.macs,
                parity=_parity(plan),
                accuracy=form.accuracy,
                ticket=plan.ticket,
            )
        if kind == "ticket":
            ticket = Ticket.load(path)
            self._refuse_another(ticket.model.input_shape, path)
            factory = zoo_factory(ticket.model, "no factory can be given in a suite")
            return self._cut(form, ticket, target, factory, f"ticket {path}")
        found = f"holds the artifact {kind!r}" if kind else "holds no network" if path.exists() else "is not there"
        raise ArtifactError(
            f"{path} {found}",
            expected="the folder of a ticket, a compact network or an engine",
            fix="mend the path, which is relative to the working directory",
        )

    def _refuse_another(self, shape: tuple[int, ...], path: Path) -> None:
        own = tuple(self.inputs[0].shape[1:])
        if shape and tuple(shape) != own:
            raise ConfigError(
                f"{path} is of a network for inputs of shape {list(shape)}, {self.network.name!r} takes {list(own)}",
                expected="one input shape, so that times compare",
                fix="set input and arguments of the suite's network to those of what is in the folder",
            )


def _parity(plan: SurgeryPlan) -> str:
    if plan.parity is None:
        return plan.unverified or "not known"
    single, double = plan.parity.float32.max_rel, plan.parity.float64.max_rel
    return f"max|Δ| / max|y| {single:.1e} in float32, {double:.1e} in float64"
