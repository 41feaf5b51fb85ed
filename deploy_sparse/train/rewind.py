"""Rewind points: where a training starts, as Chen et al. 2022, Algorithm 1, goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from .. import artifact
from ..errors import ArtifactError
from ..ticket import Ticket

_KIND = "memory"


@dataclass(frozen=True)
class RewindPoint:
    """Weights, BatchNorm statistics, optimizer state and position in the schedule to start a training from.

    A point of epoch i leaves t - i of a schedule's t epochs to train. With ``epoch`` 0 and no ``memory`` the
    optimizer is fresh and the whole schedule follows, as in the paper's public code, or when fine-tuning.

    Attributes:
        ticket: weights and BatchNorm statistics; its masks play no part.
        epoch: the epoch to start at, in the schedule and in the order of the data.
        memory: what the optimizer remembers, by ``"<slot>/<parameter>"``.
    """

    ticket: Ticket
    epoch: int = 0
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def save(self, folder: Path) -> None:
        """Write the ticket as ``folder``, and beside it ``<folder>_memory`` with the rest."""
        self.ticket.save(folder)
        payload = {f"{_KIND}.safetensors": bytes_from_tensors({n: v.contiguous() for n, v in self.memory.items()})}
        artifact.write_artifact(_beside(folder), _KIND, payload, {"ticket": self.ticket.hash, "epoch": self.epoch})

    @classmethod
    def load(cls, folder: Path) -> RewindPoint:
        """Read a rewind point after checking its hashes, and that its two halves belong together.

        Raises:
            ArtifactError: missing, altered, or of two different trainings.
        """
        ticket, beside = Ticket.load(folder), _beside(folder)
        found = artifact.read_artifact(beside, _KIND, remake="run the recipe again with --resume")
        if found.body["ticket"] != ticket.hash:
            raise ArtifactError(
                f"{beside} belongs to another rewind point than {folder}",
                expected=f"the optimizer's state of {ticket.hash[:12]}",
                fix=f"remove {beside} and {folder}",
            )
        return cls(ticket, found.body["epoch"], tensors_from_bytes((beside / f"{_KIND}.safetensors").read_bytes()))


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_memory")
