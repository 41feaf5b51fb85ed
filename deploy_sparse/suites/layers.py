"""The layers of chosen forms beside the dense network's: where the time goes, kept with a suite's records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import Config
from ..engine.entry import Engine
from ..measure.table import Table
from ..tune.layers import ROUNDS, LayerReport, profile_layers
from .config import DENSE

ROWS = 12  # of a table: a suite has several
_CAUSES = {
    "width": "channel counts that do not suit",
    "overhead": "overhead of calls",
    "memory": "moving memory",
    "look-up": "look-ups of channels",
    "conversion": "conversions of the memory layout",
    "behind": "additions and activations that are not fused",
    "other": "other operators",
    "one side": "operators that the dense network lacks",
}


class LayerFacts(Config):
    """The layer table of one form, and what its layers take beyond what their MACs predict.

    Attributes:
        ms: of all layers of the form in one run.
        beyond: ms by cause, over all layers.
    """

    network: str
    subject: str
    target: str
    batch: int
    ms: float
    beyond: dict[str, float]
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str

    @property
    def table(self) -> Table:
        """As it is shown."""
        title = f"Layers: {self.network}, {self.subject}, on {self.target} at batch {self.batch}"
        return Table(title, self.columns, self.rows, self.note)

    def causes(self, most: int = 3) -> str:
        """The costliest causes with their share of the time, in words; empty where nothing is beyond."""
        found = sorted(((ms, kind) for kind, ms in self.beyond.items() if ms > 0.01 * self.ms), reverse=True)[:most]
        return ", ".join(f"{_CAUSES.get(kind, kind)} {100 * ms / self.ms:.0f} %" for ms, kind in found)


def layers_of(
    network: str, subject: str, engines: tuple[Engine, Engine], batch: int, seconds: float, poll: Callable[[], None]
) -> LayerFacts:
    """Time the layers of the dense network's engine and of a form's.

    Raises:
        EngineError: the runtime tells no times of layers.
    """
    made = profile_layers(*engines, batch, names=(DENSE, subject), seconds=seconds / ROUNDS, poll=poll)
    table = made.table(ROWS)
    return LayerFacts(
        network=network,
        subject=subject,
        target=engines[0].target.name,
        batch=batch,
        ms=made.sparse.total_ms,
        beyond=_beyond(made),
        columns=table.columns,
        rows=table.rows,
        note=table.note,
    )


def _beyond(made: LayerReport) -> dict[str, float]:
    found: dict[str, Any] = {}
    for pair in made.pairs:
        for reason in pair.reasons:
            if reason.ms:
                found[reason.kind] = found.get(reason.kind, 0.0) + reason.ms
    return found
