"""How long an engine spends in each of its layers, as the runtime's own profiler has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal, Protocol, cast

from ..errors import EngineError
from .entry import ONNX_FILE, Engine, verified_bytes
from .tensors import Feeds

if TYPE_CHECKING:
    from .runner import Session

Role = Literal["work", "conversion"]
MAX_EVENTS = 20_000  # of a profile, so that it fits into memory and ONNX Runtime keeps all of them
MIN_RUNS, MAX_RUNS = 20, 500


@dataclass(frozen=True)
class NodeTime:
    """What a runtime runs as one piece.

    Attributes:
        name: the runtime's.
        kind: ONNX Runtime's operator, or TensorRT's type of layer; ``"?"`` where it is not told.
        nodes: names of ONNX nodes in it, the one that costs most first; of a conversion the one it is made for. Empty
            where it has nothing to do with any.
        ms: of one run of the engine, the mean of the middle half of all runs.
        role: ``"conversion"``: the same numbers in another memory layout or number format, which no ONNX node asks for.
        layout: ``"NCHWc"``, ``"NCHWc, plain input"`` or ``"plain"`` for a convolution of ONNX Runtime, else None.
        macs: multiply-accumulates that are carried out at this batch, with channels that the runtime pads; None where
            the runtime does not tell.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    ms: float
    role: Role = "work"
    layout: str | None = None
    macs: int | None = None


@dataclass(frozen=True)
class EngineTimes:
    """A profile of an engine.

    Attributes:
        pieces: in the order of execution.
        runs: timed ones, after the warm-up.
        profiled_ms: of a whole run while the profiler watches; the runtime waits for nothing else in it.
        plain_ms: of a whole run without it, in the same process.
        tick_ms: what the profiler counts in.
        profiler: its name.
    """

    pieces: tuple[NodeTime, ...]
    runs: int
    profiled_ms: float
    plain_ms: float
    tick_ms: float
    profiler: str

    @property
    def total_ms(self) -> float:
        """The sum over all pieces."""
        return sum(piece.ms for piece in self.pieces)


@dataclass(frozen=True)
class Floors:
    """How long to profile.

    Attributes:
        warmup_ms: untimed, before; at least five runs.
        duration_s: timed; at least ``MIN_RUNS`` runs and at most ``MAX_RUNS``.
        poll: called between runs; what it raises ends the profile.
    """

    warmup_ms: float = 200.0
    duration_s: float = 1.0
    poll: Callable[[], None] = lambda: None

    def runs(self, once_ms: float, pieces: int) -> int:
        """How many timed runs, of one that takes ``once_ms`` and has ``pieces`` events."""
        return max(MIN_RUNS, min(int(self.duration_s * 1e3 / max(once_ms, 1e-3)), self.most(pieces)))

    def most(self, pieces: int) -> int:
        """How many runs with ``pieces`` events each are kept, of the warm-up and of the timed ones."""
        return max(5, min(MAX_RUNS, MAX_EVENTS // max(pieces, 1)))


class Profiling(Protocol):
    """A session of TensorRT: names of layers, times in ms by run, and the ms of whole runs."""

    def layer_times(self, feeds: Feeds, floors: Floors) -> tuple[tuple[NodeTime, ...], int, float]: ...


def layer_times(engine: Engine, session: Session, feeds: Feeds, floors: Floors) -> EngineTimes:
    """Profile an opened engine on checked feeds; see :meth:`deploy_sparse.engine.runner.Runner.layer_times`."""
    runtime = engine.target.runtime
    if engine.target.from_module:
        raise EngineError(
            f"{engine.folder} has no layer times, as its runtime is {runtime}",
            expected="an engine of ONNX Runtime, TensorRT or TensorRT-RTX, whose profilers name ONNX nodes",
            fix="build the network for one of these, for example --target cpu, and profile that",
        )
    before = _plain(session, feeds, floors)
    if runtime == "onnxruntime":
        from .onnx.profiling import PROFILER, TICK_MS, profile_graph

        folder = engine.folder if engine.weights else None
        pieces, runs, profiled = profile_graph(graph_bytes(engine), feeds, floors, engine.target.threads, folder)
        tick = TICK_MS
    else:
        from .trt.profiling import PROFILER, TICK_MS, with_nodes

        pieces, runs, profiled = cast(Profiling, session).layer_times(feeds, floors)
        pieces, tick = with_nodes(pieces, _node_names(graph_bytes(engine))), TICK_MS
    plain = median([*before, *_plain(session, feeds, floors)])
    return EngineTimes(pieces, runs, profiled, plain, tick, PROFILER)


def graph_bytes(engine: Engine) -> bytes:
    """The engine's ONNX graph, with the hash that the manifest lists.

    Raises:
        ArtifactError: it has another.
    """
    return verified_bytes(engine, engine.folder / ONNX_FILE)


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half: as robust as the median, and finer than what a clock of whole microseconds counts.

    Args:
        values: at least one.
    """
    ordered = sorted(values)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return sum(middle) / len(middle)


def by_name(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The middle mean of every name's time over runs; a name that a run lacks took no time in it.

    Args:
        runs: name to ms, one mapping for each run.
    """
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: middle_mean([run.get(name, 0.0) for run in runs]) for name in names}


def _plain(session: Session, feeds: Feeds, floors: Floors) -> list[float]:
    """Ms of runs without a profiler, half as long as with one."""
    run = session.prepare(feeds)
    end = time.perf_counter() + floors.warmup_ms / 2e3
    while time.perf_counter() < end:
        run()
    times: list[float] = []
    end = time.perf_counter() + floors.duration_s / 2
    while len(times) < MIN_RUNS // 2 or (time.perf_counter() < end and len(times) < MAX_RUNS):
        floors.poll()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _node_names(graph: bytes) -> frozenset[str]:
    import onnx

    return frozenset(node.name for node in onnx.load_model_from_string(graph).graph.node if node.name)
