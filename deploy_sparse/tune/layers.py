"""Where the time of two engines of one network goes, layer by layer, and why a layer did not gain what it could."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.entry import Engine, open_entry
from ..engine.layer_times import EngineTimes, NodeTime, graph_bytes
from ..engine.runner import load_engine
from ..engine.tensors import Feeds
from ..errors import ConfigError, EngineError
from ..measure.layer_reasons import Machine, explained, machine_of
from ..measure.layers import ROWS, LayerPair, NetworkLayers, Part, Piece, Work, layer_table, match_layers, median_of
from ..measure.table import Table, significant

ROUNDS = 5
OVER = 0.05  # of a run, that its layers may take longer than it
LEFT = 0.2  # of a run, from which it is worth telling that no layer took it


@dataclass(frozen=True)
class LayerReport:
    """Two engines of one network, layer by layer.

    Attributes:
        dense, sparse: as timed.
        pairs: their layers with the reasons, the longest first.
        machine: what the reasons rest on.
        batch: samples of a run.
    """

    dense: NetworkLayers
    sparse: NetworkLayers
    pairs: tuple[LayerPair, ...]
    machine: Machine
    batch: int

    def table(self, rows: int = ROWS) -> Table:
        """The layers as a table; its note says how they were timed and what the profiler cost."""
        title = f"Layers at batch {self.batch}"
        return layer_table(self.pairs, rows=rows, title=title, note=" · ".join(self.notes()))

    def notes(self) -> tuple[str, ...]:
        """How the times came about."""
        return (*(_note(network) for network in (self.dense, self.sparse)), *self.machine.lines())

    def as_json(self) -> dict[str, Any]:
        """JSON form: every layer with its parts and reasons, and the notes."""
        return {
            "batch": self.batch,
            "engines": {
                key: {
                    "name": network.name,
                    "layers_ms": network.total_ms,
                    "run_ms": network.plain_ms,
                    "profiled_run_ms": network.profiled_ms,
                    "runs": network.runs,
                    "profiler": network.profiler,
                }
                for key, network in (("dense", self.dense), ("sparse", self.sparse))
            },
            "layers": [_pair_json(pair) for pair in self.pairs],
            "notes": list(self.notes()),
        }


def profile_layers(
    dense: Engine | str | Path,
    sparse: Engine | str | Path,
    batch: int | None = None,
    *,
    names: tuple[str, str] = ("dense", "sparse"),
    seconds: float = 0.5,
    rounds: int = ROUNDS,
    poll: Callable[[], None] = lambda: None,
) -> LayerReport:
    """Profile two engines in turns on the same inputs, and match their layers.

    Args:
        dense, sparse: engines of one target that run here, or their folders.
        batch: of both; the smallest that the dense one takes by default.
        names: what they are called.
        seconds: under the profiler, for each engine and round.
        rounds: turns; of every time the median counts.
        poll: called between runs; what it raises ends the profile.

    Raises:
        ConfigError: engines of different targets, or no round.
        EngineError: an engine that does not run here, a batch it does not take, or a runtime without layer times.
    """
    engines = [engine if isinstance(engine, Engine) else open_entry(engine) for engine in (dense, sparse)]
    if engines[0].target.digest != engines[1].target.digest:
        raise ConfigError(
            f"the engines were built for different targets: {' and '.join(e.target.name for e in engines)}",
            expected="two engines of one target, whose layers run alike",
            fix="build one of them again for the other's target",
        )
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}", expected="at least 1", fix="leave it out")
    for engine in engines:
        if (why := engine.runnable()) is not None:
            raise EngineError(
                f"{engine.folder} cannot be profiled: {why}",
                expected="an engine that runs here",
                fix="run the command where it does",
            )
    with load_engine(engines[0]) as first, load_engine(engines[1]) as second:
        feeds = first.sample_inputs(batch)
        found: list[list[EngineTimes]] = [[], []]
        for _ in range(rounds):
            for runner, times in zip((first, second), found, strict=True):
                times.append(runner.layer_times(feeds, duration_s=seconds, poll=poll))
    rows = _rows(engines[0], feeds)
    networks = [_network(name, engine, times, rows) for name, engine, times in zip(names, engines, found, strict=True)]
    pairs = match_layers(networks[0], networks[1])
    machine = _machine(engines[0], networks, pairs)
    return LayerReport(networks[0], networks[1], explained(pairs, machine), machine, rows)


def _rows(engine: Engine, feeds: Feeds) -> int:
    """Samples in a run."""
    return next((feeds[spec.name].shape[0] for spec in engine.inputs if spec.batched), 1)


def _network(name: str, engine: Engine, rounds: Sequence[EngineTimes], rows: int) -> NetworkLayers:
    from ..engine.onnx.owners import Owned, owners_of

    owners = owners_of(graph_bytes(engine), {axis: extents["opt"] for axis, extents in engine.axes.items()})
    by_name = {owned.node.name: owned for owned in owners}
    work: dict[str, Work] = {}
    for owned in owners:
        if owned.part in ("product", "other"):
            work[owned.layer] = work.get(owned.layer, Work()) + _work(owned, rows)

    def piece(node: NodeTime) -> Piece:
        found: list[Owned] = [by_name[each] for each in node.nodes if each in by_name]
        products = [owned for owned in found if owned.part == "product"]
        layers = tuple(dict.fromkeys(owned.layer for owned in products or found[:1])) or (_unowned(node),)
        part: Part = "conversion" if node.role == "conversion" else found[0].part if found else "other"
        return Piece(layers, part, node.kind, node.ms, node.layout, node.macs)

    return median_of(
        [
            NetworkLayers(
                name=name,
                pieces=tuple(piece(node) for node in times.pieces),
                work=work,
                plain_ms=times.plain_ms,
                profiled_ms=times.profiled_ms,
                runs=times.runs,
                tick_ms=times.tick_ms,
                profiler=times.profiler,
            )
            for times in rounds
        ]
    )


def _unowned(node: NodeTime) -> str:
    """A name for what no node of the graph stands for, without the numbers that runtimes give."""
    return f"{node.kind} of the runtime" if node.kind != "?" else node.name


def _work(owned: Any, rows: int) -> Work:
    macs, moved = (owned.node.macs or 0) * rows, owned.activations * rows + owned.weights
    if owned.part != "product":
        return Work(bytes=moved)
    return Work((owned.shape,), () if owned.counts is None else (owned.counts,), macs, moved)


def _machine(engine: Engine, networks: Sequence[NetworkLayers], pairs: Sequence[LayerPair]) -> Machine:
    multiple = engine.target.width_multiple
    if engine.target.runtime != "onnxruntime":
        return machine_of(networks, pairs, multiple)
    from ..engine.onnx.memory import move_times

    wanted = {_rounded(pair.sparse.work.bytes) for pair in pairs if pair.sparse and pair.sparse.work.macs}
    measured = move_times(sorted(wanted), engine.target.threads)

    def move_ms(size: int) -> float:
        return measured[_rounded(size)] * size / _rounded(size) if size else 0.0

    rates = [size / ms / 1e6 for size, ms in measured.items() if ms]
    text = "none of it was needed"
    if rates:
        text = (
            f"a ReLU on as many bytes as the layer, {significant(min(rates), 3)} to {significant(max(rates), 3)} GB/s"
        )
    return machine_of(networks, pairs, multiple, move_ms, text)


def _rounded(size: int) -> int:
    """The next power of the square root of 2, so that a few sizes stand for all."""
    return math.ceil(2 ** (math.ceil(2 * math.log2(max(size, 64))) / 2))


def _note(network: NetworkLayers) -> str:
    """How the layers' sum stands to a whole run; where it is longer, the profiler's own time is in the layers."""
    text = (
        f"{network.name}: layers add up to {_ms(network.total_ms)} ms, {network.runs} runs under {network.profiler}; "
        f"a whole run takes {_ms(network.plain_ms)} ms without it and {_ms(network.profiled_ms)} with it"
    )
    over = network.total_ms - network.plain_ms
    if -over > LEFT * network.plain_ms:
        return f"{text}; {_ms(-over)} ms of it are in no layer, as between two, or while something else ran"
    if over <= OVER * network.plain_ms or not network.pieces:
        return text
    return f"{text}; so up to {_ms(over / len(network.pieces))} ms of each of {len(network.pieces)} pieces are its own"


def _pair_json(pair: LayerPair) -> dict[str, Any]:
    sides = {key: side for key, side in (("dense", pair.dense), ("sparse", pair.sparse)) if side is not None}
    return {
        "layer": pair.name,
        **{
            key: {
                "ms": side.ms,
                "share": side.share,
                "kind": side.kind,
                "parts": dict(side.parts),
                "calls": dict(side.calls),
                "layouts": sorted(side.layouts),
                **{name: value for name, value in asdict(side.work).items()},
                "macs_done": side.done,
            }
            for key, side in sides.items()
        },
        "speed_up": pair.ratio,
        "by_macs": pair.predicted,
        "reasons": [asdict(reason) for reason in pair.reasons],
    }


def _ms(value: float) -> str:
    return significant(value, 3)
