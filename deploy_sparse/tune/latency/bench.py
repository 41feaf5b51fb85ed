"""Single layers timed on a target as they run amid a network: weights out of the caches, the input just written."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from ...engine.build import build_engine
from ...engine.onnx.file import read_onnx
from ...engine.onnx.runtime import OrtSession
from ...engine.runner import load_engine
from ...engine.target import Target
from ...errors import EngineError
from ...measure.timing import HOST_CLOCK, Clock, percentile, time_call
from .graphs import layer_graph, without_reorders
from .shapes import LayerShape

ROUNDS = 15
QUARTILE = 25  # percent: what else runs on a machine only ever adds time
BESIDE = 64 << 20  # bytes of weights that run beside a layer; last-level caches of common CPUs hold less
AT_ONCE = 128 << 20  # bytes of weights and activations of the layers that are open together
MOST_AT_ONCE = 96

By = Literal["wall", "cpu"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class LayerCall:
    """A layer ready to be timed.

    Attributes:
        run: computes it once and returns when it is done.
        touch: writes its input again, as the layer before it would.
    """

    run: Callable[[], object]
    touch: Callable[[], object] = lambda: None


class Bench(Protocol):
    """What times layers."""

    def times(self, shapes: Sequence[LayerShape]) -> dict[LayerShape, float]:
        """Milliseconds of each."""

    def chunks(self, shapes: Sequence[LayerShape]) -> Iterator[list[LayerShape]]:
        """Layers that are timed together, and whose times are known together."""


@dataclass(frozen=True)
class TargetBench:
    """Times layers on a target, in turns.

    In every round the ``pace`` layers run too: they push a layer's weights out of the caches as the network does, but
    not the code; and times are scaled to theirs, so that a machine that slows down between chunks does not show.

    Attributes:
        target: where.
        batch: samples of a call.
        pace: layers of the network, see :func:`pace_of`.
        rounds: calls of each layer; their lower quartile is its time.
        poll: called before every round; what it raises ends the timing.
        clock: replaced in tests.
        known: times of the pace layers, in ms, to which all others are scaled; those missing are found first.
    """

    target: Target
    batch: int
    pace: tuple[LayerShape, ...]
    rounds: int = ROUNDS
    poll: Callable[[], None] = lambda: None
    clock: Clock = HOST_CLOCK
    known: dict[LayerShape, float] = field(default_factory=dict)

    def times(self, shapes: Sequence[LayerShape]) -> dict[LayerShape, float]:
        """Milliseconds of each.

        Raises:
            ExportError, BuildError, EngineError: the target does not take a layer.
        """
        found: dict[LayerShape, float] = {}
        for chunk in self.chunks(shapes):
            with contextlib.ExitStack() as stack:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-sparse-")))
                calls = {}
                for number, shape in enumerate(dict.fromkeys([*chunk, *self.pace])):
                    self.poll()
                    calls[shape] = stack.enter_context(self._opened(shape, scratch / str(number)))
                by = clock_of(self.target)
                timed = timed_in_turns(calls, rounds=self.rounds, by=by, poll=self.poll, clock=self.clock)
            for shape in self.pace:
                self.known.setdefault(shape, timed[shape])
            factor = 1.0
            if self.pace:
                factor = sum(self.known[shape] for shape in self.pace) / sum(timed[shape] for shape in self.pace)
            found |= {shape: self.known.get(shape, factor * timed[shape]) for shape in chunk}
        return found

    def chunks(self, shapes: Sequence[LayerShape]) -> Iterator[list[LayerShape]]:
        """Layers that may be open together."""
        chunk: list[LayerShape] = []
        total = 0
        for shape in dict.fromkeys(shapes):
            size = _bytes(shape, self.batch)
            if chunk and (total + size > AT_ONCE or len(chunk) == MOST_AT_ONCE):
                yield chunk
                chunk, total = [], 0
            chunk, total = [*chunk, shape], total + size
        if chunk:
            yield chunk

    @contextlib.contextmanager
    def _opened(self, shape: LayerShape, folder: Path) -> Iterator[LayerCall]:
        if self.target.runtime == "onnxruntime" and self.target.precision == "fp32":
            graph = layer_graph(shape)
            inner = without_reorders(graph, self.target.threads) if shape.kind != "linear" else None
            session = OrtSession(inner or graph, self.target.threads)
            extents = session_input(inner or graph)
            feed = np.random.default_rng(0).standard_normal((self.batch, *extents), dtype=np.float32)
            try:
                yield LayerCall(session.prepare({"input": feed}), _written_again(feed))
            finally:
                session.close()
            return
        example = torch.randn(max(2, self.batch), *_sample(shape), generator=torch.Generator().manual_seed(0))
        subject: Any = layer_module(shape)
        if not self.target.from_module:
            folder.mkdir()
            (folder / "layer.onnx").write_bytes(layer_graph(shape))
            subject = read_onnx(folder / "layer.onnx")
        data = example.numpy() if self.target.precision in ("int8", "fp8") else None
        engine = build_engine(subject, self.target, example, folder, name="layer", calibration=data)
        if (why := engine.runnable()) is not None:
            raise EngineError(
                f"target {self.target.name!r} cannot be timed on this machine: {why}",
                expected="a target whose engines run here",
                fix="make the table on the machine that the target describes, or name another target: --target cpu",
            )
        with load_engine(engine, allow_host_code=True) as runner:
            feeds = runner.sample_inputs(self.batch)
            touch = [_written_again(array) for array in feeds.values()]
            yield LayerCall(runner.prepare(feeds), lambda: [again() for again in touch])


def clock_of(target: Target) -> By:
    """The clock that tells how long a call takes undisturbed: the process's CPU time where one thread does all of the
    work, which is the wall time of an idle machine even on a busy one; else wall time."""
    return "cpu" if not target.on_gpu and target.threads == 1 else "wall"


def pace_of(shapes: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """The heaviest of a network's distinct layers, as many as fill the caches; at least one."""
    heaviest = sorted(set(shapes), key=lambda shape: (-shape.macs, str(shape)))
    sizes = accumulate(4 * shape.weights for shape in heaviest)
    return tuple(
        shape for number, (shape, size) in enumerate(zip(heaviest, sizes, strict=True)) if not number or size <= BESIDE
    )


