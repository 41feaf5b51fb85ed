"""What a user may name where a network is wanted: a compact network, a ticket, an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ArtifactError


def module_or_onnx(path: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The network at ``path`` and example inputs for it: ``(module, (x,))``, or ``(onnx path, None)``.

    Raises:
        ArtifactError: ``path`` is none of these.
    """
    if path.endswith(".onnx"):
        return Path(path), None  # before anything that costs seconds to import

    import torch

    from .. import api, artifact
    from ..surgery.plan import SurgeryPlan
    from ..ticket import Ticket

    kind = artifact.kind_of(Path(path))
    if kind == "plan":
        shape = SurgeryPlan.load(path).model.input_shape
        return api.load_compact(path), (torch.randn(2, *shape),)
    if kind == "ticket":
        ticket = Ticket.load(path)
        module = api.zoo_factory(ticket.model, "build_engine(module, …) from Python")()
        module.load_state_dict(ticket.validate(module).masked_weights())
        return module.eval(), (torch.randn(2, *ticket.model.input_shape),)
    found = f"holds the artifact {kind!r}" if kind else "holds no network" if Path(path).exists() else "does not exist"
    fix = "check the path"
    for name in ("ticket", "compact", "model.onnx"):
        if (Path(path) / name).exists():
            fix = f"name what is in it, for example {Path(path) / name}"
    raise ArtifactError(
        f"{path} {found}",
        expected="a compact network's folder, a ticket's folder, or a .onnx file",
        fix=fix,
    )
