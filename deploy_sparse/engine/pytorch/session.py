"""Running a torch program with PyTorch, operator by operator or, on a GPU, as one CUDA graph."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from ...errors import DeploySparseError, EngineError
from ...exporting import quiet
from ...programs.program import read_bytes
from ..cuda.arrays import DeviceView, check_device
from ..target import Target
from ..tensors import NOTHING, Feeds
from .choice import BlockChoice, with_block_kernels
from .fold import fold_batchnorm_
from .graph import call_flat, flat_module, loosen_views_, pruned, writes_inputs

log = logging.getLogger("deploy_sparse.torch")

_WARM_UP = 3  # runs before a capture: the first ones search algorithms and compile kernels


_GPU_LOCK = threading.Lock()  # one for all sessions: what they set is the process's


class TorchSession:
    """A torch program ready to run.

    Calls may come from several threads; a lock serialises those of a session on the CPU, and those of all sessions on
    a GPU. There weights and activations of four axes are channels-last, cuDNN searches for its fastest algorithms, and
    the process-wide settings that this needs are set for the time of a call.

    Attributes:
        blocks: where the block kernel could run, and whether it does.

    Raises:
        ArtifactError: anything but a program of PyTorch's own operators, or of a newer PyTorch.
        EngineError: it does not fit the GPU.
    """

    def __init__(
        self, data: bytes, target: Target, inputs: Sequence[str], outputs: Sequence[str], *, where: str, rebuild: str
    ) -> None:
        if target.device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"PyTorch {torch.__version__} finds no GPU here",
                expected="PyTorch with CUDA, and a driver as new as it",
                fix="install PyTorch for the CUDA version that nvidia-smi shows",
            )
        program = read_bytes(data, where, remake=rebuild)
        self._target, self._inputs, self._outputs, self._rebuild = target, tuple(inputs), tuple(outputs), rebuild
        self._on_gpu = target.device == "cuda"
        self._lock = _GPU_LOCK if self._on_gpu else threading.Lock()
        self._stream: Any = None
        if self._on_gpu:
            with self._explained("loading"), quiet():
                program = move_to_device_pass(program, "cuda")
        self._module = flat_module(program).requires_grad_(False)
        if self._on_gpu:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with self._explained("loading"):
                self._module.to(memory_format=torch.channels_last)
                loosen_views_(self._module)
                torch.cuda.synchronize()  # what follows runs on the session's own stream
        self.blocks: tuple[BlockChoice, ...]
        with self._lock, self._explained("loading"), self._settings(), torch.no_grad():
            fold_batchnorm_(self._module)
            self._module, self.blocks = with_block_kernels(pruned(self._module), target)
        for choice in self.blocks:
            log.info("%s", choice)
        self._forward = _forward(self._module, copies=writes_inputs(self._module.graph))
        self._own = {x.untyped_storage().data_ptr() for x in (*self._module.parameters(), *self._module.buffers())}

    def run(self, feeds: Feeds, out: Feeds = NOTHING) -> dict[str, np.ndarray]:
        """Outputs by name, C-contiguous, copied into the arrays of ``out``; on a GPU with copies there and back.

        Raises:
            EngineError: the program fails on these inputs.
        """
        with self._lock, self._explained("running"), self._settings(), torch.inference_mode():
            inputs = self._tensors(feeds)
            outputs = self._forward(inputs)
            if self._on_gpu:
                self._stream.synchronize()
                arrays = [np.ascontiguousarray(y.cpu().numpy()) for y in outputs]
            else:
                held = {x.untyped_storage().data_ptr() for x in inputs} | self._own
                arrays = [self._array(y, held) for y in outputs]
        found = dict(zip(self._outputs, arrays, strict=True))
        for name, array in out.items():
            _fits(name, array.shape, found[name].shape)
            np.copyto(array, found[name])
        return {**found, **out}

    def run_on_gpu(
        self, feeds: Mapping[str, DeviceView], out: Mapping[str, DeviceView], stream: int
    ) -> dict[str, torch.Tensor]:
        """Outputs by name, C-contiguous on the GPU, ordered to torch's current stream; nothing waits.

        Results are copied into the tensors of ``out``.

        Raises:
            EngineError: the program fails on these inputs, or they are on another GPU.
        """
        for views in (feeds, out):
            check_device(views, self._stream.device.index)
        with self._lock, self._explained("running"), torch.no_grad():
            current = torch.cuda.current_stream()
            for view in (*feeds.values(), *out.values()):
                if view.stream is not None:
                    current.wait_stream(torch.cuda.ExternalStream(view.stream))  # type: ignore[no-untyped-call]
            with self._settings():
                self._stream.wait_stream(current)
                inputs = [_tensor(feeds[name].owner) for name in self._inputs]
                outputs = self._forward([self._ordered(x) for x in inputs])
                held = {x.untyped_storage().data_ptr() for x in inputs} | self._own
                found = dict(zip(self._outputs, (_alone(y, held) for y in outputs), strict=True))
                for name, view in out.items():
                    _fits(name, view.form.shape, tuple(found[name].shape))
                    _tensor(view.owner).copy_(found[name])
            current.wait_stream(self._stream)
            for x in inputs:
                x.record_stream(self._stream)
            for y in found.values():
                y.record_stream(current)
        return {name: out[name].owner if name in out else y for name, y in found.items()}

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """A closure that runs once and returns when the result is there.

        On the CPU it reads the arrays of ``feeds``. On a GPU it runs on copies that are there already, and replays a
        CUDA graph where the target says so.

        Raises:
            EngineError: the program fails on these inputs, or cannot be captured.
        """
        if not self._on_gpu:
            return self._prepared_on_cpu(feeds)
        with self._lock, self._explained("running"), self._settings(), torch.inference_mode():
            inputs, forward = self._tensors(feeds), self._forward
            for _ in range(_WARM_UP):
                outputs = forward(inputs)
            self._stream.synchronize()
        if not self._target.cuda_graph:
            return self._launching(inputs)
        graph = torch.cuda.CUDAGraph()
        with self._lock, self._explained("being captured as a CUDA graph"), self._settings(), torch.inference_mode():
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = forward(inputs)
            self._stream.synchronize()
        stream, lock = self._stream, self._lock

        def replay(_held: object = (inputs, outputs)) -> None:
            with lock, torch.cuda.stream(stream):
                graph.replay()
                stream.synchronize()

        return replay

    def close(self) -> None:
        """Release the program and, on a GPU, its memory."""
        with self._lock:
            if self._on_gpu:
                self._stream.synchronize()
            del self._module, self._forward

    def _prepared_on_cpu(self, feeds: Feeds) -> Callable[[], None]:
        inputs, forward = self._tensors(feeds), self._forward

        def run_once() -> None:
            with self._lock, self._settings(), torch.inference_mode():
                forward(inputs)

        with self._explained("running"):
            run_once()
        return run_once

    def _launching(self, inputs: list[torch.Tensor]) -> Callable[[], None]:
        forward = self._forward

        def launch() -> None:
            with self._lock, self._settings(), torch.inference_mode():
                forward(inputs)
                self._stream.synchronize()

        return launch

    def _tensors(self, feeds: Feeds) -> list[torch.Tensor]:
        """The feeds in order, on the device; on the CPU the arrays themselves unless they are read-only."""
        arrays = [feeds[name] for name in self._inputs]
        tensors = [torch.from_numpy(x if x.flags.writeable else x.copy()) for x in arrays]
        if not self._on_gpu:
            return tensors
        return [self._ordered(x) for x in tensors]

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor on the GPU in the program's order of memory."""
        return x.to("cuda", memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)

    def _array(self, output: torch.Tensor, held: set[int]) -> np.ndarray:
        """As an array that shares no memory with ``held``."""
        shared = output.untyped_storage().data_ptr() in held
        return np.ascontiguousarray((output.clone() if shared else output).numpy())

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Threads on the CPU; stream and the way to compute fp32 on a GPU."""
        if not self._on_gpu:
            before = torch.get_num_threads()
            if before == self._target.threads:
                yield
                return
            torch.set_num_threads(self._target.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)
            return
        with _gpu_settings(self._target.tf32), torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except DeploySparseError:
            raise
        except torch.cuda.OutOfMemoryError as problem:
            raise EngineError(
                f"the GPU is out of memory while {what}",
                expected="free memory for weights and activations at this batch",
                fix="close other users of the GPU, or run smaller batches",
            ) from problem
        except Exception as problem:  # operators raise whatever they like
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
            graphs = "set cuda_graph = false in the target, or " if "captured" in what else ""
            raise EngineError(
                f"PyTorch {torch.__version__} failed while {what}: {lines[0][:300]}",
                expected="a program that runs at every batch size of its range",
                fix=f"{graphs}narrow [batch] of the target, or build again: {self._rebuild}",
            ) from problem


def _tensor(array: Any) -> torch.Tensor:
    """What is on the GPU as a tensor that shares its memory."""
    if isinstance(array, torch.Tensor):
        return array
    if hasattr(array, "__cuda_array_interface__"):
        return torch.as_tensor(array, device="cuda")
    return torch.utils.dlpack.from_dlpack(array)


def _alone(output: torch.Tensor, held: set[int]) -> torch.Tensor:
    """The output C-contiguous, in memory that is not among ``held``."""
    shared = output.untyped_storage().data_ptr() in held
    return output.clone(memory_format=torch.contiguous_format) if shared else output.contiguous()


def _fits(name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if given != shape:
        raise EngineError(
            f"output {name!r} goes into an array {list(given)}",
            expected=f"the shape {list(shape)}, which these inputs give",
            fix="allocate it with that shape, or leave it out",
        )


def _forward(module: GraphModule, *, copies: bool) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """The program as a function; ``copies``: it writes into its inputs, which are therefore copied first."""

    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return call_flat(module, [x.clone() for x in inputs] if copies else inputs)

    return forward


@contextmanager
def _gpu_settings(tf32: bool) -> Iterator[None]:
    """How float32 products are computed, and cuDNN's search; both back to what they were afterwards."""
    backends: Any = torch.backends
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [kind.fp32_precision for kind in kinds]
    searched = backends.cudnn.benchmark
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32" if tf32 else "ieee"
        backends.cudnn.benchmark = True
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value
        backends.cudnn.benchmark = searched
