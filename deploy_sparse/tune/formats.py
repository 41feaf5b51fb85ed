"""What pays on a target, decided by timing it there: packed layers, whole channels, or the dense network as it was.

Each layer that can be packed is timed against its dense form, both as engines of their own, with the look-ups that it
would need in the network. Those that lose stay dense, which may spare or cost others a look-up, so the rest is looked
at again. Then whole networks are timed side by side, and the fastest is taken; the dense one unless another beats it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.build import build_engine
from ..engine.target import Target
from ..errors import ConfigError
from ..measure.profile import profile
from ..surgery.compact import Compact, Format, compact
from ..surgery.graph import Inputs
from ..surgery.pack import layer_forms
from ..ticket import Ticket
from .layer_bench import LayerBench

MARGIN = 0.02
_ROUNDS = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerTime:
    """A layer packed against the same layer dense, on the target.

    Attributes:
        layer: path.
        form: of its blocks, and the look-ups around them.
        share: of its multiply-accumulates that are left.
        ratio: dense time over packed time.
        packed: whether it is packed in the end.
    """

    layer: str
    form: str
    share: float
    ratio: float
    packed: bool


@dataclass(frozen=True)
class NetworkTime:
    """A whole network against the dense one.

    Attributes:
        name: how it is deployed.
        macs: multiply-accumulates of one sample.
        ratio, low, high: dense time over its time, with the 95 % interval.
    """

    name: str
    macs: int
    ratio: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Choice:
    """What was timed and what was taken.

    Attributes:
        name: of the network taken.
        target: its name.
        batch: samples of a timed call.
        layers: packed against dense, layer by layer.
        networks: whole networks against the dense one.
    """

    name: str
    target: str
    batch: int
    layers: tuple[LayerTime, ...]
    networks: tuple[NetworkTime, ...]

    def lines(self) -> list[str]:
        """The choice in a few lines of text."""
        found = [f"chosen for {self.target} at batch {self.batch}: {self.name}"]
        found += [f"  {n.name}: {n.ratio:.2f}x as fast as dense" for n in self.networks]
        packed = sum(layer.packed for layer in self.layers)
        return found + [f"  {packed} of {len(self.layers)} layers of blocks are faster packed"] * bool(self.layers)


def require_timing(target: Target) -> None:
    """Check, with an engine of one small layer, that engines of this target run on this machine.

    Raises:
        ConfigError: they do not.
        MissingDependencyError, BuildError: none can be built.
    """
    if not target.on_gpu:
        return
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        probe = build_engine(nn.Linear(16, 16), target, torch.zeros(2, 16), Path(scratch), name="probe")
        reason = probe.runnable()
    if reason is not None:
        raise ConfigError(
            f"engines for target {target.name!r} cannot be timed here: {reason}",
            expected="a target that runs on this machine, to choose a format by timing",
            fix="choose the format 'channels' or 'packed', or do this on the machine it is deployed to",
        )


def choose_format(
    ticket: Ticket,
    factory: Callable[[], nn.Module],
    target: Target,
    example_inputs: Inputs | None = None,
    *,
    batch: int = 1,
    duration_s: float = 1.0,
    cache: Path | None = None,
    say: Say = lambda text: None,
    **options: Any,
) -> tuple[Compact, Choice]:
    """The fastest exact form of a ticket on a target that runs here.

    Args:
        ticket: weights and masks.
        factory: makes the dense architecture.
        target: where it is deployed to.
        example_inputs: as for :func:`~..surgery.compact.compact`.
        batch: samples of a timed call.
        duration_s: timed seconds for each network; layers get a quarter.
        cache: folder for layers' times, so that they are not taken again; none by default.
        say: receives progress lines.
        options: for :func:`~..surgery.compact.compact`.

    Raises:
        TicketError, SurgeryError, ExportError, BuildError, MissingDependencyError: a form cannot be made.
        ConfigError: the target does not run here.
    """

    def make(format: Format, **how: Any) -> Compact:
        return compact(ticket, factory, example_inputs, format=format, **{**options, **how})

    multiple = target.width_multiple
    require_timing(target)
    made: dict[str, Compact] = {"dense": make("dense")}
    aligned = make("channels", multiple=multiple)
    for name, found in (
        (f"channels, multiples of {multiple}", aligned),
        ("channels", make("channels", multiple=1)),
        ("channels, spread", make("channels", multiple=multiple, shortcuts="spread")),
    ):
        if found.plan.shape not in [known.plan.shape for known in made.values()]:
            made[name] = found
    layers = _layers(aligned, ticket, LayerBench(target, batch, duration_s / 4, cache), say)
    if chosen := [layer.layer for layer in layers if layer.packed]:
        made["packed"] = make("packed", multiple=multiple, layers=chosen)
    networks = _networks(made, target, batch, duration_s)
    faster = [network for network in networks if (network.ratio if network.low is None else network.low) > 1]
    best = max(faster, key=lambda network: network.ratio, default=None)
    name = "dense" if best is None else best.name
    choice = Choice(name, target.name, batch, layers, networks)
    return replace(made[name], plan=replace(made[name].plan, choice=tuple(choice.lines()))), choice


def _layers(network: Compact, ticket: Ticket, bench: LayerBench, say: Say) -> tuple[LayerTime, ...]:
    """Time every layer of blocks, and again where the look-ups change because others stay dense."""
    times: dict[str, LayerTime] = {}
    only: set[str] | None = None
    for _ in range(_ROUNDS):
        forms = layer_forms(network.module, ticket.masks, network.plan.cuts, network.example_inputs, only)
        for form, ratio in zip(forms, bench.ratios(forms), strict=True):
            times[form.path] = LayerTime(form.path, str(form), form.share, ratio, True)
            say(f"{form.path}: {form}, {times[form.path].ratio:.2f}x of dense")
        losers = {form.path for form in forms if times[form.path].ratio < 1 + MARGIN}
        if not losers:
            break
        only = {form.path for form in forms} - losers
        times |= {path: replace(times[path], packed=False) for path in losers}
    else:
        times = {path: replace(time, packed=time.packed and time.ratio >= 1 + MARGIN) for path, time in times.items()}
    return tuple(times.values())


def _networks(made: Mapping[str, Compact], target: Target, batch: int, duration_s: float) -> tuple[NetworkTime, ...]:
    """Whole networks against the dense one, timed side by side."""
    if len(made) < 2:
        return ()
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        engines = {
            name: build_engine(network, target, out=Path(scratch), name=f"network{number}")
            for number, (name, network) in enumerate(made.items())
        }
        comparisons = profile(engines, "dense", batches=(batch,), duration_s=duration_s).comparisons
    return tuple(
        NetworkTime(c.subject, made[c.subject].plan.cost_after.macs, c.ratio, c.low, c.high) for c in comparisons
    )
