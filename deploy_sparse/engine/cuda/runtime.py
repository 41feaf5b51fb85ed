"""What running on a GPU needs of CUDA, and the library that does it here: cuda-python, pycuda or torch.

torch comes first only where it is imported already: then its allocator has the memory. Importing it for a few buffers
would take seconds. All three use the GPU's primary context, which TensorRT uses too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from ...errors import EngineError, MissingDependencyError


class Buffer(Protocol):
    """Memory on the GPU; freeing twice is fine."""

    pointer: int
    nbytes: int

    def free(self) -> None: ...


class Graph(Protocol):
    """Work captured once; freeing twice is fine."""

    def launch(self) -> None: ...
    def free(self) -> None: ...


class Stream(Protocol):
    """A queue of work that does not wait for the default stream. Closing twice is fine."""

    handle: int

    def synchronize(self) -> None: ...
    def time(self, enqueue: Callable[[], None]) -> float:
        """Milliseconds, between events on the GPU, of what ``enqueue`` queues here; waits for it."""

    def wait_for(self, handle: int) -> None:
        """Let later work here wait for what another stream has queued by now."""

    def hold(self, handle: int) -> None:
        """Let later work of another stream wait for what is queued here by now."""

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` queues here, as a graph; it does not run."""

    def close(self) -> None: ...


class Cuda(Protocol):
    """A library that manages memory and streams of one GPU. Whatever fails is an :class:`EngineError`.

    Everything happens inside ``with cuda.active():``, which makes the GPU current in the calling thread.
    """

    name: str
    device: int

    def active(self) -> AbstractContextManager[Any]: ...
    def stream(self) -> Stream: ...
    def alloc(self, nbytes: int, stream: Stream) -> Buffer:
        """Memory of this many bytes, for work in this stream."""

    def copy_in(self, buffer: Buffer, array: np.ndarray, stream: Stream) -> None:
        """Queue a copy of a C-contiguous array to the GPU."""

    def copy_out(self, array: np.ndarray, buffer: Buffer, stream: Stream) -> None:
        """Queue a copy from the GPU into a C-contiguous array, which has it once the stream is synchronised."""


def cuda_library() -> Cuda:
    """The library to use here.

    Raises:
        MissingDependencyError: none of the three is installed with support for CUDA.
        EngineError: it finds no GPU.
    """
    tried = []
    for module, make in _CHOICES[-1:] * ("torch" in sys.modules) + _CHOICES:
        try:
            library = import_module(module)
        except (ImportError, OSError) as problem:
            missing = isinstance(problem, ModuleNotFoundError)
            tried.append(f"{module} {'is not installed' if missing else f'does not load ({problem})'}")
            continue
        if module == "torch" and not library.cuda.is_available():
            tried.append("torch sees no GPU")
            continue
        return make(library)
    raise MissingDependencyError(
        f"nothing here manages GPU memory: {', '.join(dict.fromkeys(tried))}",
        expected="cuda-python, pycuda, or PyTorch with CUDA",
        fix="pip install cuda-python",
    )


def _bindings(library: Any) -> Cuda:
    from .with_bindings import BindingsCuda

    return BindingsCuda(library)


@cache
def _pycuda(library: Any) -> Cuda:
    """One for the process: pycuda leaves a context current in the thread in which the last one is dropped."""
    from .with_pycuda import PycudaCuda

    return PycudaCuda(library)


def _torch(library: Any) -> Cuda:
    from .with_torch import TorchCuda

    return TorchCuda(library)


_CHOICES: tuple[tuple[str, Callable[[Any], Cuda]], ...] = (
    ("cuda.bindings.runtime", _bindings),
    ("pycuda.driver", _pycuda),
    ("torch", _torch),
)


def cuda_failed(what: str, why: str) -> EngineError:
    """The error of a failed CUDA call."""
    return EngineError(
        f"CUDA failed in {what}: {why}",
        expected="a healthy GPU and a driver as new as the libraries",
        fix="run again in a new process, as a failed GPU context stays failed; look at nvidia-smi and dmesg",
    )


def out_of_memory(what: str) -> EngineError:
    """The error of an allocation that the GPU has no memory for."""
    return EngineError(
        f"the GPU is out of memory while {what}",
        expected="free GPU memory for the engine, its activations and its inputs and outputs",
        fix="close other users of the GPU, run smaller batches, or load with fewer contexts",
    )


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a C-contiguous array, [n], sharing its memory."""
    return array.reshape(-1).view(np.uint8)
