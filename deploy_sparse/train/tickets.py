"""Trainings that end in tickets: fresh, or from a rewind point; each one is a stage of a run and done once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .. import artifact
from ..data.batches import train_batches
from ..data.splits import Splits
from ..errors import ArtifactError
from ..sparsify.method import Method
from ..structure import Masks
from ..ticket import ModelRef, Provenance, Ticket
from .batchnorm import reestimate_
from .board import Board
from .distributed import poll_together, world
from .evaluate import accuracy
from .loop import Fitted, fit
from .rewind import RewindPoint as RewindPoint
from .run import Run
from .runtime import Runtime
from .schedule import FitConfig, check_start
from .tensors import State, copy_state, digest

T = TypeVar("T")


@dataclass(frozen=True)
class DenseStage:
    """What training the dense network leaves.

    Attributes:
        best: its best weights on validation, the baseline everything is compared with.
        last: its weights after the last epoch.
        rewind: weights, BatchNorm statistics and optimizer state at the start of the rewind epoch.
        initial: the weights it started from.
    """

    best: Ticket
    last: Ticket
    rewind: RewindPoint
    initial: Ticket


@dataclass(frozen=True)
class TicketTrainer:
    """Trains tickets in one run's folder. Under torchrun every process makes the same calls.

    Attributes:
        run: the open run.
        method: the method's name, for provenance.
        factory: constructs the dense network with the run's initial weights.
        model: which network that is.
        data: what is trained on.
        fit: how.
        runtime: where, and in which precision.
        seed: order and augmentation of the data.
        config: everything the tickets depend on, as JSON values; kept in their provenance and compared on resume.
    """

    run: Run
    method: str
    factory: Callable[[], torch.nn.Module]
    model: ModelRef
    data: Splits
    fit: FitConfig
    runtime: Runtime
    seed: int
    config: Mapping[str, Any] = field(repr=False)

    def dense(self, method: Method, masks: Masks, *, rewind_epoch: int) -> DenseStage:
        """Train the dense network as stage ``rounds/0``; leaves ``dense``, ``rewind`` and ``initial`` beside it.

        Raises:
            ConfigError: a rewind epoch behind the last one.
        """
        check_start(self.fit, rewind_epoch)
        beside = {name: self.run.folder / name for name in ("initial", "rewind", "rewind_memory", "dense")}

        def make() -> DenseStage:
            initial = copy_state(self.factory())
            fitted = self._fit("rounds/0", initial, 0, {}, method, rewind_epoch, title="dense")
            assert fitted.early is not None
            early = self._ticket(fitted.early, {}, None, {})
            return DenseStage(
                self._ticket(fitted.best, {}, None, _metrics(fitted, 0)),
                self._ticket(fitted.last, masks, None, _metrics(fitted, 0)),
                RewindPoint(early, rewind_epoch, fitted.early_memory),
                self._ticket(initial, {}, None, {}),
            )

        def save(stage: DenseStage, folder: Path) -> None:
            for leftover in beside.values():  # of an attempt that did not finish this stage
                shutil.rmtree(leftover, ignore_errors=True)
            stage.initial.save(beside["initial"])
            stage.rewind.save(beside["rewind"])
            stage.best.save(beside["dense"])
            stage.last.save(folder)  # last: its folder says that the stage is finished

        def load(folder: Path) -> DenseStage:
            rewind = RewindPoint.load(beside["rewind"])
            self._check(rewind.ticket, beside["rewind"])
            return DenseStage(self._load(beside["dense"]), self._load(folder), rewind, self._load(beside["initial"]))

        return self._once("rounds/0", make, save, load)

    def initial(self) -> RewindPoint:
        """The initial weights as stage ``initial``, for trainings that no dense one goes before.

        The ticket is the one that :meth:`dense` leaves there.
        """

        def make() -> Ticket:
            return self._ticket(copy_state(self.factory()), {}, None, {})

        return RewindPoint(self.run.once("initial", make, Ticket.save, self._load))

    def train(
        self, name: str, start: RewindPoint, method: Method, masks: Masks | None, *, keep: Literal["last", "best"]
    ) -> Ticket:
        """Train from ``start`` to the end of the schedule and keep the last or best weights.

        Args:
            name: the stage, a folder in the run.
            start: weights, BatchNorm statistics, optimizer state (masked by the method) and epoch.
            method: what holds the masks during training.
            masks: the ticket's masks; None for those the method had where the kept weights are from.

        Raises:
            ArtifactError: the stage is there and was made from something else; of masks that the method chose only
                the start and the configuration are compared.
        """

        def make() -> Ticket:
            fitted = self._fit(name, start.ticket.weights, start.epoch, start.memory, method, None)
            best = keep == "best"
            weights, found = (fitted.best, fitted.best_masks) if best else (fitted.last, fitted.last_masks)
            left = found if masks is None else masks
            return self._ticket(weights, left, start.ticket.hash, _metrics(fitted, start.epoch))

        def load(folder: Path) -> Ticket:
            ticket = self._load(folder)
            same = masks is None or (
                ticket.masks.keys() == masks.keys() and all(torch.equal(ticket.masks[k], m) for k, m in masks.items())
            )
            parent, epoch = ticket.provenance.parent, ticket.provenance.metrics.get("first_epoch")
            if (parent, epoch) != (start.ticket.hash, start.epoch) or not same:
                raise ArtifactError(
                    f"{folder} was made from another rewind point or other masks",
                    expected=f"a ticket made from {start.ticket.hash[:12]}, epoch {start.epoch}, "
                    "under this stage's masks",
                    fix=f"remove {folder}",
                )
            return ticket

        return self._once(name, make, Ticket.save, load)

    def reestimated(self, name: str, ticket: Ticket, *, batches: int | None) -> Ticket:
        """The ticket with BatchNorm statistics measured anew, under its masks, on training images as they are.

        Weights and masks stay; the validation accuracy is the new one. Changes what the network computes, so it goes
        before surgery, never between surgery and its check.

        Args:
            name: the stage, a folder in the run.
            batches: batches of ``fit.batch_size`` to measure on, at most one epoch; None for the epoch.

        Raises:
            ConfigError: a network without BatchNorm, or no batch.
            ArtifactError: the stage is there and was made from another ticket.
        """

        def make() -> Ticket:
            network = self.factory()
            network.load_state_dict(ticket.masked_weights())
            reestimate_(network.to(self.runtime.device), self._images(batches))
            world().share_(network.buffers())  # processes on unlike machines may differ in the last bits
            found = copy_state(network)
            weights = {**ticket.weights, **{n: found[n] for n, _ in network.named_buffers() if n in found}}
            value = accuracy(network, self.data.validation, runtime=self.runtime, processes=world())
            metrics = {**ticket.provenance.metrics, "validation_accuracy": value}
            return self._ticket(weights, ticket.masks, ticket.hash, metrics)

        def load(folder: Path) -> Ticket:
            found = self._load(folder)
            if found.provenance.parent != ticket.hash:
                raise ArtifactError(
                    f"{folder} was made from another ticket",
                    expected=f"a ticket made from {ticket.hash[:12]}",
                    fix=f"remove {folder}",
                )
            return found

        return self.run.once(name, make, Ticket.save, load)

    def _images(self, batches: int | None) -> Iterator[torch.Tensor]:
        """The first batches of epoch 0 on the device, not augmented, the same ones on every process."""
        source = train_batches(
            self.data.train, self.fit.batch_size, seed=self.seed, epoch=0, workers=self.runtime.config.workers
        )
        for images, _ in self.runtime.batches(islice(source, batches)):
            poll_together(self.run.poll)
            yield images

    def _once(self, name: str, make: Callable[[], T], save: Callable[[T, Path], Any], load: Callable[[Path], T]) -> T:
        """A stage of the run; once it is saved, by this or an earlier attempt, its checkpoints are of no use."""
        value = self.run.once(name, make, save, load)
        if world().main:
            folder = self._checkpoints(name)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # absent, or another stage's are in it
                folder.parent.rmdir()
        return value

    def _checkpoints(self, name: str) -> Path:
        return self.run.folder / "checkpoints" / name.replace("/", "-")

    def _fit(
        self,
        name: str,
        weights: Mapping[str, torch.Tensor],
        epoch: int,
        memory: Mapping[str, torch.Tensor],
        method: Method,
        keep_epoch: int | None,
        *,
        title: str = "",
    ) -> Fitted:
        """Train as the stage ``name``; the console calls it ``title``, where given."""
        network = self.factory()
        network.load_state_dict(dict(weights))
        wanted = self.runtime.config.tensorboard and world().main
        with (
            self.run.console.task(title or name, self.fit.epochs) as progress,
            Board(self.run.folder / "tensorboard" / name, on=wanted) as board,
        ):

            def on_epoch(row: Mapping[str, Any]) -> None:
                self.run.log({"training": name, **row})
                board.add(row)
                progress.advance(row["epoch"] + 1, f"validation {row['validation_accuracy']:.2%}")

            fitted = fit(
                network,
                self.data,
                self.fit,
                method,
                seed=self.seed,
                checkpoints=self._checkpoints(name),
                runtime=self.runtime,
                start_epoch=epoch,
                memory=memory,
                keep_epoch=keep_epoch,
                poll=self.run.poll,
                on_epoch=on_epoch,
                warn=self.run.console.warn,
            )
        ends = (fitted.last, fitted.last_masks, fitted.best, fitted.best_masks)
        world().check_same(digest(*ends), f"the weights and masks of {name}")
        return fitted

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
        return self._check(Ticket.load(folder), folder)

    def _check(self, ticket: Ticket, folder: Path) -> Ticket:
        if ticket.provenance.config != self.config:
            raise ArtifactError(
                f"{folder} is a ticket of another configuration",
                expected="the tickets of this run",
                fix=f"remove {folder}",
            )
        return ticket


def _metrics(fitted: Fitted, first_epoch: int) -> dict[str, float]:
    return {
        "validation_accuracy": fitted.validation_accuracy,
        "best_epoch": fitted.best_epoch,
        "first_epoch": first_epoch,
    }
