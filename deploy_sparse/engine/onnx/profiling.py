"""Times of a graph's nodes by ONNX Runtime's own profiler, and which ONNX nodes each of them runs.

The optimised graph is not the one that was given: convolutions take in what follows them and are named after a value
(``relu_1_nchwc``), reorders into and out of the NCHWc layout appear, and their numbers differ from session to session.
So the session writes its optimised graph down, and values that both graphs have tell what a node stands for.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from ...errors import EngineError
from ..layer_times import Floors, NodeTime, Role, by_name
from ..tensors import Feeds
from .owners import HEAVY, inlined, named
from .runtime import session_options

PROFILER = "ONNX Runtime's profiler"
TICK_MS = 0.001
_SUFFIX = "_kernel_time"
_NCHWC = "com.microsoft.nchwc"
_CONVERSIONS = frozenset({"ReorderInput", "ReorderOutput"})
_ADDED = frozenset({"Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"})  # conversions, where no node asked
_CONVOLUTIONS = frozenset({"Conv", "FusedConv"})
_HALF = "NCHWc, plain input"
_SIDES = ("input", "output")

Event = Mapping[str, Any]


def profile_graph(
    graph: bytes, feeds: Feeds, floors: Floors, threads: int = 1, folder: Path | None = None
) -> tuple[tuple[NodeTime, ...], int, float]:
    """Times of all nodes, how many runs they are of, and the ms of a whole run under the profiler.

    Args:
        graph: an ONNX file.
        feeds: one array for each input.
        threads, folder: as of :class:`~.runtime.OrtSession`.

    Raises:
        EngineError: ONNX Runtime cannot profile it.
    """
    before = onnx.load_model_from_string(graph)
    with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        options = session_options(threads, folder)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime's exceptions share no base class of their own
            raise _unwritten(problem) from problem
        runs = _run(session, feeds, floors, len(before.graph.node))
        try:
            events = json.loads(Path(session.end_profiling()).read_bytes())
            after = onnx.load(str(optimised), load_external_data=False)
        except (OSError, ValueError, DecodeError) as problem:
            raise _unwritten(problem) from problem
    return pieces_of(events, runs, before, after)


def _unwritten(problem: Exception) -> EngineError:
    first = str(problem).strip().partition("\n")[0] or type(problem).__name__
    return EngineError(
        f"ONNX Runtime cannot profile the graph: {first}",
        expected="a folder for temporary files with room for the graph and its profile",
        fix="free some room there, or set TMPDIR to another folder",
    )


def pieces_of(
    events: Sequence[Event], runs: int, before: onnx.ModelProto, after: onnx.ModelProto
) -> tuple[tuple[NodeTime, ...], int, float]:
    """The nodes in a profile's events, over its last ``runs`` runs; see :func:`profile_graph`.

    Args:
        before: the graph that was given.
        after: the one that ONNX Runtime made of it.
    """
    found = split_runs(events)[-runs:]
    times = by_name([{name: ms for name, (ms, _) in nodes.items()} for nodes, _ in found])
    last = {name: event for nodes, _ in found for name, (_, event) in nodes.items()}
    origins = _Origins(before, after)
    pieces = tuple(_piece(name, ms, last[name], origins) for name, ms in times.items())
    return pieces, len(found), float(np.median([whole for _, whole in found]))


def split_runs(events: Sequence[Event]) -> list[tuple[dict[str, tuple[float, Event]], float]]:
    """For each run: name to ms and an event of every node, and the ms of the run.

    Nodes in the body of a loop or a branch count for that alone, as its time has theirs in it.
    """
    runs: list[tuple[dict[str, tuple[float, Event]], float]] = []
    waiting: list[Event] = []
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_SUFFIX):
            waiting.append(event)
        elif event.get("name") == "model_run":
            runs.append((_added(waiting), event["dur"] * TICK_MS))
            waiting = []
    return runs


def _added(events: Sequence[Event]) -> dict[str, tuple[float, Event]]:
    found: dict[str, tuple[float, Event]] = {}
    end = -math.inf
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] + event["dur"] <= end and event["ts"] < end:
            continue  # inside the one before
        end = event["ts"] + event["dur"]
        name = str(event["name"]).removesuffix(_SUFFIX)
        found[name] = (found[name][0] if name in found else 0.0) + event["dur"] * TICK_MS, event
    return found


def _run(session: onnxruntime.InferenceSession, feeds: Feeds, floors: Floors, nodes: int) -> int:
    """Warm up, then run as often as the floors ask for; how often that was. The profiler watches all of it."""
    given, warm, start = dict(feeds), 0, time.perf_counter()
    while warm < 5 or (warm < floors.most(nodes) and (time.perf_counter() - start) * 1e3 < floors.warmup_ms):
        floors.poll()
        session.run(None, given)
        warm += 1
    runs = floors.runs((time.perf_counter() - start) * 1e3 / warm, nodes)
    for _ in range(runs):
        floors.poll()
        session.run(None, given)
    return runs


def _piece(name: str, ms: float, event: Event, origins: _Origins) -> NodeTime:
    kind = str(event["args"].get("op_name", "?"))
    node = origins.after.get(name)
    layout = None
    if kind in _CONVOLUTIONS and node is not None:
        layout = origins.layout(node)
    nodes, role = origins.of(node, kind)
    return NodeTime(name, kind, nodes, ms, role, layout, _macs(event))


def _macs(event: Event) -> int | None:
    """Of a convolution, from the shapes that it ran on: outputs per image place, times the weights as they are."""
    told = event["args"]
    if told.get("op_name") not in _CONVOLUTIONS:
        return None
    inputs, outputs = ([next(iter(x.values())) for x in told.get(f"{side}_type_shape", ())] for side in _SIDES)
    if len(inputs) < 2 or not outputs:
        return None
    rows, _, *places = outputs[0]  # [batch, channels, *space]
    return int(rows * math.prod(places) * math.prod(inputs[1]))


class _Origins:
    """Nodes of the graph that was given behind those of the optimised one."""

    def __init__(self, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
        nodes = named(inlined(before).graph)
        self.kinds = {name: node.op_type for name, node in nodes}
        self.writer = {value: name for name, node in nodes for value in node.output if value}
        self.reads = {name: [value for value in node.input if value in self.writer] for name, node in nodes}
        self.after = {node.name: node for node in after.graph.node}
        self._writes = {value: node for node in after.graph.node for value in node.output if value}
        self._reader: dict[str, onnx.NodeProto] = {}
        for node in after.graph.node:
            for value in node.input:
                self._reader.setdefault(value, node)

    def of(self, node: onnx.NodeProto | None, kind: str) -> tuple[tuple[str, ...], Role]:
        """Names of the nodes that it stands for, and whether as work or as a conversion."""
        if node is None:
            return (), "work"
        if kind in _CONVERSIONS:
            return self._served(node, kind == "ReorderInput"), "conversion"
        found = self._same(node)
        if not found and kind in _ADDED:
            return self._served(node, True), "conversion"
        found = found or self._further(node)
        heavy = [name for name in found if self.kinds[name] in HEAVY]
        if kind.removeprefix("Fused") in HEAVY and not heavy:
            behind = [other for name in found if (other := self._behind(name)) is not None]
            return tuple(dict.fromkeys([*behind, *found])), "work"
        return tuple(dict.fromkeys([*heavy, *found])), "work"

    def layout(self, node: onnx.NodeProto) -> str:
        """Of a convolution: NCHWc with an input that is not in it, as one with few channels, is a layout of its own."""
        if node.domain != _NCHWC:
            return "plain"
        writer = self._writes.get(node.input[0])
        return (
            "NCHWc" if writer is not None and writer.domain == _NCHWC and writer.op_type != "ReorderOutput" else _HALF
        )

    def _same(self, node: onnx.NodeProto) -> list[str]:
        """By its own name, the value that it is named after, and the values that it writes."""
        names = [node.name, node.name.split("/")[0]]
        values = [node.name.removesuffix("_nchwc"), *node.output]
        found = [name for name in names if name in self.kinds] + [self.writer[v] for v in values if v in self.writer]
        return list(dict.fromkeys(found))

    def _further(self, node: onnx.NodeProto) -> list[str]:
        """By the first value further on that both graphs have, where only conversions lie between."""
        reader = self._reader.get(node.output[0]) if node.output else None
        while reader is not None and (reader.op_type in _CONVERSIONS or reader.op_type in _ADDED):
            if same := [self.writer[value] for value in reader.output if value in self.writer]:
                return same
            reader = self._reader.get(reader.output[0])
        return []

    def _behind(self, name: str) -> str | None:
        """The nearest convolution or product that a node which was fused into it reads."""
        seen, waiting = {name}, [name]
        while waiting:
            current = waiting.pop(0)
            if self.kinds[current] in HEAVY:
                return current
            for value in self.reads[current]:
                if (writer := self.writer[value]) not in seen:
                    seen.add(writer)
                    waiting.append(writer)
        return None

    def _served(self, node: onnx.NodeProto, forwards: bool) -> tuple[str, ...]:
        """What a conversion is made for: the node that reads its output, or else the one that writes its input."""
        seen: set[str] = set()
        current: onnx.NodeProto | None = node
        while current is not None and current.name not in seen:
            seen.add(current.name)
            values = current.output if forwards else current.input
            table = self._reader if forwards else self._writes
            current = next((table[value] for value in values if value in table), None)
            if current is not None and current.op_type not in _CONVERSIONS:
                nodes, role = self.of(current, current.op_type)
                if nodes or role == "conversion":
                    return nodes
        return self._served(node, False) if forwards else ()
