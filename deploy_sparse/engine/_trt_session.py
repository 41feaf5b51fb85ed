"""Running a TensorRT or TensorRT-RTX engine on an NVIDIA GPU, with torch CUDA tensors as buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ..errors import EngineError
from ._trt import data_type_name, last_errors, library, log, process_logger, refitted
from .tensors import Feeds


class TrtSession:
    """One engine with one execution context on a stream of its own. Calls are serialised by a lock.

    Args:
        plan: the compiled engine.
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        rebuild: the command that builds it again, for messages.
        allow_host_code: let the engine bring code for the CPU.
        weights: the bytes of the ONNX file it was compiled from, for an engine without weights of its own.

    Raises:
        EngineError: TensorRT rejects the engine or the weights, or it needs host tensors.
    """

    def __init__(
        self, plan: bytes, runtime: str, rebuild: str, *, allow_host_code: bool = False, weights: bytes | None = None
    ) -> None:
        trt = library(runtime)
        self._rebuild = rebuild
        self._lock = threading.Lock()
        self._runtime = trt.Runtime(process_logger(runtime))  # must outlive the engine
        self._runtime.engine_host_code_allowed = allow_host_code
        if hasattr(self._runtime, "get_engine_validity"):
            validity, diagnostics = self._runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.SUBOPTIMAL:
                log.warning("the engine runs here, but was not compiled for this GPU: its latency is not its best")
            if validity == trt.EngineValidity.INVALID:
                raise self._rejected(f"its validity check fails with diagnostics {int(diagnostics)}")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._rejected("it cannot be deserialized")
        if weights is not None and not refitted(trt, self._engine, weights, process_logger(runtime)):
            raise self._rejected("its weights could not be filled in from its ONNX graph")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._rejected("no execution context can be made (GPU memory?)")
        self._stream = cast(
            Any, torch.cuda.Stream
        )()  # the default stream would add a device-wide synchronisation per run
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        if any(self._engine.get_tensor_location(n) == trt.TensorLocation.HOST for n in names):
            raise self._rejected("it reads a shape from host memory, which this runner does not provide")

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Outputs by name; copies the feeds to the GPU and the outputs back."""
        with self._lock, torch.cuda.stream(self._stream):
            buffers = self._bind(feeds)
            self._enqueue()
            self._stream.synchronize()
            return {name: buffers[name].cpu().numpy() for name in self._outputs}

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """A closure that runs once on feeds already on the GPU and waits for the result; no transfers in it.

        Only the latest closure of a session is valid: the context holds one set of addresses.
        """
        with self._lock, torch.cuda.stream(self._stream):
            buffers = self._bind(feeds)
            self._enqueue()  # the first run compiles kernels and allocates
            self._stream.synchronize()

        def run_once(_held: dict[str, torch.Tensor] = buffers) -> None:
            with self._lock:
                self._enqueue()
                self._stream.synchronize()

        return run_once

    def close(self) -> None:
        """Release context, engine and runtime, in the order TensorRT asks for."""
        with self._lock:
            self._stream.synchronize()
            del self._context, self._engine, self._runtime

    def _bind(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        buffers: dict[str, torch.Tensor] = {}
        for name in self._inputs:
            buffers[name] = torch.from_numpy(feeds[name]).cuda()
            if not self._context.set_input_shape(name, tuple(buffers[name].shape)):
                raise EngineError(
                    f"TensorRT refuses shape {tuple(buffers[name].shape)} for input {name!r}",
                    expected="a shape inside the engine's optimisation profile",
                    fix=f"change the batch, or build with another [batch] range: {self._rebuild}",
                )
        if missing := self._context.infer_shapes():
            raise EngineError(
                f"TensorRT cannot infer shapes without {missing}", expected="every input bound", fix="feed every input"
            )
        for name in self._outputs:
            dtype: Any = getattr(torch, data_type_name(self._engine.get_tensor_dtype(name)))
            buffers[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
        for name, buffer in buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        return buffers

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(
                f"TensorRT could not start the run: {last_errors()}",
                expected="a healthy GPU with free memory",
                fix="close other users of the GPU and run again; if it stays, build again: " + self._rebuild,
            )

    def _rejected(self, why: str) -> EngineError:
        return EngineError(
            f"TensorRT rejects the engine: {why}; {last_errors()}",
            expected="an engine built for this GPU by this version",
            fix=f"build it again here: {self._rebuild}",
        )
