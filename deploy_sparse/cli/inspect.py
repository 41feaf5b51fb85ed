"""Say what surgery does to a network, or what an engine consists of, layer by layer. Writes nothing.

A compact network tells what was done: layers before and after, channel groups, what stays and why. A ticket is planned
anew: the same decisions as `compact`, not yet verified. Of a run its compact network is taken, or else its ticket.

Of an engine: layers, number formats, kernels and memory layouts as TensorRT's engine inspector tells them, where the
engine runs on this machine; otherwise, and of an ONNX file, the graph's nodes with parameters and multiply-accumulates.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import emit, key_values
from .plan_text import plan_text

if TYPE_CHECKING:
    import torch

    from ..surgery.plan import Norms, Shortcuts, SurgeryPlan
    from ..ticket import ModelRef

EXAMPLES = """  deploy-sparse inspect runs/imp_refill-resnet_digits
  deploy-sparse inspect runs/imp_refill-resnet_digits/ticket --target rtx-sm89
  deploy-sparse inspect compact --json
  deploy-sparse inspect engines/out/model-rtx-sm89-0123456789ab
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a ticket's folder, a compact network's, a run's, or an engine's; or an ONNX file")
    parser.add_argument("--target", help="of a ticket: round widths up to the multiple this target likes")
    parser.add_argument(
        "--norms", help="of a ticket: exact (the default): channels that a norm counts may go; leave: they stay"
    )
    parser.add_argument(
        "--shortcuts", help="of a ticket: union (the default): layers write what any of them writes; spread"
    )


def execute(options: argparse.Namespace) -> int:
    from .. import artifact
    from ..errors import ArtifactError

    path = _subject(Path(options.path))
    kind = artifact.kind_of(path)
    if kind == "engine" or path.suffix == ".onnx":
        return _engine(options, path, kind)
    members: Mapping[str, Sequence[str]] | None
    if kind == "ticket":
        plan, members = _planned(path, options.target, options.norms or "exact", options.shortcuts or "union")
    elif kind == "plan":
        for name in ("target", "norms", "shortcuts"):
            _refuse_decided(name, getattr(options, name), "a compact network, whose widths are decided")
        plan, members = _done(path)
    else:
        found = f"the artifact {kind!r}" if kind else "nothing to inspect"
        fix = "check the path; deploy-sparse show PATH says what any artifact is"
        if path.suffix == ".zip" and path.is_file():
            fix = f"check a bundle: deploy-sparse bundle --verify {path}; --rebuild makes an engine of it to inspect"
        raise ArtifactError(
            f"{path} holds {found}" if path.exists() else f"{path} does not exist",
            expected="a ticket's folder, a compact network's folder, or a run's folder; an engine's; or an ONNX file",
            fix=fix,
        )
    summary = plan.summary()
    for group in summary["groups"]:
        group["members"] = None if members is None else list(members.get(group["name"], ()))
    value = {**summary, "path": str(path), "dry_run": kind == "ticket"}

    def text() -> str:
        facts = {
            "path": path,
            "model": plan.model.name,
            "ticket": plan.ticket,
            "widths": "as the masks leave them"
            if plan.multiple == 1
            else f"rounded up to multiples of {plan.multiple}",
        }
        verdict = [] if plan.parity is None else [str(plan.parity)]
        if kind == "ticket":
            verdict = [f"planned only: deploy-sparse compact {path} --out FOLDER cuts and verifies"]
        return "\n".join([key_values(facts), "", plan_text(plan, members), *verdict])

    emit(options, value, text)
    return 0


def _subject(path: Path) -> Path:
    if (path / "run.json").is_file():
        return next((path / part for part in ("compact", "ticket") if (path / part).is_dir()), path)
    return path


def _planned(
    path: Path, target: str | None, norms: Norms, shortcuts: Shortcuts
) -> tuple[SurgeryPlan, Mapping[str, Sequence[str]]]:
    from .. import api
    from ..engine.target import load_target
    from ..surgery.plan import plan_from_ticket
    from ..ticket import Ticket

    ticket = Ticket.load(path)
    elsewhere = "deploy_sparse.compact(ticket, factory=…) in Python; only to plan, "
    elsewhere += "deploy_sparse.surgery.plan_from_ticket(ticket, network, example_inputs)"
    module = api.zoo_factory(ticket.model, elsewhere)()
    floating = (tensor.dtype for tensor in ticket.weights.values() if tensor.is_floating_point())
    inputs = _inputs(ticket.model, next(floating, None))
    multiple = 1 if target is None else load_target(target).width_multiple
    plan = plan_from_ticket(ticket, module, inputs, multiple=multiple, norms=norms, shortcuts=shortcuts)
    return plan, _members(module.to(inputs.dtype), inputs, norms)


def _engine(options: argparse.Namespace, path: Path, kind: str | None) -> int:
    from .engine_text import engine_text

    for name in ("target", "norms", "shortcuts"):
        _refuse_decided(name, getattr(options, name), "an engine" if kind == "engine" else "an ONNX file")
    value, text = engine_text(path, kind)
    emit(options, value, text)
    return 0


def _refuse_decided(name: str, given: str | None, what: str) -> None:
    from ..errors import ConfigError

    if given is not None:
        raise ConfigError(
            f"--{name} {given} for {what}",
            expected="a ticket",
            fix=f"leave --{name} out, or inspect the ticket",
        )


def _done(path: Path) -> tuple[SurgeryPlan, Mapping[str, Sequence[str]] | None]:
    from .. import api, zoo
    from ..surgery.plan import SurgeryPlan

    plan = SurgeryPlan.load(path)
    if not zoo.known(plan.model.name) or not plan.model.input_shape:
        return plan, None  # the members come from the dense network
    return plan, _members(api.zoo_factory(plan.model, "")(), _inputs(plan.model, None), "exact")


def _members(module: torch.nn.Module, inputs: torch.Tensor, norms: Norms) -> dict[str, list[str]]:
    """Names of the tensors in every channel group of the dense network."""
    from ..surgery.graph import channel_groups

    return {
        group.name: list(dict.fromkeys(part.name for part in group.slices()))
        for group in channel_groups(module, (inputs,), norms=norms == "exact")
    }


def _inputs(model: ModelRef, dtype: Any) -> torch.Tensor:
    import torch

    from ..errors import TicketError

    if not model.input_shape:
        raise TicketError(
            "the ticket does not say the shape of one input sample",
            expected="a ticket whose model has an input_shape",
            fix="use deploy_sparse.compact(ticket, example_inputs=…) in Python",
        )
    return torch.zeros(2, *model.input_shape, dtype=dtype)
