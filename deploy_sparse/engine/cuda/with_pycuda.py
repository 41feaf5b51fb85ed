"""GPU memory and streams from pycuda, on the GPU's primary context and never ``pycuda.autoinit``'s own.

pycuda frees memory and streams only in a thread that has the very context current in which they were made, and ends
the process when a thread ends with a context pushed: so a context is pushed for the time of a call. It wraps neither
captures nor streams of others: there is no graph, and ordering with another stream waits for the whole GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...errors import EngineError
from .runtime import Buffer, Graph, Stream, as_bytes, cuda_failed, out_of_memory


class PycudaCuda:
    """The first GPU, by ``pycuda.driver``.

    Raises:
        EngineError: no GPU, or a driver that is too old.
    """

    name = "pycuda"
    device = 0

    def __init__(self, library: Any) -> None:
        self._library = library
        with _explained(library, "retaining the primary context"):
            library.init()
            self._context = library.Device(0).retain_primary_context()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push the context, and pop it again."""
        with _explained(self._library, "pushing its context"):
            self._context.push()
        try:
            yield
        finally:
            with _explained(self._library, "popping its context"):
                self._context.pop()

    def stream(self) -> Stream:
        """A new stream."""
        return _Stream(self._library, self._context)

    def alloc(self, nbytes: int, stream: Stream) -> Buffer:
        """Memory of this many bytes, at least one; any stream may use it."""
        with _explained(self._library, f"allocating {nbytes / 2**20:.1f} MiB"):
            return _Buffer(self, self._library, self._library.mem_alloc(max(nbytes, 1)), nbytes)

    def copy_in(self, buffer: Buffer, array: np.ndarray, stream: Stream) -> None:
        """Queue a copy to the GPU."""
        assert isinstance(stream, _Stream)
        if array.nbytes:
            with _explained(self._library, "copying to the GPU"):
                self._library.memcpy_htod_async(buffer.pointer, as_bytes(array), stream.stream)

    def copy_out(self, array: np.ndarray, buffer: Buffer, stream: Stream) -> None:
        """Queue a copy from the GPU."""
        assert isinstance(stream, _Stream)
        if array.nbytes:
            with _explained(self._library, "copying from the GPU"):
                self._library.memcpy_dtoh_async(as_bytes(array), buffer.pointer, stream.stream)


class _Buffer:
    def __init__(self, cuda: PycudaCuda, library: Any, allocation: Any, nbytes: int) -> None:
        self._cuda, self._library, self._allocation = cuda, library, allocation
        self.pointer, self.nbytes = int(allocation), nbytes

    def free(self) -> None:
        allocation, self._allocation, self.pointer = self._allocation, None, 0
        if allocation is not None:
            with self._cuda.active(), _explained(self._library, "freeing memory"):
                allocation.free()


class _Stream:
    def __init__(self, library: Any, context: Any) -> None:
        self._library, self._context = library, context
        with _explained(library, "making a stream"):
            self.stream: Any = library.Stream(1)  # CU_STREAM_NON_BLOCKING
        self.handle = int(self.stream.handle)

    def synchronize(self) -> None:
        with _explained(self._library, "waiting for a stream"):
            self.stream.synchronize()

    def time(self, enqueue: Callable[[], None]) -> float:
        with _explained(self._library, "timing"):
            start, end = self._library.Event(), self._library.Event()
            start.record(self.stream)
            enqueue()
            end.record(self.stream)
            end.synchronize()
            return float(start.time_till(end))

    def wait_for(self, handle: int) -> None:
        with _explained(self._library, "waiting for the GPU"):
            self._context.synchronize()

    def hold(self, handle: int) -> None:
        self.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        raise EngineError(
            "pycuda captures no CUDA graphs", expected="cuda-python or PyTorch", fix="pip install cuda-python"
        )

    def close(self) -> None:
        self.stream = None  # pycuda destroys it with its last reference


@contextmanager
def _explained(library: Any, what: str) -> Iterator[None]:
    try:
        yield
    except library.MemoryError as problem:
        raise out_of_memory(what) from problem
    except library.Error as problem:
        raise cuda_failed(what, str(problem)) from problem
