"""A recipe for a distributed run: trains, is stopped on one process only, goes on, and says what each process has."""

import io
import json
from functools import partial

from torch import nn
from train_samples import CONFIG, MASKS, Moving, StopAfter, backwards, chase, network, splits

from deploy_sparse.config import Config
from deploy_sparse.errors import ArtifactError, DeploySparseError
from deploy_sparse.sparsify.method import Method, StaticMasks
from deploy_sparse.ticket import ModelRef
from deploy_sparse.train.console import Console
from deploy_sparse.train.distributed import world
from deploy_sparse.train.evaluate import accuracy
from deploy_sparse.train.loop import fit
from deploy_sparse.train.run import open_run
from deploy_sparse.train.runtime import RuntimeConfig, start_runtime
from deploy_sparse.train.tensors import digest
from deploy_sparse.train.tickets import TicketTrainer


class RecipeConfig(Config):
    """What the processes train with."""

    batch_size: int = 8
    backwards: bool = False
    stops: tuple[int, ...] = (8, 16)  # polls: within the dense training, within the ticket's


def check(config):
    pass


def no_batchnorm():
    model = network()
    model[1] = nn.Identity()
    return model


def trainer(run, config, factory):
    runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
    return TicketTrainer(run, "toy", factory, ModelRef("user factory"), splits(), config, runtime, 3, {})


def tickets(run, config, factory):
    """(digest, weights) of a dense stage with its memory and of a ticket trained from its rewind point."""
    making = trainer(run, config, factory)
    dense = making.dense(Method(), {}, rewind_epoch=1)
    ticket = making.train("rounds/1", dense.rewind, StaticMasks(MASKS), MASKS, keep="last")
    parts = (dense.initial.weights, dense.best.weights, dense.last.weights, dense.rewind.memory)
    return digest(*parts, ticket.weights, ticket.masks), ticket.weights


def stopping(folder, poll, config, factory=network):
    """The same, in a run of its own whose ``poll`` may stop it."""
    with open_run(folder, "toy", {}, resume=True, command="again", console=Console(io.StringIO()), poll=poll) as run:
        return tickets(run, config, factory)[0]


def moving(folder, poll, config, method=Moving):
    """The digest of a ticket whose masks moved, and of that ticket with BatchNorm statistics measured anew."""
    with open_run(folder, "toy", {}, resume=True, command="again", console=Console(io.StringIO()), poll=poll) as run:
        making = trainer(run, config, network)
        ticket = making.train("moving", making.initial(), method(), None, keep="last")
        found = making.reestimated("reestimated", ticket, batches=None)
        return digest(ticket.weights, ticket.masks, found.weights, found.masks)


def apart(folder, config):
    """What a training says whose masks differ between processes, and the epochs it told of."""
    rows, masks = [], {"0.weight": MASKS["0.weight"].roll(world().rank, 0)}
    options = {"seed": 3, "checkpoints": folder, "on_epoch": rows.append}
    return [said(lambda: fit(network(), splits(), config, StaticMasks(masks), **options)), len(rows)]


def said(action):
    """What an action raises, as [kind, text]."""
    try:
        action()
    except DeploySparseError as problem:
        return [type(problem).__name__, problem.given]
    return None


def damaged():
    raise ArtifactError("damaged here", expected="a", fix="b")


def main(config, run):
    me, found = world(), {}
    plain = CONFIG.model_copy(update={"batch_size": config.batch_size})
    factory = backwards if config.backwards else network
    averaged = plain.model_copy(update={"ema": 0.9})
    found["agree"] = me.agree({"rank": me.rank, "text": "ä"})
    found["gather"] = me.gather(["x" * me.rank, me.rank])
    found["numbers"] = [me.any(me.rank == 1), me.any(False), me.most(5 - me.rank), me.sum(me.rank + 1)]
    found["errors"] = [
        said(lambda: me.main_first(damaged)),
        said(lambda: me.main_only(damaged)),
        said(lambda: me.check_same(str(me.rank), "the numbers")),
    ]
    called = []
    me.main_only(lambda: called.append(1))
    found["called"] = len(called)

    found["digest"], weights = tickets(run, plain, factory)
    found["files_seen"] = me.agree(sorted(p.name for p in run.folder.iterdir()))
    model = factory()
    model.load_state_dict(weights)
    split = splits().validation
    found["accuracy"] = [accuracy(model, split), accuracy(model, split, batch_size=5, processes=me)]
    never = StopAfter(10_000)
    for polls in config.stops:
        folder = run.folder / f"stopped-{polls}"
        found[f"stop-{polls}"] = said(
            partial(stopping, folder, StopAfter(polls) if me.rank == 1 else never, plain, factory)
        )
        found[f"resumed-{polls}"] = stopping(folder, never, plain, factory)
    found["averaged"] = stopping(run.folder / "averaged", never, averaged)
    said(partial(stopping, run.folder / "averaged-stopped", StopAfter(7), averaged))
    found["averaged-resumed"] = stopping(run.folder / "averaged-stopped", never, averaged)
    adam = plain.model_copy(update={"optimizer": "adamw", "lr": 0.01, "decay_norms": False})
    found["moving"] = moving(run.folder / "moving", never, adam)
    found["moving-stop"] = said(
        partial(moving, run.folder / "moving-stopped", StopAfter(9) if me.rank == 1 else never, adam)
    )
    found["moving-resumed"] = moving(run.folder / "moving-stopped", never, adam)
    found["chase"] = moving(run.folder / "chase", never, adam, chase)
    stopped = partial(moving, run.folder / "chase-stopped", StopAfter(7) if me.rank == 1 else never, adam, chase)
    found["chase-stop"] = said(stopped)
    found["chase-resumed"] = moving(run.folder / "chase-stopped", never, adam, chase)
    found["apart"] = apart(run.folder / "apart", plain)

    runtime = start_runtime(RuntimeConfig(device="cpu", threads=1))
    options = {"seed": 3, "checkpoints": run.folder / "plain", "runtime": runtime}
    fitted = fit(no_batchnorm(), splits(), plain, StaticMasks(MASKS), **options)
    found["weights"] = {name: tensor.tolist() for name, tensor in fitted.last.items()}
    found["batchnorm"] = {name: tensor.tolist() for name, tensor in weights.items()}
    (run.folder / f"process-{me.rank}.json").write_text(json.dumps(found))
    run.console.say("said by the recipe")
    return {"processes": me.size}
