"""Running a TensorRT or TensorRT-RTX engine on an NVIDIA GPU: several execution contexts, each lent to one call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import EngineError, MissingDependencyError
from ..cuda.arrays import DeviceArray, DeviceView, check_device, new_tensor, torch_with_cuda
from ..cuda.runtime import cuda_library
from ..layer_times import Floors, NodeTime
from ..pool import Pool
from ..tensors import NOTHING, Feeds, numpy_dtype
from .bindings import data_type_name, last_errors, library, log, process_logger, refitted
from .context import ITEM_SIZES, Opened, Shapes
from .worker import Prepared, Worker


class TrtSession:
    """One engine with execution contexts that share its weights; as many calls run at a time as there are contexts.

    Args:
        plan: the compiled engine.
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        rebuild: the command that builds it again, for messages.
        allow_host_code: let the engine bring code for the CPU.
        weights: the bytes of the ONNX file it was compiled from, for an engine without weights of its own.
        contexts: how many calls may run at a time; each context has a stream and memory for activations of its own.
        cuda_graph: replay runs on host arrays, and prepared ones, as CUDA graphs, one for each set of shapes.
        graph_path: of that ONNX file, where it keeps weights in others beside it.

    Raises:
        EngineError: TensorRT rejects the engine or the weights, it needs host tensors or types that have no array
            here, or the GPU has no memory for it.
        MissingDependencyError: no library that manages GPU memory.
    """

    def __init__(
        self,
        plan: bytes,
        runtime: str,
        rebuild: str,
        *,
        allow_host_code: bool = False,
        weights: bytes | None = None,
        contexts: int = 1,
        cuda_graph: bool = False,
        graph_path: Path | None = None,
    ) -> None:
        trt = self._library = library(runtime)
        self._rebuild = rebuild
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
        if weights is not None and not refitted(trt, self._engine, weights, process_logger(runtime), graph_path):
            raise self._rejected("its weights could not be filled in from its ONNX graph")
        opened = self._opened(trt)
        self._outputs = opened.outputs
        self._cuda = cuda_library()
        workers: list[Worker] = []
        with ExitStack() as made:
            for _ in range(contexts):
                workers.append(Worker(self._cuda, opened, graphs=cuda_graph))
                made.callback(workers[-1].close)
            made.pop_all()
        self._pool = Pool(workers, _closed)
        self._release = weakref.finalize(self, _release, self._pool)
        self._release.atexit = False

    def run(self, feeds: Feeds, out: Feeds = NOTHING) -> dict[str, np.ndarray]:
        """Outputs by name; copies the feeds to the GPU and the outputs back.

        Outputs in bfloat16 have the type of the package ml_dtypes, and are widened to float32, exactly, without it.

        Raises:
            EngineError: TensorRT, or CUDA, fails.
        """
        with self._pool.borrow() as worker:
            found = worker.run(feeds, out)
        return {name: y if name in out else _from_bits(y, self._outputs[name]) for name, y in found.items()}

    def run_on_gpu(self, feeds: Mapping[str, DeviceView], out: Mapping[str, DeviceView], stream: int) -> dict[str, Any]:
        """Outputs by name on the GPU, from inputs that are there: no copies and, with torch, no waiting.

        Args:
            stream: the caller's, to which the run is ordered as if it were queued there.

        Raises:
            EngineError: TensorRT, or CUDA, fails.
        """
        check_device(feeds, self._cuda.device)
        check_device(out, self._cuda.device)
        torch, results = torch_with_cuda(), {name: view.owner for name, view in out.items()}

        with self._pool.borrow() as worker:

            def allocate(shapes: Shapes) -> dict[str, int]:
                addresses = {}
                for name, shape in shapes.items():
                    if name in out:
                        addresses[name] = _address_of(name, out[name], shape)
                    elif torch is not None:
                        results[name] = new_tensor(torch, shape, self._outputs[name], self._cuda.device)
                        addresses[name] = results[name].data_ptr()
                    else:
                        results[name] = DeviceArray(self._cuda, worker.stream, shape, self._interface_type(name))
                        addresses[name] = results[name].__cuda_array_interface__["data"][0]
                return addresses

            worker.run_at(
                {name: view.form.shape for name, view in feeds.items()},
                {name: view.form.pointer for name, view in feeds.items()},
                allocate,
                before=sorted({stream, *(view.stream for view in (*feeds.values(), *out.values()) if view.stream)}),
                after=stream if torch is not None else None,
            )
        return {name: results[name] for name in self._outputs}

    def prepare(self, feeds: Feeds) -> Prepared:
        """A closure that runs once on feeds already on the GPU and waits for the result; no transfers in it."""
        with self._pool.borrow() as worker:
            return worker.prepare(feeds, partial(self._lend, worker))

    def layer_times(self, feeds: Feeds, floors: Floors) -> tuple[tuple[NodeTime, ...], int, float]:
        """Times of the engine's layers, how many runs they are of, and the ms of a whole run under the profiler.

        Raises:
            EngineError: TensorRT, or CUDA, fails.
        """
        from .profiling import profile_plan

        with self._pool.borrow():
            return profile_plan(self._library, self._cuda, self._opened(self._library), feeds, floors)

    def close(self) -> None:
        """Wait for running calls; release contexts, engine and runtime, in the order TensorRT asks for."""
        try:
            self._release()
        finally:
            del self._engine, self._runtime

    def _lend(self, worker: Worker) -> AbstractContextManager[Worker]:
        return self._pool.borrow(worker)

    def _opened(self, trt: Any) -> Opened:
        engine = self._engine
        names: Sequence[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        types = {name: data_type_name(engine.get_tensor_dtype(name)) for name in names}
        if any(engine.get_tensor_location(name) == trt.TensorLocation.HOST for name in names):
            raise self._rejected("it reads a shape from host memory, which this runner does not provide")
        for name, dtype in types.items():
            if dtype not in ITEM_SIZES:
                raise EngineError(
                    f"{name!r} of the engine is of type {dtype}, which no array here has",
                    expected=f"inputs and outputs in {', '.join(ITEM_SIZES)}",
                    fix="leave the cast to and from it inside the graph, and build again",
                )
        inputs = {name: types[name] for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        outputs = {name: types[name] for name in names if name not in inputs}
        return Opened(engine, inputs, outputs, last_errors, self._rebuild)

    def _interface_type(self, name: str) -> np.dtype[Any]:
        dtype = self._outputs[name]
        if dtype == "bfloat16":
            raise EngineError(
                f"output {name!r} is bfloat16, which __cuda_array_interface__ does not have",
                expected="torch, whose tensors have it, or another type",
                fix="import torch before the engine runs, or call run, which returns NumPy arrays",
            )
        return np.dtype(dtype)

    def _rejected(self, why: str) -> EngineError:
        return EngineError(
            f"TensorRT rejects the engine: {why}; {last_errors()}",
            expected="an engine built for this GPU by this version",
            fix=f"build it again here: {self._rebuild}",
        )


def _closed() -> EngineError:
    return EngineError(
        "the engine of this prepared run is closed", expected="an open runner", fix="load the engine again"
    )


def _release(pool: Pool[Worker]) -> None:
    with ExitStack() as rest:
        for worker in pool.close():
            rest.callback(worker.close)


def _from_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """An output as it came from the GPU in the type that NumPy has for it."""
    if dtype != "bfloat16":
        return array
    try:
        return array.view(numpy_dtype(dtype))
    except MissingDependencyError:
        return (array.astype(np.uint32) << 16).view(np.float32)


def _address_of(name: str, view: DeviceView, shape: tuple[int, ...]) -> int:
    if view.form.shape != shape:
        raise EngineError(
            f"output {name!r} goes into an array {list(view.form.shape)}",
            expected=f"the shape {list(shape)}, which these inputs give",
            fix="allocate it with that shape, or leave it out",
        )
    return view.form.pointer
