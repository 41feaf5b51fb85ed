"""Narrower networks timed beside the dense one: they say how much a layer's time counts amid the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.build import build_engine
from ...engine.target import Target
from ...measure.profile import Profile, profile
from ...measure.record import LatencyRecord
from ...measure.timing import percentile
from .bench import QUARTILE, By
from .table import Cut

SPREAD = 0.03  # standard deviation of a network's time that is expected, as a share of it
REST = 0.05  # … and of the rest, as a share of the dense network
LEAST = 0.1  # of the context: networks slower than dense would turn it round


@dataclass(frozen=True)
class Timed:
    """A cut network's measured ratio to dense, with its interval, and its layers' sum over the dense network's."""

    name: str
    ratio: float
    low: float | None
    high: float | None
    layers: float


def time_networks(
    networks: Mapping[str, Any],
    example_inputs: Any,
    target: Target,
    *,
    batch: int,
    seconds: float,
    scratch: Path,
    poll: Callable[[], None],
) -> Profile:
    """All networks side by side on the target, the first of them ``"dense"``; ``seconds`` for each.

    Raises:
        ExportError, BuildError: one does not export or compile.
        EngineError: outputs that are not finite.
    """
    engines = {}
    for number, (name, network) in enumerate(networks.items()):
        poll()
        engines[name] = build_engine(network, target, example_inputs, scratch, name=f"network{number}")
    return profile(engines, "dense", batches=(batch,), duration_s=seconds, poll=poll)


def undisturbed_ms(record: LatencyRecord, by: By) -> float:
    """What a call takes: by CPU time the mean, by wall time the lower quartile."""
    if by == "cpu" and record.cpu_ms:
        return record.cpu_ms
    return percentile(sorted(sample for block in record.samples_ms for sample in block), QUARTILE)


def timed_cuts(made: Profile, by: By, layers: Mapping[str, float]) -> list[Timed]:
    """Every network but the dense one, which is the first record.

    Args:
        layers: by name, the sum over its layers alone over the dense network's.
    """
    dense = undisturbed_ms(made.records[0], by)
    found = []
    for record in made.records[1:]:
        ratio, low, high = undisturbed_ms(record, by) / dense, None, None
        pairs = next((c for c in made.comparisons if c.subject == record.subject), None)
        if by == "wall" and pairs is not None:  # the median of pairs, with an interval, cancels drift
            ratio = 1 / pairs.ratio
            low, high = (None if bound is None else 1 / bound for bound in (pairs.high, pairs.low))
        found.append(Timed(record.subject, ratio, low, high, layers[record.subject]))
    return found


def context_of(cuts: Sequence[Timed], layers_ms: float, dense_ms: float) -> float:
    """Time of layers amid the network over their time alone; 1 without cuts.

    A network loses ``dense · (1 - ratio)`` where its layers alone lose ``layers_ms · (1 - layers)``: least squares,
    each network in proportion to its own time, beside the expectation that nothing is left of a network without layers.

    Args:
        layers_ms: the dense network's layers alone.
        dense_ms: the dense network.
    """
    if not cuts:
        return 1.0
    whole = layers_ms / dense_ms
    weighed = [(whole * (1 - cut.layers), 1 - cut.ratio, SPREAD * cut.ratio) for cut in cuts]
    weighed.append((whole, 1.0, REST))
    squares = sum((alone / sigma) ** 2 for alone, _, sigma in weighed)
    return max(sum(alone * amid / sigma**2 for alone, amid, sigma in weighed) / squares, LEAST)


def judged(cuts: Sequence[Timed], layers_ms: float, dense_ms: float) -> tuple[Cut, ...]:
    """Each cut network with what the others predict for it."""
    found = []
    for cut in cuts:
        others = [other for other in cuts if other is not cut]
        predicted = None
        if others:
            lost = context_of(others, layers_ms, dense_ms) * layers_ms * (1 - cut.layers)
            predicted = 1 - lost / dense_ms
        found.append(Cut(cut.name, cut.ratio, cut.low, cut.high, cut.layers, predicted))
    return tuple(found)
