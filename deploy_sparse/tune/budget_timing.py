"""A ticket's compact network and the dense one as engines of a target, timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..engine.build import build_engine
from ..engine.entry import Engine
from ..engine.target import Target, load_target
from ..measure.compare import compare
from ..measure.profile import profile
from ..measure.record import LatencyRecord
from ..surgery.compact import compact
from ..ticket import Ticket
from .budget import Timed


@dataclass
class BesideDense:
    """Times tickets of one network; the dense engine is built once.

    Attributes:
        factory: constructs the dense network.
        example_inputs: what it is traced with, batch first.
        target: where it runs, here; or its name or file.
        batch: samples of a timed call.
        duration_s: timed seconds for each of the two.
        scratch: folder for the engines.
        poll: called between steps; what it raises ends the timing.
        records: of every timing, in order; each pair is of a run of its own.
    """

    factory: Callable[[], nn.Module]
    example_inputs: tuple[torch.Tensor, ...]
    target: str | Path | Target
    batch: int
    duration_s: float
    scratch: Path
    poll: Callable[[], None] = lambda: None
    records: list[LatencyRecord] = field(default_factory=list)
    _dense: Engine | None = None

    def __call__(self, ticket: Ticket) -> Timed:
        """Both timed in alternating blocks. Widths are cut as they are: no channel stays to round one up.

        Raises:
            SurgeryError, ExportError, BuildError, EngineError: a network cannot be cut, built or run.
        """
        self.poll()
        if self._dense is None:
            network = self.factory()
            network.load_state_dict(dict(ticket.weights))
            self._dense = build_engine(network.eval(), self.target, self.example_inputs, self.scratch, name="dense")
        small = compact(ticket, self.factory, self.example_inputs)
        self.poll()
        engine = build_engine(small, self.target, out=self.scratch, name="ticket")
        made = profile(
            {"dense": self._dense, "ticket": engine},
            batches=(self.batch,),
            duration_s=self.duration_s,
            poll=self.poll,
        )
        self.records += made.records
        return _timed(*made.records)


def timed_among(records: Iterable[LatencyRecord], where: str, batch: int) -> Timed | None:
    """The subject ``ticket`` beside ``dense`` at a target, by its name or file, and a batch; None where one is missing.

    Raises:
        ConfigError: no such target.
    """
    place = load_target(where).name, batch
    found = {record.subject: record for record in records if record.timed and (record.target, record.batch) == place}
    return _timed(found["dense"], found["ticket"]) if {"dense", "ticket"} <= found.keys() else None


def _timed(dense: LatencyRecord, own: LatencyRecord) -> Timed:
    found = compare(dense, own)
    assert dense.stats is not None  # compare refuses records without times
    assert own.stats is not None
    low, high = (None, None) if found.low is None or found.high is None else (1 / found.high, 1 / found.low)
    return Timed(own.stats.p50, dense.stats.p50, 1 / found.ratio, low, high)
