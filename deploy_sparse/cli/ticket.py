"""Make a ticket that has a latency on a target: the channels worth the most within it stay.

Where the time goes is measured first (a latency table of the network on the target, as deploy-sparse table makes it),
then as many channels of every group are kept as the table allows, and the compact network is built and timed beside the
dense one; where it misses what was asked by more than 5 %, the limit is corrected and the channels are chosen again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import emit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..measure.table import Table
    from ..sparsify.widths import LayerWidths
    from ..ticket import ModelRef, Ticket

EXAMPLES = """  deploy-sparse ticket --latency 0.5x --target cpu --network resnet18 --out half
  deploy-sparse ticket --latency 3.2ms --target cpu --network resnet18 --weights trained.safetensors --out fast
  deploy-sparse ticket runs/imp_refill-resnet_digits/rounds/4 --latency 0.4x --target cpu --out refilled
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", help="a ticket's folder whose weights and masks are scored, as refill does"
    )
    parser.add_argument("--latency", required=True, help="0.5x: half of the dense network's; 3.2ms: a time")
    parser.add_argument("--target", required=True, help="where it is deployed: a target's name or file")
    parser.add_argument("--out", required=True, help="folder to write the ticket to")
    parser.add_argument("--network", help="a zoo network's name instead of a ticket: one-shot pruning")
    parser.add_argument("--arguments", default="{}", help="with --network: JSON of its factory's arguments")
    parser.add_argument("--weights", help="with --network: a .safetensors file of its state dict; random otherwise")
    parser.add_argument(
        "--table",
        help="the latency table (deploy-sparse table), measured and written if missing; OUT.table.json by default",
    )
    parser.add_argument(
        "--batch", type=int, help="samples of a call; by default the table's, or what the target is for"
    )
    parser.add_argument("--scores", default="l1", help="what a channel is scored by: l1, l2, survivors, random")
    parser.add_argument("--worth", default="product", help="what is made large: product, share, channels or raw")
    parser.add_argument("--multiple", type=int, help="of the kept channels; by default the table's")
    parser.add_argument("--exclude", nargs="+", default=[], help="patterns of weights that keep all channels")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and scores")
    parser.add_argument("--no-check", action="store_true", help="do not build and time it: take the table's word")
    parser.add_argument("--passes", type=int, default=5, help="tickets to make until one is within 5 %%; 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds for each engine and pass")
    parser.add_argument("--records", help="file of JSON lines to append what was timed to")


