"""The latency table of a network on a target, from a file or measured into it, and whether it is of this network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from ..engine.target import Target, load_target
from ..errors import ConfigError
from ..sparsify.patterns import channels, silent_pools, whole
from ..sparsify.silence import silence
from ..surgery.compact import compact
from ..ticket import Ticket
from .budget_ticket import Source
from .formats import require_timing
from .latency.measure import Cuts, measure_table
from .latency.shapes import shapes_of
from .latency.table import LatencyTable, read_table
from .layer_bench import layer_times_folder


def table_for(
    file: Path,
    network: nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    where: str | Path | Target,
    *,
    batch: int | None = None,
    cuts: Cuts | None = None,
    poll: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> LatencyTable:
    """The table in ``file``, checked against network and target; a missing one is measured and written there.

    Args:
        where: the target, or its name or file.
        batch: samples of a call; by default the table's, or what the target is tuned for.
        cuts: narrower networks to calibrate a new table by, see :func:`even_cuts`.

    Raises:
        ConfigError: the table is of another network, target or batch; or it is missing and the target does not run
            here.
        ArtifactError: the file is damaged, or cannot be written.
        SurgeryError, ExportError, BuildError, EngineError, MissingDependencyError: nothing can be measured.
    """
    target = load_target(where)
    if not file.exists():
        require_timing(target)
        say(f"no table at {file}: measuring {target.name}")
        table = measure_table(
            network,
            example_inputs,
            target,
            batch=target.batch.opt if batch is None else batch,
            cuts=cuts,
            cache=layer_times_folder(),
            poll=poll,
            say=say,
        )
        table.save(file)
        return table
    table = read_table(file)
    fix = "name another file for the table, or one that does not exist: it is measured into that"
    if table.target["digest"] != target.digest:
        raise ConfigError(
            f"{file} is of target {table.target['name']!r}, whose settings are not those of {target.name!r}",
            expected="a table of the same target",
            fix=fix,
        )
    if batch is not None and batch != table.batch:
        raise ConfigError(f"{file} is of batch {table.batch}", expected=f"a table of batch {batch}", fix=fix)
    if dict(table.layers) != shapes_of(network, example_inputs):
        raise ConfigError(
            f"{file} is of another network: its {len(table.layers)} layers are not this network's",
            expected="a table of the same network and input shape",
            fix=fix,
        )
    return table


def require_here(where: str | Path) -> None:
    """Check that engines of a target, by its name or file, run on this machine.

    Raises:
        ConfigError: they do not.
        MissingDependencyError, BuildError: none can be built.
    """
    require_timing(load_target(where))


SHARES = (Fraction(3, 4), Fraction(1, 2))
"""Of all channels, what the networks keep that a table is calibrated by."""


def even_cuts(
    source: Source, factory: Callable[[], nn.Module], example_inputs: tuple[torch.Tensor, ...]
) -> Callable[[int], Mapping[str, nn.Module]]:
    """Networks that keep the same share of every group of channels, given the multiple of what they keep."""

    def made(multiple: int) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for share in SHARES:
            shares = dict.fromkeys(source.masks, share)
            pools = silent_pools(source.masks, source.groups, together=True)
            rows = channels(source.scores, source.masks, shares, pools, width=whole(multiple))
            masks = silence(rows, source.weights, source.groups)
            ticket = Ticket(source.weights, masks, source.model, source.origin)
            found[f"{float(share):.0%} of the channels"] = compact(ticket, factory, example_inputs).module
        return found

    return made
