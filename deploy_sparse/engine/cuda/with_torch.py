"""GPU memory and streams from PyTorch, where a process has it imported: one allocator for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from .runtime import Buffer, Stream, as_bytes, cuda_failed, out_of_memory


class TorchCuda:
    """The GPU that is current in torch when this is made."""

    name = "torch"

    def __init__(self, library: Any) -> None:
        self._torch = library
        with _explained(library, "starting"):
            self.device = int(library.cuda.current_device())

    def active(self) -> AbstractContextManager[Any]:
        """Make the GPU current in this thread."""
        return self._torch.cuda.device(self.device)  # type: ignore[no-any-return]

    def stream(self) -> Stream:
        """A new stream."""
        return _Stream(self._torch)

    def alloc(self, nbytes: int, stream: Stream) -> Buffer:
        """Memory of this many bytes, at least one, of the stream's share of the allocator."""
        assert isinstance(stream, _Stream)
        with _explained(self._torch, f"allocating {nbytes / 2**20:.1f} MiB"), self._torch.cuda.stream(stream.stream):
            return _Buffer(self._torch.empty(max(nbytes, 1), dtype=self._torch.uint8, device="cuda"), nbytes)

    def copy_in(self, buffer: Buffer, array: np.ndarray, stream: Stream) -> None:
        """Queue a copy to the GPU."""
        self._copy(buffer, array, stream, inwards=True)

    def copy_out(self, array: np.ndarray, buffer: Buffer, stream: Stream) -> None:
        """Queue a copy from the GPU."""
        self._copy(buffer, array, stream, inwards=False)

    def _copy(self, buffer: Buffer, array: np.ndarray, stream: Stream, *, inwards: bool) -> None:
        assert isinstance(buffer, _Buffer)
        assert isinstance(stream, _Stream)
        with _explained(self._torch, "copying"), self._torch.cuda.stream(stream.stream):
            host = self._torch.from_numpy(as_bytes(array if array.flags.writeable else array.copy()))
            device = buffer.tensor[: array.nbytes]
            (device if inwards else host).copy_(host if inwards else device, non_blocking=True)


class _Buffer:
    def __init__(self, tensor: Any, nbytes: int) -> None:
        self.tensor, self.pointer, self.nbytes = tensor, int(tensor.data_ptr()), nbytes

    def free(self) -> None:
        self.tensor, self.pointer = None, 0


class _Stream:
    def __init__(self, library: Any) -> None:
        self._torch = library
        with _explained(library, "making a stream"):
            self.stream: Any = library.cuda.Stream()
        self.handle = int(self.stream.cuda_stream)

    def synchronize(self) -> None:
        with _explained(self._torch, "waiting for a stream"):
            self.stream.synchronize()

    def time(self, enqueue: Callable[[], None]) -> float:
        with _explained(self._torch, "timing"):
            start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(self.stream)
            enqueue()
            end.record(self.stream)
            end.synchronize()
            return float(start.elapsed_time(end))

    def wait_for(self, handle: int) -> None:
        with _explained(self._torch, "ordering streams"):
            self.stream.wait_stream(self._other(handle))

    def hold(self, handle: int) -> None:
        with _explained(self._torch, "ordering streams"):
            self._other(handle).wait_stream(self.stream)

    def capture(self, enqueue: Callable[[], None]) -> _Graph:
        with _explained(self._torch, "capturing a graph"):
            graph = self._torch.cuda.CUDAGraph()
            with self._torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                enqueue()
        return _Graph(self._torch, graph, self.stream)

    def close(self) -> None:
        self.stream = None  # torch's streams are a pool that is never destroyed

    def _other(self, handle: int) -> Any:
        current = self._torch.cuda.current_stream()
        return current if int(current.cuda_stream) == handle else self._torch.cuda.ExternalStream(handle)


class _Graph:
    def __init__(self, library: Any, graph: Any, stream: Any) -> None:
        self._torch, self._graph, self._stream = library, graph, stream

    def launch(self) -> None:
        with _explained(self._torch, "launching a graph"), self._torch.cuda.stream(self._stream):
            self._graph.replay()

    def free(self) -> None:
        self._graph = None


@contextmanager
def _explained(torch: Any, what: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as problem:
        raise out_of_memory(what) from problem
    except RuntimeError as problem:  # torch has no narrower class for CUDA's errors
        raise cuda_failed(what, str(problem).strip().splitlines()[0]) from problem
