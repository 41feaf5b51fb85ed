"""IMP + refill: iterative magnitude pruning with rewinding, then whole channels, then a deployed engine.

Chen et al. 2022, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets", Algorithms 1 and 2:

1. Train the dense network; remember its weights at an early epoch (the rewind point).
2. IMP: prune the 20 % of the surviving weights with the smallest magnitude, over all convolutions; go back to the
   rewind point (weights and BatchNorm); train again; repeat for ``imp.rounds`` rounds.
3. Refill: in each layer keep max(1, ⌈density · c_out⌉) channels, those with the largest ℓ1 norm of surviving weights of
   that round, fill them up whole and silence the others.
4. Train each structural ticket from the rewind point. With several ``refill.rounds``, the sparsest ticket whose
   *validation* accuracy is within ``refill.tolerance`` of the dense network's is taken (the best one if none is).
5. Deploy: cut the ticket into a smaller network, verify that it computes the same function, export it to ONNX, compile
   engines for ``deploy.targets``, and time dense and ticket interleaved. *Test* accuracy is the deployed engine's.

Everything goes into the run folder; an interrupted run continues with ``--resume`` and ends with the same ticket.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from deploy_sparse import artifact, data, zoo
from deploy_sparse.config import Config
from deploy_sparse.data import Splits
from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.report import Table
from deploy_sparse.sparsify.imp import dense_masks, prune_lowest
from deploy_sparse.sparsify.method import StaticMasks
from deploy_sparse.sparsify.refill import Coupling, refill
from deploy_sparse.structure import Masks, density
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.train.loop import FitConfig, State, accuracy, copy_state, fit
from deploy_sparse.train.run import Run
from deploy_sparse.tune.deliver import DeployConfig, deliver
from deploy_sparse.tune.deliver import check as check_deploy


class ModelConfig(Config):
    """The network."""

    name: str = Field("resnet_digits", description="zoo name")
    arguments: dict[str, Any] = Field({}, description="arguments of the zoo's factory")


class DataConfig(Config):
    """The data."""

    name: str = Field("digits", description="data set name")


class ImpConfig(Config):
    """Iterative magnitude pruning."""

    rounds: int = Field(4, ge=1, description="pruning rounds")
    rate: float = Field(0.2, gt=0, lt=1, description="share of the surviving weights pruned in a round")
    rewind_epoch: int = Field(1, ge=0, description="epoch whose starting weights every later training starts from")
    exclude: tuple[str, ...] = Field((), description="patterns of weights to leave dense")


class RefillConfig(Config):
    """From an unstructured mask to whole channels."""

    rounds: tuple[int, ...] = Field((), description="IMP rounds to refill; empty for the last one")
    coupling: Coupling = Field("layer", description="layer: the paper's rule; group: one choice per residual stream")
    multiple: int = Field(1, ge=1, description="round kept channels up to this multiple; 1 is the paper's rule")
    tolerance: float = Field(
        0.005, ge=0, lt=1, description="validation accuracy that may be lost when choosing a round"
    )


class RecipeConfig(Config):
    """All of the recipe's configuration."""

    seed: int = Field(0, ge=0, description="initialisation, split, data order")
    threads: int = Field(0, ge=0, description="CPU threads for training; 0 for all")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    fit: FitConfig = FitConfig()
    imp: ImpConfig = ImpConfig()
    refill: RefillConfig = RefillConfig()
    deploy: DeployConfig = DeployConfig()


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists.

    Raises:
        ConfigError: naming the key and what it accepts.
    """
    images = data.describe(config.data.name)
    zoo.check(config.model.name, config.model.arguments, images.image_shape, images.classes)
    check_deploy(config.deploy)
    if not all(1 <= number <= config.imp.rounds for number in config.refill.rounds):
        raise ConfigError(
            f"refill.rounds = {list(config.refill.rounds)}",
            expected=f"rounds between 1 and imp.rounds = {config.imp.rounds}",
            fix="choose fewer, or raise --imp.rounds",
        )
    if config.imp.rewind_epoch >= config.fit.epochs:
        raise ConfigError(
            f"imp.rewind_epoch = {config.imp.rewind_epoch} with fit.epochs = {config.fit.epochs}",
            expected="a rewind point inside the training",
            fix="choose an earlier epoch",
        )


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    job = _Job(config, run)

    # Algorithm 1: IMP with rewinding
    masks = dense_masks(job.network(), exclude=config.imp.exclude)
    trained = job.dense(masks)
    structured = {}
    for number in range(1, config.imp.rounds + 1):
        masks = prune_lowest(trained.weights, masks, config.imp.rate)
        if number in job.refill_rounds:  # Algorithm 2: channel-wise masks from this round's own trained weights
            structured[number] = refill(
                masks, trained.weights, job.groups, coupling=config.refill.coupling, multiple=config.refill.multiple
            )
        if number < config.imp.rounds:
            trained = job.imp_round(number, masks)

    # Train the structural tickets, choose on validation
    candidates = {number: job.ticket(number, structured[number]) for number in structured}
    chosen = job.choose(candidates)
    ticket = run.once("ticket", lambda: candidates[chosen], Ticket.save, Ticket.load)

    delivered = deliver(
        dense=Ticket.load(run.folder / "dense"),
        ticket=ticket,
        factory=job.network,
        example_inputs=(job.data.validation.images[:16],),
        evaluate=lambda predict: accuracy(predict, job.data.test),
        folder=run.folder,
        config=config.deploy,
        title=f"{config.model.name} on {config.data.name}: IMP + refill",
        tables=(job.rounds_table(candidates, chosen),),
        command=run.command,
        poll=run.poll,
        say=run.console.say,
    )
    return {"ticket": ticket.hash, "refill_round": chosen, **delivered}


class _Job:
    """One run's network, data and training, so that :func:`main` reads like the paper's algorithm."""

    def __init__(self, config: RecipeConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.refill_rounds = config.refill.rounds or (config.imp.rounds,)
        shape = data.describe(config.data.name).image_shape
        self.model = ModelRef(config.model.name, dict(config.model.arguments), shape)
        self.data: Splits = data.load(config.data.name, seed=config.seed)
        example = torch.zeros(2, *shape)
        self.groups = channel_groups(self.network(), (example,))

    def network(self) -> torch.nn.Module:
        """The dense architecture with this seed's initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return zoo.build(self.config.model.name, **self.config.model.arguments)

    def dense(self, masks: Masks) -> Ticket:
        """Round 0: the dense network; leaves ``rewind`` and ``dense`` (best on validation) in the run folder."""
        return self._train("rounds/0", copy_state(self.network()), masks, parent=None, keep="last")

    def imp_round(self, number: int, masks: Masks) -> Ticket:
        """Train the unstructured ticket of a round from the rewind point; its last weights are ranked next."""
        rewind = Ticket.load(self.run.folder / "rewind")
        return self._train(f"rounds/{number}", dict(rewind.weights), masks, parent=rewind.hash, keep="last")

    def ticket(self, number: int, masks: Masks) -> Ticket:
        """Train the structural ticket of a round from the rewind point; the best epoch on validation is kept."""
        rewind = Ticket.load(self.run.folder / "rewind")
        return self._train(f"tickets/{number}", dict(rewind.weights), masks, parent=rewind.hash, keep="best")

    def choose(self, candidates: Mapping[int, Ticket]) -> int:
        """The sparsest candidate within the tolerance of dense on validation, else the most accurate one."""
        score = {number: t.provenance.metrics["validation_accuracy"] for number, t in candidates.items()}
        dense = Ticket.load(self.run.folder / "dense").provenance.metrics["validation_accuracy"]
        good = [number for number in score if score[number] >= dense - self.config.refill.tolerance]
        return max(good) if good else max(score, key=lambda number: (score[number], number))

    def rounds_table(self, candidates: Mapping[int, Ticket], chosen: int) -> Table:
        """IMP's rounds and the structural tickets made from them."""
        rows = []
        for number in range(self.config.imp.rounds):
            trained = Ticket.load(self.run.folder / f"rounds/{number}")
            what = "dense" if number == 0 else f"IMP round {number}"
            rows.append(_row(what, trained))
        rows += [_row(f"refill of round {n}{' (chosen)' if n == chosen else ''}", t) for n, t in candidates.items()]
        return Table(
            title="Rounds",
            columns=("network", "density of the convolutions", "best validation accuracy", "best epoch"),
            rows=tuple(rows),
            note="Density counts the convolutions' surviving weights. Tickets are chosen on validation, never on test.",
        )

    def _train(self, name: str, start: State, masks: Masks, *, parent: str | None, keep: str) -> Ticket:
        def make() -> Ticket:
            network = self.network()
            network.load_state_dict(start)
            with self.run.console.task(name, self.config.fit.epochs) as progress:

                def on_epoch(row: Mapping[str, Any]) -> None:
                    self.run.log({"training": name, **row})
                    progress.advance(row["epoch"] + 1, f"validation {row['validation_accuracy']:.2%}")

                fitted = fit(
                    network, self.data, self.config.fit, StaticMasks(masks), seed=self.config.seed,
                    checkpoints=self.run.folder / "checkpoints" / name.replace("/", "-"),
                    keep_epoch=self.config.imp.rewind_epoch if parent is None else None,
                    poll=self.run.poll, on_epoch=on_epoch, warn=self.run.console.warn,
                )  # fmt: skip
            metrics = {"validation_accuracy": fitted.validation_accuracy, "best_epoch": fitted.best_epoch}
            if parent is None:
                assert fitted.early is not None
                self._as_ticket(fitted.early, {}, None, {}).save(self.run.folder / "rewind")
                self._as_ticket(fitted.best, {}, None, metrics).save(self.run.folder / "dense")
            return self._as_ticket(fitted.best if keep == "best" else fitted.last, masks, parent, metrics)

        return self.run.once(name, make, Ticket.save, Ticket.load)

    def _as_ticket(self, weights: State, masks: Masks, parent: str | None, metrics: Mapping[str, float]) -> Ticket:
        return Ticket(
            weights=weights,
            masks=masks,
            model=self.model,
            provenance=Provenance(
                method="imp_refill",
                config=self.config.model_dump(mode="json", exclude={"deploy"}),
                seed=self.config.seed,
                data={"name": self.data.name, **self.data.sizes()},
                versions=artifact.environment(),
                parent=parent,
                metrics=metrics,
            ),
        )


def _row(what: str, ticket: Ticket) -> tuple[str, ...]:
    metrics = ticket.provenance.metrics
    convolutions = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 2}
    return (
        what, f"{density(convolutions):.1%}", f"{metrics['validation_accuracy']:.2%}", str(metrics["best_epoch"])
    )  # fmt: skip


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
