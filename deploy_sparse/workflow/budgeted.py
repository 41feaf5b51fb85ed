"""Latency budgets in recipes: their keys, the table of the network, and the limit that lands at what was asked."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..artifact import read_json, write_json
from ..config import Config
from ..errors import ConfigError
from ..measure.record import read_records
from ..sparsify.allocation import Allocation, LatencyBudget
from ..sparsify.worth import Worth
from ..structure import Masks
from ..ticket import Provenance, Ticket
from ..train.distributed import world
from ..tune.budget import TOLERANCE, Asked, budget_of, land
from ..tune.budget_table import even_cuts, require_here, table_for
from ..tune.budget_ticket import source_of
from ..tune.budget_timing import BesideDense, timed_among
from ..tune.deliver import DeployConfig
from .prepare import Work

FOLDER = "latency"
"""Within the run folder: the table, and how every budget was reached."""


class LatencyKeys(Config):
    """What a budget in latency asks for."""

    latency: str = Field(
        "", description="with the budget latency: 0.5x of the dense network's, or 3.2ms; on the first target and batch"
    )
    table: str = Field("", description="file of the latency table (deploy-sparse table); empty: measured in the run")
    worth: Worth = Field("product", description="what a latency budget makes large: product, share, channels or raw")
    check: bool = Field(
        True, description="build and time the network that a latency budget leaves before training it, and correct"
    )


def check_latency(deploy: DeployConfig, keys: LatencyKeys, table: str, wanted: bool) -> None:
    """Refuse keys of a latency budget that say nothing, or too much.

    Args:
        table: the configuration's table, for messages.
        wanted: whether the budget is ``"latency"``.

    Raises:
        ConfigError: naming the key and what it accepts, or the target does not run here.
        MissingDependencyError, BuildError: nothing can be built for the target here.
    """
    if not wanted:
        if keys.latency or keys.table:
            key = "latency" if keys.latency else "table"
            raise ConfigError(
                f'{table}.{key} = "{getattr(keys, key)}" without {table}.budget = "latency"',
                expected="it with that budget only",
                fix=f"add --{table}.budget latency, or drop the key",
            )
        return
    try:
        Asked.parse(keys.latency)
    except ConfigError as problem:
        raise ConfigError(f"{table}.latency: {problem.given}", expected=problem.expected, fix=problem.fix) from None
    if keys.table and not Path(keys.table).exists():
        raise ConfigError(
            f'{table}.table = "{keys.table}", which is not there',
            expected="a latency table's file",
            fix="make it: deploy-sparse table, or leave the key out: it is measured in the run",
        )
    if keys.check or not keys.table:
        require_here(deploy.targets[0])


def refuse_with_latency(table: str, others: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse what does not go with a latency budget: by key and value whether it is so, and what is expected.

    Raises:
        ConfigError: the first that is.
    """
    for given, (wrong, expected) in others.items():
        if wrong:
            raise ConfigError(
                f'{given} with {table}.budget = "latency"', expected=expected, fix="change one of the two"
            )


def table_budget(work: Work, keys: LatencyKeys, multiple: int) -> LatencyBudget:
    """The budget by the table, which is measured into the run folder where none was given.

    Args:
        multiple: that the configuration asks for; kept are multiples of the table's and the target's besides, which
            deployment rounds up to.
    """
    deploy = work.config.deploy
    network, inputs = work.trainer.factory(), _inputs(work)
    source = source_of(network, inputs, work.trainer.model)
    given = Path(keys.table) / "table.json" if Path(keys.table).is_dir() else Path(keys.table)
    file = given if keys.table else work.run.folder / FOLDER / "table.json"
    table = world().main_first(
        lambda: table_for(
            file,
            network,
            inputs,
            deploy.targets[0],
            batch=deploy.batches[0],
            cuts=even_cuts(source, work.trainer.factory, inputs),
            poll=work.run.poll,
            say=work.run.console.say,
        )
    )
    rounded = math.lcm(table.multiple, multiple, table.target["width_multiple"] if deploy.align else 1)
    return budget_of(table, Asked.parse(keys.latency), multiple=rounded, worth=keys.worth)


def landed(
    work: Work,
    keys: LatencyKeys,
    name: str,
    budget: LatencyBudget,
    weights: Mapping[str, torch.Tensor],
    cut: Callable[[LatencyBudget], tuple[Masks, Allocation]],
) -> LatencyBudget:
    """The budget with the limit at which the network, built and timed before it is trained, has the asked latency.

    How it was reached is kept in the run folder, so that a run that is continued makes the same tickets.

    Args:
        name: of the file it is kept in.
        weights: the network's; they play no part in its time.
        cut: the masks within a budget.
    """
    deploy, inputs = work.config.deploy, _inputs(work)
    asked = Asked.parse(keys.latency)

    def made(limit: float) -> tuple[Ticket, Allocation]:
        masks, found = cut(replace(budget, ms=limit))
        own = {key: tensor.cpu() for key, tensor in weights.items()}
        return Ticket(
            own, {key: mask.cpu() for key, mask in masks.items()}, work.trainer.model, Provenance(name)
        ), found

    def reached() -> dict[str, Any]:
        found: dict[str, Any] = {}

        def timed() -> None:
            with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
                beside = BesideDense(
                    work.trainer.factory,
                    inputs,
                    deploy.targets[0],
                    deploy.batches[0],
                    deploy.duration_s,
                    Path(scratch),
                    work.run.poll,
                )
                found.update(land(asked, budget.ms, made, beside if keys.check else None, say=say)[1].summary())

        world().main_only(timed)
        agreed: dict[str, Any] = world().agree(found)
        return agreed

    say = work.run.console.say
    summary = work.run.once(f"{FOLDER}/{name}.json", reached, lambda value, path: write_json(path, value), read_json)
    if summary["landed"] is False:
        work.run.console.warn(f"{name}: asked {asked}, and the nearest that was found is off by {summary['miss']:+.1%}")
    return replace(budget, ms=summary["limit_ms"])


def delivered(work: Work, keys: LatencyKeys, result: Mapping[str, Any], wanted: bool) -> dict[str, Any]:
    """The results, with how far the deployed network is from the asked latency; a warning where that is over 5 %.

    The network that is deployed was timed before it was trained, or, by Chase, stands for one of about its widths.

    Args:
        result: of the deployment; empty on all processes but the first.
        wanted: whether the budget is ``"latency"``.
    """
    if not (wanted and result):
        return dict(result)
    asked, deploy = Asked.parse(keys.latency), work.config.deploy
    timed = timed_among(read_records(work.run.folder / "records.jsonl"), deploy.targets[0], deploy.batches[0])
    if timed is None:
        return {**result, "latency": {"asked": str(asked), "measured": None, "miss": None}}
    miss = asked.miss(timed.ms, timed.share)
    if abs(miss) > TOLERANCE:
        work.run.console.warn(
            f"asked {asked}, and the deployed network takes {timed.share:.3f}x ({timed.ms:.4g} ms): off by {miss:+.1%}"
        )
    return {**result, "latency": {"asked": str(asked), "measured": timed.share, "miss": miss}}


def _inputs(work: Work) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(2, *work.data.image_shape),)