def timed_in_turns(
    calls: Mapping[Key, LayerCall],
    *,
    rounds: int,
    by: By = "wall",
    poll: Callable[[], None] = lambda: None,
    clock: Clock = HOST_CLOCK,
) -> dict[Key, float]:
    """The lower quartile of each subject's calls in ms by one of the clocks; one call of each in every round."""
    for call in calls.values():
        call.run()
    timings: dict[Key, list[float]] = {key: [] for key in calls}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            poll()
            for key, call in calls.items():
                call.touch()
                timing = time_call(call.run, clock)
                timings[key].append(timing.cpu_ms if by == "cpu" else timing.wall_ms)
    finally:
        if was_enabled:
            gc.enable()
    return {key: percentile(sorted(found), QUARTILE) for key, found in timings.items()}


def layer_module(shape: LayerShape) -> nn.Module:
    """The layer as a module, a convolution with the ReLU behind it, for targets that run PyTorch's own layers."""
    if shape.kind == "linear":
        return nn.Linear(shape.c_in, shape.c_out, bias=shape.bias).eval()
    layer = nn.Conv2d(shape.c_in, shape.c_out, shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups)
    return nn.Sequential(layer, nn.ReLU()).eval()


def session_input(graph: bytes) -> list[int]:
    """Extents of a graph's input behind the batch."""
    import onnx

    given = onnx.load_model_from_string(graph).graph.input[0]
    return [extent.dim_value for extent in given.type.tensor_type.shape.dim][1:]


def _sample(shape: LayerShape) -> tuple[int, ...]:
    if shape.kind == "linear":
        return (shape.c_in,) if shape.tokens == 1 else (shape.tokens, shape.c_in)
    return shape.c_in, shape.height, shape.width


def _bytes(shape: LayerShape, batch: int) -> int:
    high, wide = shape.output
    inputs = shape.c_in * shape.height * shape.width * shape.tokens
    return 4 * (shape.weights + batch * (inputs + shape.c_out * high * wide * shape.tokens))


def _written_again(array: np.ndarray) -> Callable[[], object]:
    if not np.issubdtype(array.dtype, np.floating):
        return lambda: None
    return lambda: np.negative(array, out=array)
