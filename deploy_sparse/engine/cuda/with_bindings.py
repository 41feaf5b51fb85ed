"""GPU memory and streams from cuda-python (``cuda.bindings.runtime``), whose calls return an error code first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from ...errors import EngineError
from .runtime import Buffer, Stream, as_bytes, cuda_failed, out_of_memory


class _Calls:
    """The library's functions with their error codes checked."""

    def __init__(self, library: Any) -> None:
        self.cudart = library

    def __call__(self, name: str, *arguments: Any, doing: str = "") -> Any:
        """Call a function and return what it returns after the code: nothing, or one value.

        Raises:
            EngineError: the code is not success.
        """
        code, *values = getattr(self.cudart, name)(*arguments)
        if int(code):
            if int(code) == int(self.cudart.cudaError_t.cudaErrorMemoryAllocation):
                raise out_of_memory(doing or f"in {name}")
            raise cuda_failed(name, self._reason(code))
        return values[0] if values else None

    def _reason(self, code: Any) -> str:
        texts = []
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            failed, text = getattr(self.cudart, name)(code)
            texts.append(str(code) if int(failed) else bytes(text).decode(errors="replace"))
        return ": ".join(texts)


class BindingsCuda:
    """The GPU that is current when this is made, by CUDA's runtime API.

    Raises:
        EngineError: no GPU, or a driver that is too old.
    """

    name = "cuda-python"

    def __init__(self, library: Any) -> None:
        self._calls = _Calls(library)
        self._calls("cudaFree", 0)  # makes the primary context, which finds out whether the driver works
        self.device = int(self._calls("cudaGetDevice"))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU current in this thread, as a new thread starts with the first."""
        before = int(self._calls("cudaGetDevice"))
        if before == self.device:
            yield
            return
        self._calls("cudaSetDevice", self.device)
        try:
            yield
        finally:
            self._calls("cudaSetDevice", before)

    def stream(self) -> Stream:
        """A new stream."""
        return _Stream(self._calls)

    def alloc(self, nbytes: int, stream: Stream) -> Buffer:
        """Memory of this many bytes, at least one; any stream may use it."""
        pointer = self._calls("cudaMalloc", max(nbytes, 1), doing=f"allocating {nbytes / 2**20:.1f} MiB")
        return _Buffer(self._calls, int(pointer), nbytes)

    def copy_in(self, buffer: Buffer, array: np.ndarray, stream: Stream) -> None:
        """Queue a copy to the GPU."""
        self._copy("cudaMemcpyHostToDevice", buffer.pointer, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: np.ndarray, buffer: Buffer, stream: Stream) -> None:
        """Queue a copy from the GPU."""
        data = as_bytes(array).ctypes.data
        self._copy("cudaMemcpyDeviceToHost", data, buffer.pointer, array.nbytes, stream)

    def _copy(self, kind: str, to: int, source: int, nbytes: int, stream: Stream) -> None:
        if nbytes:
            self._calls(
                "cudaMemcpyAsync", to, source, nbytes, getattr(self._calls.cudart.cudaMemcpyKind, kind), stream.handle
            )


class _Buffer:
    def __init__(self, calls: _Calls, pointer: int, nbytes: int) -> None:
        self._calls, self.pointer, self.nbytes = calls, pointer, nbytes

    def free(self) -> None:
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self._calls("cudaFree", pointer)


class _Stream:
    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._stream = calls("cudaStreamCreateWithFlags", calls.cudart.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        self._order: Any = None
        try:
            self._order = calls("cudaEventCreateWithFlags", calls.cudart.cudaEventDisableTiming)
        except EngineError:
            self.close()
            raise

    def synchronize(self) -> None:
        self._calls("cudaStreamSynchronize", self.handle)

    def time(self, enqueue: Callable[[], None]) -> float:
        with ExitStack() as events:
            start, end = (self._event(events) for _ in range(2))
            self._calls("cudaEventRecord", start, self.handle)
            enqueue()
            self._calls("cudaEventRecord", end, self.handle)
            self._calls("cudaEventSynchronize", end)
            return float(self._calls("cudaEventElapsedTime", start, end))

    def wait_for(self, handle: int) -> None:
        self._calls("cudaEventRecord", self._order, handle)
        self._calls("cudaStreamWaitEvent", self.handle, self._order, 0)

    def hold(self, handle: int) -> None:
        self._calls("cudaEventRecord", self._order, self.handle)
        self._calls("cudaStreamWaitEvent", handle, self._order, 0)

    def capture(self, enqueue: Callable[[], None]) -> _Graph:
        mode = self._calls.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._calls("cudaStreamBeginCapture", self.handle, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(EngineError):  # a capture that broke off ends with an error of its own
                self._calls("cudaGraphDestroy", self._calls("cudaStreamEndCapture", self.handle))
            raise
        graph = self._calls("cudaStreamEndCapture", self.handle)
        with ExitStack() as undo:
            try:
                made = _Graph(self._calls, self._calls("cudaGraphInstantiate", graph, 0), self.handle)
                undo.callback(made.free)
            finally:
                self._calls("cudaGraphDestroy", graph)
            undo.pop_all()
        return made

    def _event(self, events: ExitStack) -> Any:
        event = self._calls("cudaEventCreate")
        events.callback(self._calls, "cudaEventDestroy", event)
        return event

    def close(self) -> None:
        stream, order = self._stream, self._order
        self._stream = self._order = None
        try:
            if order is not None:
                self._calls("cudaEventDestroy", order)
        finally:
            if stream is not None:
                self._calls("cudaStreamDestroy", stream)


class _Graph:
    def __init__(self, calls: _Calls, launchable: Any, handle: int) -> None:
        self._calls, self._launchable, self._handle = calls, launchable, handle

    def launch(self) -> None:
        self._calls("cudaGraphLaunch", self._launchable, self._handle)

    def free(self) -> None:
        launchable, self._launchable = self._launchable, None
        if launchable is not None:
            self._calls("cudaGraphExecDestroy", launchable)
