"""Trainings that end in tickets: fresh, or from the rewind point; each one is a stage of a run and done once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .. import artifact
from ..data.splits import Splits
from ..errors import ArtifactError
from ..structure import Masks
from ..ticket import ModelRef, Provenance, Ticket
from .loop import FitConfig, Fitted, Method, State, copy_state, fit
from .run import Run


@dataclass(frozen=True)
class DenseStage:
    """What training the dense network leaves.

    Attributes:
        best: its best weights on validation, the baseline everything is compared with.
        rewind: its weights and BatchNorm statistics at the start of the rewind epoch.
        last: its weights after the last epoch.
    """

    best: Ticket
    rewind: Ticket
    last: Ticket


@dataclass(frozen=True)
class TicketTrainer:
    """Trains tickets in one run's folder.

    Attributes:
        run: the open run.
        method: the method's name, for provenance.
        factory: constructs the dense network with the run's initial weights.
        model: which network that is.
        data: what is trained on.
        fit: how.
        seed: order and augmentation of the data.
        config: everything the tickets depend on, as JSON values; kept in their provenance and compared on resume.
    """

    run: Run
    method: str
    factory: Callable[[], torch.nn.Module]
    model: ModelRef
    data: Splits
    fit: FitConfig
    seed: int
    config: Mapping[str, Any] = field(repr=False)

    def dense(self, method: Method, masks: Masks, *, rewind_epoch: int) -> DenseStage:
        """Train the dense network as stage ``rounds/0``; leaves ``dense`` and ``rewind`` beside it."""
        folders = {name: self.run.folder / name for name in ("rewind", "dense")}

        def make() -> DenseStage:
            fitted = self._fit("rounds/0", copy_state(self.factory()), method, rewind_epoch)
            assert fitted.early is not None
            early = self._ticket(fitted.early, {}, None, {})
            return DenseStage(
                self._ticket(fitted.best, {}, None, _metrics(fitted)),
                early,
                self._ticket(fitted.last, masks, None, _metrics(fitted)),
            )

        def save(stage: DenseStage, folder: Path) -> None:
            for name, ticket in (("rewind", stage.rewind), ("dense", stage.best)):
                shutil.rmtree(folders[name], ignore_errors=True)  # of an attempt that did not finish this stage
                ticket.save(folders[name])
            stage.last.save(folder)  # last: its folder says that the stage is finished

        def load(folder: Path) -> DenseStage:
            return DenseStage(self._load(folders["dense"]), self._load(folders["rewind"]), self._load(folder))

        return self.run.once("rounds/0", make, save, load)

    def train(self, name: str, start: Ticket, method: Method, masks: Masks, *, keep: Literal["last", "best"]) -> Ticket:
        """Train from ``start`` (weights and BatchNorm; the optimizer starts afresh) and keep the last or best weights.

        Args:
            name: the stage, a folder in the run.
            method: what holds the masks during training.
            masks: the ticket's masks.
        """

        def make() -> Ticket:
            fitted = self._fit(name, dict(start.weights), method, None)
            weights = fitted.best if keep == "best" else fitted.last
            return self._ticket(weights, masks, start.hash, _metrics(fitted))

        def load(folder: Path) -> Ticket:
            ticket = self._load(folder)
            same = ticket.masks.keys() == masks.keys() and all(
                torch.equal(ticket.masks[k], m) for k, m in masks.items()
            )
            if ticket.provenance.parent != start.hash or not same:
                raise ArtifactError(
                    f"{folder} was made from another rewind point or other masks",
                    expected=f"a ticket made from {start.hash[:12]} under this stage's masks",
                    fix=f"remove {folder}",
                )
            return ticket

        return self.run.once(name, make, Ticket.save, load)

    def _fit(self, name: str, start: State, method: Method, keep_epoch: int | None) -> Fitted:
        network = self.factory()
        network.load_state_dict(start)
        with self.run.console.task(name, self.fit.epochs) as progress:

            def on_epoch(row: Mapping[str, Any]) -> None:
                self.run.log({"training": name, **row})
                progress.advance(row["epoch"] + 1, f"validation {row['validation_accuracy']:.2%}")

            return fit(
                network,
                self.data,
                self.fit,
                method,
                seed=self.seed,
                checkpoints=self.run.folder / "checkpoints" / name.replace("/", "-"),
                keep_epoch=keep_epoch,
                poll=self.run.poll,
                on_epoch=on_epoch,
                warn=self.run.console.warn,
            )

    def _ticket(self, weights: State, masks: Masks, parent: str | None, metrics: Mapping[str, float]) -> Ticket:
        provenance = Provenance(
            method=self.method,
            config=self.config,
            seed=self.seed,
            data={"name": self.data.name, **self.data.sizes()},
            versions=artifact.environment(),
            parent=parent,
            metrics=metrics,
        )
        return Ticket(weights, masks, self.model, provenance)

    def _load(self, folder: Path) -> Ticket:
        ticket = Ticket.load(folder)
        if ticket.provenance.config != self.config:
            raise ArtifactError(
                f"{folder} is a ticket of another configuration",
                expected="the tickets of this run",
                fix=f"remove {folder}",
            )
        return ticket


def _metrics(fitted: Fitted) -> dict[str, float]:
    return {"validation_accuracy": fitted.validation_accuracy, "best_epoch": fitted.best_epoch}
