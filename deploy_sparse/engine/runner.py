"""Load an engine and run it: verified before it is opened, inputs checked before every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from ..artifact import sha256_bytes
from ..errors import ArtifactError, EngineError
from .entry import ONNX_FILE, Engine, open_entry
from .fit import obstacle
from .tensors import Feeds, TensorSpec, check_feeds, sample_feeds


class Session(Protocol):
    """What a runtime offers: run, prepare, close."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]: ...
    def prepare(self, feeds: Feeds) -> Callable[[], None]: ...
    def close(self) -> None: ...


class Runner:
    """A loaded engine. Use as a context manager, or call :meth:`close`.

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
        self._folder = engine.folder
        self._session: Session | None = session

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: one C-contiguous array per input, of exactly its type and shape.

        Returns:
            One array per output.

        Raises:
            EngineError: feeds the engine does not accept, or a failed run.
        """
        session = self._open_session()
        check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
        return session.run(feeds)

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """A zero-argument closure that runs the engine once on ``feeds``, for timing; checks are done here, not in it.

        On the CPU input and output buffers are bound beforehand. On a GPU inputs are already there, and the closure
        returns when the result is: no transfers are in it.

        Raises:
            EngineError: feeds the engine does not accept.
        """
        session = self._open_session()
        check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
        return session.prepare(feeds)

    def sample_inputs(self, batch: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Seeded inputs of one batch size (the engine's smallest by default); equal seeds give equal inputs.

        Other dynamic axes have the extents that the engine is tuned for.

        Raises:
            EngineError: a batch outside the engine's range.
        """
        feeds = sample_feeds(self.inputs, self._batch_range[0] if batch is None else batch, seed, self._extents)
        check_feeds(feeds, self.inputs, self._batch_range, self._ranges)
        return feeds

    def close(self) -> None:
        """Release the engine; closing twice is fine."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_session(self) -> Session:
        if self._session is None:
            raise EngineError(
                f"the runner of {self._folder} is closed",
                expected="an open runner",
                fix="load the engine again, or run it inside the with block",
            )
        return self._session


def load_engine(path: str | Path | Engine, *, allow_host_code: bool = False) -> Runner:
    """Verify an engine entry and open it.

    Args:
        path: the entry's folder, a file in it, or an :class:`Engine`.
        allow_host_code: let TensorRT run the host code in an engine, which only engines of a target with
            ``version_compatible`` hold. That is a program on this machine's CPU: say yes to engines that you trust.

    Raises:
        ArtifactError: missing, truncated or altered; nothing of it was run.
        EngineError: no path or engine; or built for another machine or by another TensorRT, and the message holds the
            rebuild command.
    """
    if not isinstance(path, str | Path | Engine):
        raise EngineError(
            f"a {type(path).__name__} was given",
            expected="the folder of an engine, or what build_engine returned",
            fix="build one first: deploy_sparse.build_engine(…)",
        )
    engine = open_entry(path.folder if isinstance(path, Engine) else path)
    if engine.target.runtime == "torch":
        return Runner(engine, _torch_session(engine))
    if engine.target.on_gpu:
        return Runner(engine, _gpu_session(engine, allow_host_code))
    from ._ort import OrtSession

    return Runner(engine, OrtSession(_engine_bytes(engine), engine.target.threads))


def _gpu_session(engine: Engine, allow_host_code: bool) -> Session:
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
    from ._trt_session import TrtSession

    weights = _verified(engine, engine.folder / ONNX_FILE) if engine.target.strip else None
    return TrtSession(
        _engine_bytes(engine),
        engine.target.runtime,
        engine.build_command(),
        allow_host_code=allow_host_code and engine.target.version_compatible,
        weights=weights,
    )


def _torch_session(engine: Engine) -> Session:
    if (found := obstacle(engine.manifest)) is not None:
        kind = "for a GPU" if found.reason == "no NVIDIA GPU" else f"by torch {engine.manifest['runtime']['version']}"
        raise EngineError(
            f"{engine.folder} is a torch engine {kind}; here: {found.reason}",
            expected=found.expected,
            fix=f"{found.fix}: {engine.build_command(found.target)}",
        )
    from ._torch_session import TorchSession

    names = [spec.name for spec in engine.inputs], [spec.name for spec in engine.outputs]
    data = _engine_bytes(engine)
    return TorchSession(data, engine.target, *names, where=str(engine.path), rebuild=engine.build_command())


def _engine_bytes(engine: Engine) -> bytes:
    return _verified(engine, engine.path)


def _verified(engine: Engine, path: Path) -> bytes:
    """The very bytes that were verified: hashed after reading, so that a file swapped in between is not run."""
    data = path.read_bytes()
    if sha256_bytes(data) != engine.manifest["files"][path.name]["sha256"]:
        raise ArtifactError(
            f"{path} changed while it was being loaded",
            expected="a file nobody else writes",
            fix=f"build it again: {engine.build_command()}",
        )
    return data