def execute(options: argparse.Namespace) -> int:
    from ..artifact import read_json
    from ..engine.target import load_target
    from ..errors import ConfigError
    from ..measure.record import append_records
    from ..measure.table import plain
    from ..train.interrupt import Interrupts
    from ..tune.budget import Asked, widths_of
    from ..tune.budget_table import even_cuts, table_for
    from ..tune.budget_ticket import SCORES, source_of, ticket_within

    asked, target = Asked.parse(options.latency), load_target(options.target)
    weightless = tuple(name for name in SCORES if name in ("l1", "l2", "survivors", "random"))
    if options.scores not in weightless:
        raise ConfigError(
            f"score {options.scores!r}",
            expected=f"one of {', '.join(weightless)}; scores that need data are for Python",
            fix="choose one of them, or call deploy_sparse.tune.budget_ticket.source_of(…, score=…, batches=…)",
        )
    _check(options)
    network, model, ticket, note = _network(options)
    from ..api import zoo_factory

    factory = zoo_factory(model, "deploy_sparse.tune.budget_ticket.ticket_within(source, factory, …) in Python")
    inputs = _example(model, options.seed)
    source = source_of(
        network,
        inputs,
        model,
        ticket=ticket,
        score=options.scores,
        exclude=options.exclude,
        seed=options.seed,
        note=note,
    )
    say = _say if not options.json else lambda text: None
    with Interrupts("run the command again: what was timed for the table is kept") as interrupts:
        poll: Callable[[], None] = lambda: interrupts.poll("no ticket was written")  # noqa: E731
        file = Path(options.table or f"{options.out.rstrip('/')}.table.json")
        file = file / "table.json" if file.is_dir() else file
        cuts = even_cuts(source, factory, inputs)
        table = table_for(file, network, inputs, target, batch=options.batch, cuts=cuts, poll=poll, say=say)
        made, landing, records = ticket_within(
            source,
            factory,
            inputs,
            target,
            asked,
            table,
            batch=table.batch,
            digest=str(read_json(file)["digest"]),
            multiple=options.multiple,
            worth=options.worth,
            check=not options.no_check,
            passes=options.passes,
            duration_s=options.seconds,
            poll=poll,
            say=say,
        )
    folder = made.save(options.out)
    if options.records and records:
        append_records(Path(options.records), records)
    dense, kept = widths_of(table), landing.chosen.allocation.widths
    value = {
        "folder": str(folder),
        "ticket": made.hash,
        "table": str(file),
        "target": target.name,
        "batch": table.batch,
        "widths": {path: {"dense": list(counts), "kept": list(kept[path])} for path, counts in dense.items()},
    }
    next_step = shlex.join(["deploy-sparse", "compact", str(folder), "--out", f"{str(folder).rstrip('/')}-compact"])

    def text() -> str:
        return f"{plain(_widths(dense, kept))}\n{landing.sentence()}\nwritten to {folder}\nnext step: {next_step}"

    emit(options, {**value, **landing.summary()}, text)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse before the table is measured, which takes minutes, what would be refused after it."""
    from ..errors import ArtifactError, ConfigError, nearest
    from ..measure.record import check_appendable
    from ..sparsify.worth import WORTHS

    if options.worth not in WORTHS:
        raise ConfigError(
            f"worth {options.worth!r}",
            expected=f"one of {', '.join(WORTHS)}",
            fix=f"{nearest(options.worth, WORTHS)}mend the name",
        )
    for name in ("multiple", "passes"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name} {number}", expected="1 or more", fix="leave it out")
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise ConfigError(f"--seconds {options.seconds}", expected="a finite number above 0", fix="leave it out")
    out = Path(options.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ArtifactError(
            f"{out} already exists",
            expected="a folder name that is free",
            fix="choose another output folder, or remove this one",
        )
    if options.records:
        check_appendable(Path(options.records))


def _widths(dense: LayerWidths, kept: LayerWidths) -> Table:
    """Input and output channels of the layers that get narrower."""
    from ..measure.table import Table

    rows = [
        (path, f"{dense[path][0]} → {c_in}", f"{dense[path][1]} → {c_out}")
        for path, (c_in, c_out) in kept.items()
        if (c_in, c_out) != dense[path]
    ]
    note = f"{len(rows)} of {len(dense)} layers get narrower."
    return Table("Channels that stay", ("layer", "reads", "writes"), tuple(rows), note)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _network(options: argparse.Namespace) -> tuple[nn.Module, ModelRef, Ticket | None, dict[str, Any]]:
    """The network with its weights, which one it is, the ticket it comes from, and what the provenance says of it."""
    from ..errors import ConfigError

    if (options.source is None) == (options.network is None) or (options.weights and not options.network):
        raise ConfigError(
            "--weights without --network" if options.weights and not options.network
            else "neither a ticket nor --network" if options.source is None else "a ticket and --network",
            expected="a ticket's folder, or --network with a zoo network's name and perhaps --weights",
            fix="give one of the two",
        )  # fmt: skip
    if options.source is not None:
        return _of_ticket(Path(options.source))
    return _of_zoo(options)


def _of_ticket(folder: Path) -> tuple[nn.Module, ModelRef, Ticket, dict[str, Any]]:
    from ..api import zoo_factory
    from ..ticket import Ticket

    if (folder / "run.json").is_file() and (folder / "ticket").is_dir():
        folder = folder / "ticket"
    ticket = Ticket.load(folder)
    network = zoo_factory(ticket.model, "deploy_sparse.tune.budget_ticket.source_of(network, …) in Python")()
    network.load_state_dict(dict(ticket.validate(network).weights))
    return network.eval(), ticket.model, ticket, {}


def _of_zoo(options: argparse.Namespace) -> tuple[nn.Module, ModelRef, None, dict[str, Any]]:
    import torch

    from .. import zoo
    from ..artifact import sha256_file
    from ..errors import ArtifactError, ConfigError, TicketError
    from ..ticket import ModelRef

    entry = zoo.entry(options.network)
    try:
        arguments = json.loads(options.arguments)
        torch.manual_seed(options.seed)
        network = zoo.build(options.network, **arguments)
    except (ValueError, TypeError) as problem:
        raise ConfigError(
            f"--arguments {options.arguments}: {problem}",
            expected=f"a JSON object of what the factory of {options.network} takes",
            fix="for example --arguments '{\"classes\": 100}'",
        ) from None
    model = ModelRef(options.network, arguments, tuple(entry.input_shape))
    if not options.weights:
        return network.eval(), model, None, {"weights": f"random, seed {options.seed}"}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(options.weights)
    except (OSError, SafetensorError) as problem:
        raise ArtifactError(
            f"{options.weights} cannot be read: {problem}",
            expected="a .safetensors file of the network's state dict",
            fix="write one: safetensors.torch.save_file(network.state_dict(), path)",
        ) from None
    try:
        network.load_state_dict(state)
    except RuntimeError as problem:
        raise TicketError(
            f"{options.weights} does not fit {options.network}: {str(problem).splitlines()[-1].strip()}",
            expected="the state dict of that network, by the same names",
            fix="name the network that the weights are of",
        ) from None
    return network.eval(), model, None, {"weights": sha256_file(Path(options.weights))}


def _example(model: ModelRef, seed: int) -> tuple[torch.Tensor, ...]:
    import torch

    return (torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(seed)),)
