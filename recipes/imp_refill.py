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
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field

from deploy_sparse import data, zoo
from deploy_sparse.config import Config
from deploy_sparse.errors import ConfigError
from deploy_sparse.measure.table import Table
from deploy_sparse.sparsify.imp import dense_masks, prune_lowest
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.sparsify.refill import Coupling, refill
from deploy_sparse.structure import density, row_density
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.ticket import ModelRef, Ticket
from deploy_sparse.train.loop import FitConfig, accuracy, check_batch_size
from deploy_sparse.train.run import Run
from deploy_sparse.train.tickets import TicketTrainer
from deploy_sparse.tune.deliver import DeployConfig, check_deploy, deliver


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

    seed: int = Field(0, ge=0, lt=2**32, description="initialisation, split, data order")
    threads: int = Field(2, ge=1, description="CPU threads for training; the last digits of sums depend on it")
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
    network = zoo.check(config.model.name, config.model.arguments, images.image_shape, images.classes)
    dense_masks(network, exclude=config.imp.exclude)
    check_batch_size(config.fit, images.train_images)
    check_deploy(config.deploy)
    rounds = config.refill.rounds
    if not all(1 <= number <= config.imp.rounds for number in rounds) or len({*rounds}) < len(rounds):
        raise ConfigError(
            f"refill.rounds = {list(rounds)}",
            expected=f"different rounds between 1 and imp.rounds = {config.imp.rounds}",
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
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    factory = partial(_network, config)
    images = data.load(config.data.name, seed=config.seed)
    shape = tuple(images.train.images.shape[1:])
    groups = channel_groups(factory(), (torch.zeros(2, *shape),))
    trainer = TicketTrainer(
        run,
        method="imp_refill",
        factory=factory,
        model=ModelRef(config.model.name, dict(config.model.arguments), shape),
        data=images,
        fit=config.fit,
        seed=config.seed,
        config=config.model_dump(mode="json", exclude={"deploy"}),
    )

    # Algorithm 1: IMP with rewinding. Round r trains under the mask that the weights of round r - 1 gave.
    masks = dense_masks(factory(), exclude=config.imp.exclude)
    dense = trainer.dense(Method(), masks, rewind_epoch=config.imp.rewind_epoch)
    rounds, tickets = [dense.last], {}
    for number in range(1, config.imp.rounds + 1):
        masks = prune_lowest(rounds[-1].weights, masks, config.imp.rate)
        trained = trainer.train(f"rounds/{number}", dense.rewind, StaticMasks(masks), masks, keep="last")
        rounds.append(trained)

        # Algorithm 2: this round's mask, scored with this round's own trained weights
        if number in (config.refill.rounds or (config.imp.rounds,)):
            rule = config.refill
            filled = refill(masks, trained.weights, groups, coupling=rule.coupling, multiple=rule.multiple)
            tickets[number] = trainer.train(f"tickets/{number}", dense.rewind, StaticMasks(filled), filled, keep="best")

    chosen = choose(dense.best, tickets, config.refill.tolerance)
    tickets[chosen].save(run.folder / "ticket")
    delivered = deliver(
        dense=dense.best,
        ticket=tickets[chosen],
        factory=factory,
        example_inputs=(images.validation.images[:16],),
        evaluate=lambda predict: accuracy(predict, images.test),
        folder=run.folder,
        config=config.deploy,
        title=f"{config.model.name} on {config.data.name}: IMP + refill",
        tables=(_rounds_table(rounds, tickets, chosen),),
        command=run.origin,
        poll=run.poll,
        say=run.console.say,
    )
    return {"ticket": tickets[chosen].hash, "refill_round": chosen, **delivered}


def choose(dense: Ticket, tickets: Mapping[int, Ticket], tolerance: float) -> int:
    """The sparsest ticket within ``tolerance`` of dense on validation, else the most accurate one; by its round."""
    score = {number: ticket.provenance.metrics["validation_accuracy"] for number, ticket in tickets.items()}
    least = dense.provenance.metrics["validation_accuracy"] - tolerance
    good = [number for number in score if score[number] >= least]
    return max(good) if good else max(score, key=lambda number: (score[number], number))


def _network(config: RecipeConfig) -> torch.nn.Module:
    """The dense network with the seed's initial weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return zoo.build(config.model.name, **config.model.arguments)


def _rounds_table(rounds: Sequence[Ticket], tickets: Mapping[int, Ticket], chosen: int) -> Table:
    named = [("dense" if number == 0 else f"IMP round {number}", ticket) for number, ticket in enumerate(rounds)]
    named += [(f"refill of round {n}{' (chosen)' if n == chosen else ''}", ticket) for n, ticket in tickets.items()]
    rows = []
    for name, ticket in named:
        masks = {key: mask for key, mask in ticket.masks.items() if mask.dim() > 2}
        metrics = ticket.provenance.metrics
        shares = (f"{share(masks):.1%}" for share in (row_density, density))
        rows.append((name, *shares, f"{metrics['validation_accuracy']:.2%}", str(metrics["best_epoch"])))
    columns = ("network", "weights in kept channels", "weights used", "best validation accuracy", "best epoch")
    note = (
        "Shares of the convolutions' weights. Refill fills up the kept output channels (first column); what reads "
        "dropped channels is not used (second column). Tickets are chosen on validation, never on test."
    )
    return Table("Rounds", columns, tuple(rows), note)


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
