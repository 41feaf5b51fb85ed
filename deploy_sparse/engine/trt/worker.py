"""What one call on a TensorRT engine borrows: a stream, an execution context, buffers, captured graphs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import numpy as np

from ...errors import EngineError
from ..cuda.runtime import Cuda, Stream
from .context import Context, Opened, Shapes, Slot

log = logging.getLogger("deploy_sparse.tensorrt")

_GRAPHS = 8  # sets of shapes that a worker keeps captured

_Key = tuple[tuple[int, ...], ...]
Lend = Callable[[], AbstractContextManager[object]]


class Prepared:
    """Feeds that are on the GPU: a call runs the engine on them and returns when the result is there."""

    def __init__(self, cuda: Cuda, stream: Stream, slot: Slot, lend: Lend) -> None:
        self._cuda, self._stream, self._slot, self._lend = cuda, stream, slot, lend
        self.close = weakref.finalize(self, _close, cuda, slot)
        self.close.atexit = False

    def __call__(self) -> None:
        with self._lend(), self._cuda.active():
            self._slot.enqueue()
            self._stream.synchronize()

    def gpu_ms(self) -> float:
        """Run once; milliseconds on the GPU's own clock, without the launch before and the wait after."""
        with self._lend(), self._cuda.active():
            return self._stream.time(self._slot.enqueue)


class Worker:
    """A stream, an execution context and buffers; for one thread at a time.

    Args:
        graphs: replay runs on host arrays and prepared runs as CUDA graphs, one for each set of shapes.
    """

    def __init__(self, cuda: Cuda, opened: Opened, *, graphs: bool = False) -> None:
        self._cuda, self._opened, self._graphs = cuda, opened, graphs
        self._captured: dict[_Key, Slot] = {}  # the latest used last
        self._uncaptured: dict[_Key, str] = {}  # shapes for which that failed, as for want of memory, and why
        self._prepared: weakref.WeakSet[Prepared] = weakref.WeakSet()
        with cuda.active(), ExitStack() as made:
            self.stream = cuda.stream()
            made.callback(self.stream.close)
            self._context = Context(opened)
            self._plain = Slot(cuda, opened, self._context, self.stream)
            made.pop_all()

    def run(self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy to the GPU, run, copy back; outputs in bfloat16 as 16-bit integers, but for those in ``out``."""
        results: dict[str, np.ndarray] = {}
        with self._cuda.active(), _drained(self.stream):
            slot = self._filled(feeds)
            slot.enqueue()
            for name, dtype in self._opened.outputs.items():
                raw = "uint16" if dtype == "bfloat16" else dtype
                results[name] = out[name] if name in out else np.empty(slot.outputs[name], raw)
                slot.fetch(name, results[name])
            self.stream.synchronize()
        return results

    def run_at(
        self,
        shapes: Shapes,
        addresses: Mapping[str, int],
        allocate: Callable[[Shapes], Mapping[str, int]],
        before: Iterable[int],
        after: int | None,
    ) -> None:
        """Run on inputs at these addresses, without a copy.

        Args:
            allocate: from the shapes of the outputs to their addresses.
            before: streams to wait for.
            after: a stream that then waits for the result; None: the calling thread does.
        """
        with self._cuda.active(), _drained(self.stream):
            outputs = self._context.set_shapes(shapes)
            self._context.set_addresses({**addresses, **allocate(outputs)})
            for handle in before:
                self.stream.wait_for(handle)
            self._context.enqueue(self.stream)
            if after is None:
                self.stream.synchronize()
            else:
                self.stream.hold(after)

    def prepare(self, feeds: Mapping[str, np.ndarray], lend: Lend) -> Prepared:
        """Put feeds on the GPU and run once; ``lend`` borrows this worker for the time of a call."""
        with self._cuda.active(), ExitStack() as made, _drained(self.stream):
            if slot := self._captured_on(feeds):
                made.callback(slot.close)
            else:
                slot = Slot(self._cuda, self._opened, self._context, self.stream)
                made.callback(slot.close)
                slot.fill(feeds)
            slot.enqueue()  # the first run compiles kernels and allocates
            self.stream.synchronize()
            made.pop_all()
        prepared = Prepared(self._cuda, self.stream, slot, lend)
        self._prepared.add(prepared)
        return prepared

    def close(self) -> None:
        """Wait for the stream and free everything, whatever fails on the way."""
        try:
            with self._cuda.active(), ExitStack() as rest:
                rest.callback(self.stream.close)
                for slot in (*self._captured.values(), self._plain):
                    rest.callback(slot.close)
                for prepared in self._prepared:
                    rest.callback(prepared.close)
                rest.callback(self.stream.synchronize)
        finally:
            self._captured = {}
            del self._context, self._plain, self._opened  # which keep the engine

    def _filled(self, feeds: Mapping[str, np.ndarray]) -> Slot:
        """A slot with the feeds in it: the one captured for their shapes, a new one, or the plain one."""
        key = self._key(feeds)
        if key in self._captured:
            found = self._captured[key] = self._captured.pop(key)
            found.fill(feeds)
            return found
        if (new := self._captured_on(feeds)) is None:
            self._plain.fill(feeds)
            return self._plain
        self._captured[key] = new
        if len(self._captured) > _GRAPHS:
            self._captured.pop(next(iter(self._captured))).close()
        return new

    def _captured_on(self, feeds: Mapping[str, np.ndarray]) -> Slot | None:
        """A new slot with these feeds, captured on them; None where no graphs are wanted, or these shapes gave none.

        After so many shapes without a graph as are kept with one, no further ones are tried.
        """
        key = self._key(feeds)
        if not self._graphs or key in self._uncaptured or len(self._uncaptured) >= _GRAPHS:
            return None
        self._context.set_shapes({name: feeds[name].shape for name in self._opened.inputs})  # or refuse them
        with ExitStack() as made:
            try:
                slot = Slot(self._cuda, self._opened, Context(self._opened), self.stream)
                made.callback(slot.close)
                with _drained(self.stream):
                    slot.fill(feeds)
                    slot.capture()
            except EngineError as problem:
                if problem.given not in self._uncaptured.values():
                    shapes = " and ".join(str(list(shape)) for shape in key)
                    why = "runs on %s are launched one by one, as capturing a CUDA graph failed: %s"
                    log.warning(why, shapes, problem.given)
                self._uncaptured[key] = problem.given
                return None
            made.pop_all()
            return slot

    def _key(self, feeds: Mapping[str, np.ndarray]) -> _Key:
        return tuple(feeds[name].shape for name in self._opened.inputs)


@contextmanager
def _drained(stream: Stream) -> Iterator[None]:
    """On the way out of a failure nothing may still read or write what the caller then lets go."""
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            stream.synchronize()
        raise


def _close(cuda: Cuda, slot: Slot) -> None:
    with cuda.active():
        slot.close()
