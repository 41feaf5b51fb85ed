"""What pays on a target, decided by timing it there: packed layers, whole channels, or the dense network as it was.

Each layer that can be packed is timed against its dense form, both as engines of their own, with the look-ups that it
would need in the network. Those that lose stay dense, which may spare or cost others a look-up, so the rest is looked
at again. Then whole networks are timed side by side, and the fastest once more: the fastest of several is so by luck
too. It is taken if it wins both times; else the next; the dense network where none does. What cannot be made, exported,
compiled or run is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.build import build_engine
from ..engine.target import Target
from ..errors import BuildError, ConfigError, EngineError, ExportError, SurgeryError
from ..measure.subjects import checked_batches
from ..surgery.compact import Compact, Format, compact
from ..surgery.graph import Inputs
from ..surgery.pack import LayerForm, Layers, layer_forms
from ..surgery.packing import Style
from ..surgery.plan import Norms, Shortcuts
from ..ticket import Ticket
from .choice import Choice, LayerTime, NetworkTime, planned_for
from .layer_bench import LayerBench
from .network_bench import NetworkBench

MARGIN = 0.02
LARGE = 1.2  # gain of the layers that are tried alone where all that gain lose together
CLEAR = 1.05  # gain of a network that one more timing confirms; engines opened again may differ by a few percent
CONFIRMATIONS = 3  # of a smaller gain
_ROUNDS = 4

Say = Callable[[str], None]
Poll = Callable[[], None]


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
    batch: int | Sequence[int] = 1,
    duration_s: float = 1.0,
    align: bool = True,
    norms: Norms = "exact",
    shortcuts: Shortcuts = "union",
    cache: Path | None = None,
    poll: Poll = lambda: None,
    say: Say = lambda text: None,
) -> tuple[Compact, Choice]:
    """The fastest exact form of a ticket on a target that runs here.

    Args:
        ticket: weights and masks.
        factory: makes the dense architecture.
        target: where it is deployed to.
        example_inputs: as for :func:`~..surgery.compact.compact`.
        batch: samples of a timed call. Of several, layers are timed at the first; a network has to be faster than dense
            at the first, and to keep :data:`~.choice.FLOOR` of dense's speed at all others.
        duration_s: timed seconds for each network and batch; layers get a quarter.
        align: try widths rounded up to what the target likes, and pack such; False: as they are only.
        norms: as for :func:`~..surgery.compact.compact`.
        shortcuts: as there; ``"union"`` tries ``"spread"`` too, and ``"spread"`` nothing else.
        cache: folder for layers' times, so that they are not taken again; none by default.
        poll: called between steps and timed blocks; what it raises ends the call.
        say: receives progress lines.

    Raises:
        ConfigError: the target does not run here, or not at such a batch.
        TicketError, SurgeryError, ExportError, BuildError, EngineError, MissingDependencyError: the masked dense
            network itself cannot be traced, exported, built or run. Other forms that cannot are left out, which the
            choice says.
    """
    batches = _checked(batch, target)
    require_timing(target)

    def make(format: Format, multiple: int, shortcuts: Shortcuts, layers: Layers | None = None) -> Compact:
        poll()
        how: dict[str, Any] = {"layers": layers, "multiple": multiple, "norms": norms, "shortcuts": shortcuts}
        return compact(ticket, factory, example_inputs, format=format, **how)

    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        layers = LayerBench(target, batches[0], duration_s / 4, cache, poll)
        networks = NetworkBench(target, batches, duration_s, Path(scratch), poll)
        planner = _Planner(make, ticket, layers, networks, say)
        name, again = planner.decide((target.width_multiple, 1) if align else (1,), shortcuts)
    choice = Choice(
        name,
        target.name,
        batches[0],
        tuple(planner.layer_times.values()),
        tuple(planner.network_times),
        again,
        batches[1:],
        tuple(planner.dropped.items()),
    )
    found = planner.made[name]
    lines, planned = tuple(choice.lines()), planned_for(target, batches, align)
    return replace(found, plan=replace(found.plan, choice=lines, format="auto", target=planned)), choice


@dataclass(frozen=True)
class _Base:
    """A network with channels cut, whose layers are packed."""

    network: Compact
    multiple: int
    shortcuts: Shortcuts

    def packed(self, which: str = "") -> str:
        """What it is called with layers packed."""
        return f"packed{which}{_spread(self.shortcuts)}"


@dataclass(frozen=True)
class _Planner:
    """The candidates, and what was found about them so far."""

    make: Callable[..., Compact]
    ticket: Ticket
    layers: LayerBench
    networks: NetworkBench
    say: Say
    made: dict[str, Compact] = field(default_factory=dict)
    layer_times: dict[str, LayerTime] = field(default_factory=dict)
    styles: dict[str, Style] = field(default_factory=dict)
    network_times: list[NetworkTime] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def decide(self, multiples: Sequence[int], shortcuts: Shortcuts) -> tuple[str, tuple[NetworkTime, ...]]:
        """The name of the network to take, and what was timed once more."""
        self.made["dense"] = self.make("dense", 1, shortcuts)
        base = self._cut(multiples, shortcuts)
        forms = () if base is None else self._forms(base, None)
        if len(self.made) == 1 and not forms:
            return "dense", ()
        self.networks.add("dense", self.made["dense"])  # early: a network that cannot be built is told at once
        if base is not None and forms:
            self._time_layers(base, forms)
        chosen = {path: time.ratio for path, time in self.layer_times.items() if time.packed}
        if base is not None and chosen:
            self._try(base.packed(), "packed", base.multiple, base.shortcuts, self._styled(chosen))
        self._time([name for name in self.made if name != "dense"])
        large = [path for path, ratio in chosen.items() if ratio >= LARGE]
        if base is not None and 0 < len(large) < len(chosen) and not self._won(base.packed()):
            name = base.packed(" where it gains most")
            if self._try(name, "packed", base.multiple, base.shortcuts, self._styled(large)) is not None:
                self._time([name])
        return self._confirmed()

    def _cut(self, multiples: Sequence[int], shortcuts: Shortcuts) -> _Base | None:
        """Make the networks with channels cut that differ from each other; the first is the one to pack."""
        base = None
        ways = [(multiple, shortcuts) for multiple in dict.fromkeys(multiples)]
        for multiple, how in (*ways, *([(multiples[0], _SPREAD)] if shortcuts == "union" else [])):
            name = "channels" + f", multiples of {multiple}" * (multiple > 1) + _spread(how)
            before = [known.plan.shape for known in self.made.values()]
            found = self._try(name, "channels", multiple, how)
            if found is not None:
                base = base or _Base(found, multiple, how)
                if found.plan.shape in before:
                    del self.made[name]
        return base

    def _try(
        self, name: str, format: Format, multiple: int, shortcuts: Shortcuts, layers: Layers | None = None
    ) -> Compact | None:
        """Make a candidate, or leave it out."""
        try:
            found = self.made[name] = self.make(format, multiple, shortcuts, layers)
        except SurgeryError as problem:
            self._drop(name, problem)
            return None
        return found

    def _drop(self, name: str, problem: SurgeryError | ExportError | BuildError | EngineError | str) -> None:
        why = problem if isinstance(problem, str) else problem.given
        self.dropped[name] = why.splitlines()[0]
        self.say(f"left out: {name}: {self.dropped[name]}")

    def _forms(self, base: _Base, only: Layers | None) -> tuple[LayerForm, ...]:
        network = base.network
        try:
            return layer_forms(network.module, self.ticket.masks, network.plan.cuts, network.example_inputs, only)
        except SurgeryError as problem:
            self._drop(base.packed(), problem)
            return ()

    def _time_layers(self, base: _Base, forms: tuple[LayerForm, ...]) -> None:
        """Time every layer of blocks in each style, and again where the look-ups change because others stay dense."""
        self._clock(forms)
        others = {form.path: form.other_style for form in forms if form.other_style is not None}
        if others:
            rivals = self._forms(base, {form.path: others.get(form.path, form.style) for form in forms})
            self._clock([form for form in rivals if form.path in others], rivals=True)
        for _ in range(_ROUNDS - 1):
            kept = self._styled([path for path, time in self.layer_times.items() if time.packed])
            if kept in ({}, {form.path: form.style for form in forms}):
                return
            forms = self._forms(base, kept)
            self._clock(forms)

    def _clock(self, forms: Sequence[LayerForm], *, rivals: bool = False) -> None:
        """Time layers; ``rivals``: in another style than before, which is taken where it is faster."""
        times = self.layer_times
        for form, ratio in zip(forms, self.layers.ratios(forms), strict=True):
            known = times.get(form.path) if rivals else None
            if isinstance(ratio, str):
                if not rivals:
                    times.pop(form.path, None)
                self._drop(f"layer {form.path} packed" + f" as {form.style.form} blocks" * rivals, ratio)
                continue
            self.say(f"{form.path}: {form}, {ratio:.2f}x of dense")
            if known is None or ratio > known.ratio * (1 + MARGIN):
                times[form.path] = LayerTime(form.path, str(form), form.share, ratio, ratio >= 1 + MARGIN)
                self.styles[form.path] = form.style

    def _styled(self, layers: Collection[str]) -> dict[str, Style]:
        return {path: self.styles[path] for path in layers}

    def _time(self, names: Sequence[str]) -> None:
        """Build what is not built, leave out what does not build, and time the rest beside dense."""
        for name in names:
            try:
                self.networks.add(name, self.made[name])
            except (ExportError, BuildError) as problem:
                del self.made[name]
                self._drop(name, problem)
        names = [name for name in names if name in self.made]
        self.network_times.extend(self._timed(names))

    def _timed(self, names: Sequence[str]) -> tuple[NetworkTime, ...]:
        """Times of networks; where they fail together each is tried alone, and left out if dense runs without it."""
        if not names:
            return ()
        try:
            return self.networks.times(names)
        except EngineError as problem:
            if len(names) > 1:
                return tuple(time for name in names for time in self._timed([name]))
            self.networks.times([])
            self._drop(names[0], problem)
            return ()

    def _won(self, name: str) -> bool:
        return any(time.wins for time in self.network_times if time.name == name)

    def _confirmed(self) -> tuple[str, tuple[NetworkTime, ...]]:
        """The fastest network that wins each time, and the further times of those that were asked for some."""
        again: list[NetworkTime] = []
        for first in sorted(self.network_times, key=lambda time: -time.ratio):
            won = first.wins
            for _ in range(1 if first.ratio >= CLEAR else CONFIRMATIONS):
                if won:
                    again += (times := self._timed([first.name]))
                    won = any(time.wins for time in times)
            if won:
                return first.name, tuple(again)
        return "dense", tuple(again)


_SPREAD: Shortcuts = "spread"


def _spread(shortcuts: Shortcuts) -> str:
    return ", spread" * (shortcuts == "spread")


def _checked(batch: int | Sequence[int], target: Target) -> tuple[int, ...]:
    batches = checked_batches([batch] if isinstance(batch, int) else batch)
    least, most = target.batch.min, target.batch.max
    for each in batches:
        if not least <= each <= most:
            raise ConfigError(
                f"batch {each}, which target {target.name!r} does not take",
                expected=f"batches from {least} to {most}",
                fix="choose another batch, or a target file with a wider range",
            )
    return batches
