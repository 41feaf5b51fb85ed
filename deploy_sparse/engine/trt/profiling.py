"""Times of an engine's layers by TensorRT's own profiler, ``IProfiler``, in an execution context of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from statistics import median
from typing import Any

from ...errors import EngineError
from ..cuda.runtime import Cuda
from ..inspection import LayerInfo, parse_inspector
from ..layer_times import MAX_RUNS, Floors, NodeTime, by_name
from ..tensors import Feeds
from .context import Context, Opened, Slot

PROFILER = "TensorRT's profiler"
TICK_MS = 0.0005  # CUDA's documentation of cudaEventElapsedTime
_COPY = re.compile(r"^Reformatting CopyNode for .*? (?:to|of) ")
_BETWEEN = re.compile(r" \+ | \|\| |\.\.\.|[\[\](){},]")


def profile_plan(
    trt: Any, cuda: Cuda, opened: Opened, feeds: Feeds, floors: Floors
) -> tuple[tuple[NodeTime, ...], int, float]:
    """Times of all layers, how many runs they are of, and the ms of a whole run under the profiler.

    Every run waits for its end, as the profiler needs it, and is launched layer by layer, never as a CUDA graph.

    Raises:
        EngineError: TensorRT, or CUDA, fails.
    """
    recorder = _recorder(trt)
    runs: list[dict[str, float]] = []
    whole: list[float] = []
    with cuda.active(), ExitStack() as made:
        stream = cuda.stream()
        made.callback(stream.close)
        context = Context(opened)
        context.watch(recorder)
        slot = Slot(cuda, opened, context, stream)
        made.callback(slot.close)
        made.callback(_quietly, stream.synchronize)
        slot.fill(feeds)

        def run() -> float:
            floors.poll()
            start = time.perf_counter()
            slot.enqueue()
            stream.synchronize()
            return (time.perf_counter() - start) * 1e3

        warm, start = 0, time.perf_counter()
        while warm < 5 or (warm < MAX_RUNS and (time.perf_counter() - start) * 1e3 < floors.warmup_ms):
            run()
            warm += 1
        layers = len(recorder.taken()) or 1
        for _ in range(floors.runs((time.perf_counter() - start) * 1e3 / warm, layers)):
            whole.append(run())
            runs.append(recorder.taken())
    if not any(runs):
        raise EngineError(
            "TensorRT's profiler reported no layer",
            expected="a time for every layer of the engine",
            fix="run it without the profiler: deploy-sparse profile",
        )
    told = {layer.name: layer for layer in parse_inspector(_inspected(trt, opened))}
    return tuple(_piece(name, ms, told.get(name)) for name, ms in by_name(runs).items()), len(runs), median(whole)


def with_nodes(pieces: Sequence[NodeTime], known: frozenset[str]) -> tuple[NodeTime, ...]:
    """The same times, with the ONNX nodes that the names of layers hold, where the inspector told none.

    TensorRT joins the names of what it fuses: ``conv1 + relu1``, ``{ForeignNode[first...last]}``, ``PWN(a, b)``; and
    names a copy after the layer that it is made for.

    Args:
        known: names of the graph's nodes.
    """
    found = []
    for piece in pieces:
        nodes = [name for name in piece.nodes if name in known]
        nodes = nodes or list(nodes_in(_COPY.sub("", piece.name), known))
        found.append(replace(piece, nodes=tuple(dict.fromkeys(nodes))))
    return tuple(found)


def nodes_in(name: str, known: frozenset[str]) -> Iterator[str]:
    """Names of ``known`` nodes in a layer's name, in its order."""
    if name in known:
        yield name
        return
    for part in _BETWEEN.split(name):
        if part.strip() in known:
            yield part.strip()


def _recorder(trt: Any) -> Any:
    class Recorder(trt.IProfiler):  # type: ignore[misc]  # of a library without types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # pybind11 wants it by its name
            self._times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self._times[layer_name] = self._times.get(layer_name, 0.0) + float(ms)

        def taken(self) -> dict[str, float]:
            times, self._times = self._times, {}
            return times

    return Recorder()


def _inspected(trt: Any, opened: Opened) -> str:
    return str(opened.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _piece(name: str, ms: float, told: LayerInfo | None) -> NodeTime:
    kind = "?" if told is None else told.kind
    copy = _COPY.match(name) is not None or kind == "Reformat"
    nodes = () if told is None else told.nodes
    return NodeTime(name, kind, nodes, ms, "conversion" if copy else "work")


def _quietly(call: Any) -> None:
    with suppress(EngineError):
        call()
