"""Load an engine and run it: verified before it is opened, inputs checked before every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np

from ..errors import EngineError
from .entry import ONNX_FILE, Engine, open_entry, verified_bytes
from .fit import obstacle
from .layer_times import EngineTimes, Floors, layer_times
from .pool import Gate
from .tensors import Feeds, TensorSpec, check_batch, check_feeds, check_outputs, placed_form, sample_feeds

if TYPE_CHECKING:
    from .cuda.arrays import DeviceView


class Session(Protocol):
    """What a runtime offers, to any thread: run, into the arrays of ``out`` where it has them, prepare, close."""

    def run(self, feeds: Feeds, out: Feeds) -> dict[str, np.ndarray]: ...
    def prepare(self, feeds: Feeds) -> Callable[[], None]: ...
    def close(self) -> None: ...


class GpuSession(Session, Protocol):
    """What a runtime on a GPU offers besides: runs on arrays that are there, ordered to the caller's stream."""

    def run_on_gpu(
        self, feeds: Mapping[str, DeviceView], out: Mapping[str, DeviceView], stream: int
    ) -> dict[str, Any]: ...


class Runner:
    """A loaded engine, for any number of threads. Use as a context manager, or call :meth:`close`.

    Attributes:
        inputs, outputs: names, types and shapes.
        manifest: the engine's verified manifest.
    """

    def __init__(self, engine: Engine, session: Session) -> None:
        self.manifest: dict[str, Any] = engine.manifest
        self.inputs: tuple[TensorSpec, ...] = engine.inputs
        self.outputs: tuple[TensorSpec, ...] = engine.outputs
        self._batch_range = engine.batch_range
        self._ranges = {name: (extents["min"], extents["max"]) for name, extents in engine.axes.items()}
        self._extents = {name: extents["opt"] for name, extents in engine.axes.items()}
        self._folder, self._engine = engine.folder, engine
        self._on_gpu = engine.target.on_gpu
        self._session = session
        self._gate = Gate(self._closed)

    def run(self, feeds: Feeds, out: Feeds | None = None) -> dict[str, np.ndarray]:
        """Run once, from NumPy arrays to NumPy arrays.

        Args:
            feeds: one C-contiguous array per input, of exactly its type and shape. On the CPU they are read where they
                are, on a GPU copied there.
            out: arrays that take outputs, by name, where new ones are not wanted; ONNX Runtime computes right into
                them.

        Returns:
            One array per output; those of ``out`` themselves.

        Raises:
            EngineError: feeds or arrays the engine does not accept, or a failed run.
        """
        with self._gate:
            check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
            if out is not None:
                forms = {spec.name: placed_form(spec.name, feeds[spec.name], spec) for spec in self.inputs}
                check_outputs(out, self.outputs, forms, self.inputs)
            return self._session.run(feeds, out or {})

    def run_on_gpu(self, feeds: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run once on arrays that are on the GPU, without copies; for engines on a GPU.

        Where torch is imported the results are torch tensors, and the call is like one of torch's own: queued, and
        ordered to the current stream. Otherwise they are :class:`deploy_sparse.engine.cuda.arrays.DeviceArray`, for
        anything that reads ``__cuda_array_interface__``, and complete when the call returns.

        Args:
            feeds: one C-contiguous array per input: a torch CUDA tensor, or one with ``__cuda_array_interface__`` or
                ``__dlpack__``.
            out: arrays of these kinds that take outputs, by name, where new ones are not wanted.

        Returns:
            One array per output; those of ``out`` themselves.

        Raises:
            EngineError: an engine that runs on the CPU, arrays it does not accept, or a failed run.
        """
        with self._gate:
            if not self._on_gpu:
                raise EngineError(
                    f"{self._folder} runs on the CPU",
                    expected="an engine of a target for a GPU",
                    fix="call run, which takes NumPy arrays",
                )
            from .cuda.arrays import callers_stream, device_views

            stream = callers_stream()
            views = device_views(feeds, stream)
            check_feeds(views, self.inputs, self._batch_range, self._ranges, form=_form_of_view)
            outputs = device_views({} if out is None else out, stream)
            forms = {name: view.form for name, view in views.items()}
            check_outputs(outputs, self.outputs, forms, self.inputs, form=_form_of_view)
            return cast(GpuSession, self._session).run_on_gpu(views, outputs, stream)

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """A zero-argument closure that runs the engine once on ``feeds``, for timing; checks are done here, not in it.

        On the CPU input and output buffers are bound beforehand. On a GPU inputs are already there, and the closure
        returns when the result is: no transfers are in it. That of a TensorRT engine has a method ``gpu_ms()``: one run
        by the GPU's own clock.

        Raises:
            EngineError: feeds the engine does not accept.
        """
        with self._gate:
            check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
            return self._session.prepare(feeds)

    def layer_times(
        self,
        feeds: Feeds,
        *,
        warmup_ms: float = 200.0,
        duration_s: float = 1.0,
        poll: Callable[[], None] = lambda: None,
    ) -> EngineTimes:
        """How long each layer takes, by the runtime's own profiler, and a whole run with it and without.

        ONNX Runtime opens the graph a second time for it, TensorRT another execution context.

        Args:
            feeds: as of :meth:`run`.
            warmup_ms, duration_s: untimed and timed, for the profile; half of each without the profiler, before and
                after it.
            poll: called between runs; what it raises ends the profile.

        Raises:
            EngineError: feeds the engine does not accept, a runtime without times of layers, or a failed run.
        """
        with self._gate:
            check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
            return layer_times(self._engine, self._session, feeds, Floors(warmup_ms, duration_s, poll))

    def sample_inputs(self, batch: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Seeded inputs of one batch size (the engine's smallest by default); equal seeds give equal inputs.

        Other dynamic axes have the extents that the engine is tuned for.

        Raises:
            EngineError: a batch outside the engine's range, or a seed that is none.
        """
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise EngineError(f"seed is {seed!r}", expected="a whole number from 0", fix="leave it out for 0")
        rows = self._batch_range[0] if batch is None else batch
        if any(spec.batched for spec in self.inputs):
            check_batch(rows, self._batch_range)
        return sample_feeds(self.inputs, rows, seed, self._extents)

    def close(self) -> None:
        """Wait for running calls and release the engine; later calls are refused, closing twice is fine.

        Raises:
            EngineError: called from inside a run of the same thread.
        """
        if self._gate.close():
            self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _closed(self) -> EngineError:
        return EngineError(
            f"the runner of {self._folder} is closed",
            expected="an open runner",
            fix="load the engine again, or run it inside the with block",
        )


def load_engine(
    path: str | Path | Engine, *, allow_host_code: bool = False, contexts: int = 1, cuda_graph: bool = False
) -> Runner:
    """Verify an engine entry and open it.

    Args:
        path: the entry's folder, a file in it, or an :class:`Engine`.
        allow_host_code: let TensorRT run the host code in an engine, which only engines of a target with
            ``version_compatible`` hold. That is a program on this machine's CPU: say yes to engines that you trust.
        contexts: how many calls run at a time on an engine of TensorRT; each context takes GPU memory for activations.
            ONNX Runtime runs any number of calls at a time, torch one after another.
        cuda_graph: replay runs as CUDA graphs, which saves the launches of their kernels; for engines on a GPU. With
            TensorRT those from NumPy arrays and prepared ones, one graph for each set of shapes; with torch prepared
            ones, as the target's key of this name does.

    Raises:
        ArtifactError: missing, truncated or altered; nothing of it was run.
        EngineError: no path or engine; or built for another machine or by another TensorRT, and the message holds the
            rebuild command; or no GPU memory for it.
        MissingDependencyError: no library that manages GPU memory.
    """
    if not isinstance(path, str | Path | Engine):
        raise EngineError(
            f"a {type(path).__name__} was given",
            expected="the folder of an engine, or what build_engine returned",
            fix="build one first: deploy_sparse.build_engine(…)",
        )
    if not isinstance(contexts, int) or isinstance(contexts, bool) or contexts < 1:
        raise EngineError(f"contexts is {contexts!r}", expected="a number from 1", fix="leave it out for one")
    engine = open_entry(path.folder if isinstance(path, Engine) else path)
    if cuda_graph and not engine.target.on_gpu:
        raise EngineError(
            f"cuda_graph was asked for, and {engine.folder} runs on the CPU",
            expected="an engine of a target for a GPU",
            fix="leave cuda_graph out",
        )
    if engine.target.runtime == "torch":
        return Runner(engine, _torch_session(engine, cuda_graph))
    if engine.target.runtime == "torch-tensorrt":
        return Runner(engine, _torch_trt_session(engine, cuda_graph))
    if engine.target.on_gpu:
        return Runner(engine, _gpu_session(engine, allow_host_code, contexts, cuda_graph))
    from .onnx.runtime import OrtSession

    folder = engine.folder if engine.weights else None
    return Runner(engine, OrtSession(_engine_bytes(engine), engine.target.threads, folder=folder))


def _form_of_view(_: str, view: DeviceView, __: TensorSpec) -> Any:
    return view.form


def _gpu_session(engine: Engine, allow_host_code: bool, contexts: int, cuda_graph: bool) -> Session:
    found = obstacle(engine.manifest)
    if found is not None:
        where = ", ".join(engine.manifest["compute_capabilities"]) or "the portable set of GPUs"
        runtime = engine.manifest["runtime"]
        raise EngineError(
            f"{engine.folder} was compiled for {where} by {runtime['name']} {runtime['version']}; here: {found.reason}",
            expected=found.expected,
            fix=f"{found.fix}: {engine.build_command(found.target)}" if found.target else found.fix,
        )
    if engine.target.version_compatible and not allow_host_code:
        raise EngineError(
            f"{engine.folder} holds host code: TensorRT's lean runtime, as its target is version_compatible",
            expected="an engine without host code, or leave to run it",
            fix="if you trust where it comes from: load_engine(path, allow_host_code=True)",
        )
    from .trt.session import TrtSession

    weights = verified_bytes(engine, engine.folder / ONNX_FILE, during="loaded") if engine.target.strip else None
    return TrtSession(
        _engine_bytes(engine),
        engine.target.runtime,
        engine.build_command(),
        allow_host_code=allow_host_code and engine.target.version_compatible,
        weights=weights,
        contexts=contexts,
        cuda_graph=cuda_graph,
        graph_path=engine.folder / ONNX_FILE if engine.weights else None,
    )


def _torch_trt_session(engine: Engine, cuda_graph: bool) -> Session:
    if (found := obstacle(engine.manifest)) is not None:
        runtime = engine.manifest["runtime"]
        raise EngineError(
            f"{engine.folder} was compiled by {runtime['name']} {runtime['version']}; here: {found.reason}",
            expected=found.expected,
            fix=f"{found.fix}: {engine.build_command(found.target)}" if found.target else found.fix,
        )
    from .torch_trt.session import TorchTrtSession

    names = [spec.name for spec in engine.inputs], [spec.name for spec in engine.outputs]
    target = engine.target.model_copy(update={"cuda_graph": True}) if cuda_graph else engine.target
    where, rebuild = str(engine.path), engine.build_command()
    return TorchTrtSession(_engine_bytes(engine), target, *names, where=where, rebuild=rebuild)


def _torch_session(engine: Engine, cuda_graph: bool) -> Session:
    if (found := obstacle(engine.manifest)) is not None:
        kind = "for a GPU" if found.reason == "no NVIDIA GPU" else f"by torch {engine.manifest['runtime']['version']}"
        raise EngineError(
            f"{engine.folder} is a torch engine {kind}; here: {found.reason}",
            expected=found.expected,
            fix=f"{found.fix}: {engine.build_command(found.target)}" if found.target else found.fix,
        )
    from .pytorch.session import TorchSession

    names = [spec.name for spec in engine.inputs], [spec.name for spec in engine.outputs]
    data = _engine_bytes(engine)
    target = engine.target.model_copy(update={"cuda_graph": True}) if cuda_graph else engine.target
    return TorchSession(data, target, *names, where=str(engine.path), rebuild=engine.build_command())


def _engine_bytes(engine: Engine) -> bytes:
    return verified_bytes(engine, engine.path, during="loaded")
