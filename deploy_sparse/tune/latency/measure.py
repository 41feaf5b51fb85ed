"""From a network to its latency table: layers, staircase, surfaces, whole networks; resumed where it was stopped."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...artifact import environment
from ...engine.build import require_runtime
from ...engine.target import Target, load_target
from ...errors import ConfigError
from ...measure.profile import Profile
from .bench import ROUNDS, Bench, TargetBench, clock_of, pace_of
from .cuts import context_of, judged, time_networks, timed_cuts, undisturbed_ms
from .multiple import Staircase, counts_of, multiple_of
from .sampling import Sampler
from .shapes import LayerShape, shapes_of
from .store import PointStore, setting_of
from .surface import Point, Surface
from .table import LatencyTable

SECONDS = 420.0  # of refining; what a table cannot do without is measured in any case
NETWORK_S = 2.0
AT_ONCE = 64  # points between two looks at the clock
PASSES = 4  # over the counts that show a staircase
FLOOR = 5e-4  # share of the network's time below which a difference does not matter
WORTH = 0.1  # share of the layers' time from which on the staircase of a kind of layer is read

Cuts = Callable[[int], Mapping[str, nn.Module]]


@dataclass(frozen=True)
class Measured:
    """A table, and the records of the whole networks behind it."""

    table: LatencyTable
    networks: Profile


def measure_table(
    network: nn.Module,
    example_inputs: Any,
    target: str | Path | Target = "cpu",
    *,
    batch: int = 1,
    seconds: float = SECONDS,
    network_s: float = NETWORK_S,
    rounds: int = ROUNDS,
    cuts: Cuts | None = None,
    cache: Path | None = None,
    poll: Callable[[], None] = lambda: None,
    say: Callable[[str], object] = lambda text: None,
) -> LatencyTable:
    """Latency of a network's layers over their channel counts, on a target that runs here.

    Args:
        network: any module; it is left as it is.
        example_inputs: a tensor or the tuple of positional inputs, batch first.
        target: a shipped name, the path of a TOML file, or a ``Target``.
        batch: samples of a call.
        seconds: how long counts are refined; the ends of every layer's range are measured besides.
        network_s: timed seconds for the dense network and each cut one.
        rounds: calls of each layer.
        cuts: given the multiple, networks with the same layers and fewer channels, by name; they calibrate how much a
            layer counts amid the network, and with two or more the error of predictions is known.
        cache: folder where each time is kept as soon as it is known; see
            :func:`~deploy_sparse.tune.layer_bench.layer_times_folder`.
        poll: called between calls; what it raises ends the measurement, and the cache has what was measured.
        say: takes lines on what is being done.

    Raises:
        ConfigError: an unknown target, a batch it does not take, a value out of range, a network without layers.
        SurgeryError: the network does not run on the inputs.
        EngineError: the target's engines do not run on this machine.
        ExportError, BuildError, MissingDependencyError: the network cannot be built for the target.
    """
    return measure(
        network, example_inputs, target, batch=batch, seconds=seconds, network_s=network_s, rounds=rounds, cuts=cuts,
        cache=cache, poll=poll, say=say,
    ).table  # fmt: skip


def measure(
    network: nn.Module,
    example_inputs: Any,
    target: str | Path | Target,
    *,
    batch: int,
    seconds: float,
    network_s: float,
    rounds: int,
    cuts: Cuts | None,
    cache: Path | None,
    poll: Callable[[], None],
    say: Callable[[str], object],
) -> Measured:
    """What :func:`measure_table` does, with the records of the whole networks beside the table."""
    wanted = load_target(target)
    _check(wanted, batch, seconds, rounds)
    require_runtime(wanted)
    layers = shapes_of(network, example_inputs)
    pace = pace_of(layers.values())
    store = PointStore(cache, setting_of(wanted, batch, rounds, pace))
    known = {shape: ms for shape in pace if (ms := store.get(shape)) is not None}
    bench = TargetBench(wanted, batch, pace, rounds=rounds, poll=poll, known=known)
    say(f"{len(layers)} layers of {len(set(layers.values()))} shapes")
    found = sample(layers, bench, store, seconds=seconds, say=say)
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        narrower = dict(cuts(found.multiple)) if cuts is not None else {}
        widths = {name: _widths(name, module, example_inputs, layers) for name, module in narrower.items()}
        say(f"whole networks: dense{''.join(f', {name}' for name in narrower)}")
        networks = time_networks(
            {"dense": network, **narrower}, example_inputs, wanted, batch=batch, seconds=network_s,
            scratch=Path(scratch), poll=poll,
        )  # fmt: skip
    by = clock_of(wanted)
    dense_ms = undisturbed_ms(networks.records[0], by)
    total = sum(found.surfaces[shape].ms(shape.c_in, shape.c_out) for shape in layers.values())
    timed = timed_cuts(networks, by, {name: _sum(found, layers, widths[name]) / total for name in narrower})
    table = LatencyTable(
        target={
            "name": wanted.name,
            "digest": wanted.digest,
            "runtime": wanted.runtime,
            "threads": wanted.threads,
            "width_multiple": wanted.width_multiple,
        },
        batch=batch,
        layers=layers,
        surfaces=found.surfaces,
        clock=by,
        dense_ms=dense_ms,
        context=context_of(timed, total, dense_ms),
        staircases=found.staircases,
        multiple=found.multiple,
        cuts=judged(timed, total, dense_ms),
        environment=environment(),
    )
    return Measured(table, networks)


@dataclass(frozen=True)
class Sampled:
    """What timing the layers alone gives."""

    staircases: tuple[Staircase, ...]
    multiple: int
    surfaces: Mapping[LayerShape, Surface]


def sample(
    layers: Mapping[str, LayerShape],
    bench: Bench,
    store: PointStore,
    *,
    seconds: float,
    say: Callable[[str], object] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
) -> Sampled:
    """Staircases and surfaces of the distinct layers; nothing that the store has is timed again."""
    uses = Counter(layers.values())
    dense = _times(bench, store, sorted(uses, key=lambda shape: -shape.macs))  # the pace first
    total = sum(dense[shape] * count for shape, count in uses.items())
    say("the staircase")
    staircases, weights = [], []
    for shape in _representatives(uses, dense):
        passes = tuple(_sweep(bench, store, shape, number) for number in range(PASSES))
        staircases.append(Staircase(shape, passes))
        alike = [other for other in uses if (other.kind, other.kernel) == (shape.kind, shape.kernel)]
        weights.append(_share(alike, uses, dense))
    multiple = multiple_of(staircases, weights)
    say(f"widths in multiples of {multiple}")
    samplers = {shape: Sampler(shape, multiple, floor_ms=FLOOR * total / count) for shape, count in uses.items()}
    points: dict[LayerShape, dict[Point, float]] = {shape: {} for shape in uses}
    _fill(bench, store, points, {shape: sampler.base() for shape, sampler in samplers.items()})
    end = clock() + seconds
    while wanted := _dearest_first(samplers, points, {s: dense[s] * n for s, n in uses.items()}, store):
        missing = sum(store.get(shape.with_counts(*p)) is None for shape, ps in wanted.items() for p in ps)
        if missing and clock() >= end:
            say(f"time is up with {missing} points left to refine")
            break
        if missing:
            say(f"{missing} points")
        _fill(bench, store, points, wanted)
    surfaces = {shape: sampler.surface(points[shape]) for shape, sampler in samplers.items()}
    return Sampled(tuple(staircases), multiple, surfaces)


def _dearest_first(
    samplers: Mapping[LayerShape, Sampler],
    points: Mapping[LayerShape, Mapping[Point, float]],
    weights: Mapping[LayerShape, float],
    store: PointStore,
) -> dict[LayerShape, list[Point]]:
    """What layers want next, those that take most of the time first, as much as is timed between two looks at the
    clock; what the store has comes for nothing."""
    wanted: dict[LayerShape, list[Point]] = {}
    room = AT_ONCE
    for shape in sorted(samplers, key=lambda shape: -weights[shape]):
        mine = samplers[shape].wanted(points[shape])
        missing = sum(store.get(shape.with_counts(*point)) is None for point in mine)
        if mine and (missing <= room or room == AT_ONCE):
            wanted[shape] = mine
            room -= missing
    return wanted


def _fill(
    bench: Bench,
    store: PointStore,
    points: Mapping[LayerShape, dict[Point, float]],
    wanted: Mapping[LayerShape, Sequence[Point]],
) -> None:
    narrowed = {(shape, point): shape.with_counts(*point) for shape, found in wanted.items() for point in found}
    found = _times(bench, store, list(narrowed.values()))
    for (shape, point), layer in narrowed.items():
        points[shape][point] = found[layer]


def _times(bench: Bench, store: PointStore, shapes: Sequence[LayerShape]) -> dict[LayerShape, float]:
    """From the store, or timed and kept at once, chunk by chunk."""
    missing = [shape for shape in dict.fromkeys(shapes) if store.get(shape) is None]
    for chunk in bench.chunks(missing):
        for shape, time_ms in bench.times(chunk).items():
            store.put(shape, time_ms)
    return {shape: ms for shape in shapes if (ms := store.get(shape)) is not None}


def _sweep(bench: Bench, store: PointStore, shape: LayerShape, number: int) -> dict[int, float]:
    """Times at the counts that show the staircase, in a pass of its own."""
    own = store.apart(f"pass {number}")
    found = _times(bench, own, [shape.with_counts(count, count) for count in counts_of(shape)])
    return {layer.c_in: ms for layer, ms in found.items()}


def _representatives(uses: Mapping[LayerShape, int], dense: Mapping[LayerShape, float]) -> list[LayerShape]:
    """Of each kind of layer that takes a tenth of the time or more, the shape with the highest counts of a staircase,
    and among those the one that works most there: noise matters least."""
    kinds: dict[tuple[str, tuple[int, int]], list[LayerShape]] = {}
    for shape in uses:
        if counts_of(shape):
            kinds.setdefault((shape.kind, shape.kernel), []).append(shape)
    total = sum(dense[shape] * count for shape, count in uses.items())
    worth = [found for found in kinds.values() if _share(found, uses, dense) >= WORTH * total]
    return [max(found, key=_contrast) for found in worth]


def _contrast(shape: LayerShape) -> tuple[int, int]:
    most = max(counts_of(shape))
    return most, shape.with_counts(most, most).macs


def _share(found: Sequence[LayerShape], uses: Mapping[LayerShape, int], dense: Mapping[LayerShape, float]) -> float:
    return sum(dense[shape] * uses[shape] for shape in found)


def _widths(
    name: str, module: nn.Module, example_inputs: Any, layers: Mapping[str, LayerShape]
) -> dict[str, tuple[int, int]]:
    """Counts of a cut network's layers; they are the dense network's own."""
    found = shapes_of(getattr(module, "module", module), example_inputs)
    strange = [path for path in found if path not in layers]
    if strange or any(path not in found for path in layers):
        what = f"has {strange[0]!r}, which the dense one has not" if strange else "lacks layers of the dense one"
        raise ConfigError(
            f"the cut network {name!r} {what}",
            expected="networks that differ from the dense one in their channel counts only",
            fix='cut channels: deploy_sparse.compact(ticket, format="channels")',
        )
    return {path: (shape.c_in, shape.c_out) for path, shape in found.items()}


def _sum(found: Sampled, layers: Mapping[str, LayerShape], widths: Mapping[str, tuple[int, int]]) -> float:
    return sum(found.surfaces[shape].ms(*widths[path]) for path, shape in layers.items())


def _check(target: Target, batch: int, seconds: float, rounds: int) -> None:
    if isinstance(batch, bool) or not isinstance(batch, int) or not target.batch.min <= batch <= target.batch.max:
        raise ConfigError(
            f"batch {batch!r} for target {target.name!r}",
            expected=f"a whole number from {target.batch.min} to {target.batch.max}, which its engines take",
            fix="choose one of those, or give the target another [batch]",
        )
    if not seconds >= 0:
        raise ConfigError(f"{seconds} seconds", expected="seconds of refining, 0 or more", fix="leave it out")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"{rounds!r} rounds", expected="a whole number from 1 on", fix="leave it out")
