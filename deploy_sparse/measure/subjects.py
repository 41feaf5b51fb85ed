"""What can be measured, and the checks that come before any clock is started.

A subject is an engine (anything that answers :class:`EngineLike`), an opened one (:class:`RunnerLike`, which stays
open), or a callable without arguments that returns when its work is done. Nothing here knows how an engine was built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..errors import ConfigError, EngineError, nearest
from .record import GPU_RUNTIMES

Feeds = Mapping[str, np.ndarray]

_EXPECTED = "an engine, an opened engine, or a callable without arguments"


class RunnerLike(Protocol):
    """An opened engine. Arrays are [batch, …] by name; ``prepare`` gives a call that returns when its work is done.

    A prepared call may have a method ``gpu_ms()``: one run in ms on the GPU's own clock.
    """

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    def sample_inputs(self, batch: int, /) -> Feeds: ...
    def prepare(self, feeds: Feeds, /) -> Callable[[], object]: ...
    def run(self, feeds: Feeds, /) -> Feeds: ...


class EngineLike(Protocol):
    """A built engine: ``runnable`` gives None where it can run, else the reason why it cannot."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    def runnable(self) -> str | None: ...
    def open(self) -> AbstractContextManager[RunnerLike]: ...


Subject = EngineLike | RunnerLike | Callable[[], object]


@dataclass(frozen=True)
class _PlainCall:
    """A callable as a runner; it takes no feeds and has no outputs to check."""

    call: Callable[[], object]
    manifest: Mapping[str, Any]

    def sample_inputs(self, batch: int, /) -> Feeds:
        return {}

    def prepare(self, feeds: Feeds, /) -> Callable[[], object]:
        return self.call

    def run(self, feeds: Feeds, /) -> Feeds:
        self.call()
        return {}


@dataclass(frozen=True)
class _Opened:
    """A runner as an engine that can run; whoever opened the runner closes it."""

    runner: RunnerLike

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.runner.manifest

    def runnable(self) -> None:
        return None

    def open(self) -> AbstractContextManager[RunnerLike]:
        return nullcontext(self.runner)


def checked_engines(subjects: Mapping[str, Subject], baseline: str) -> dict[str, EngineLike]:
    """Every subject as an engine.

    Raises:
        ConfigError: no subject, something that is no engine, runner or callable, an unknown baseline, several targets.
    """
    if not isinstance(subjects, Mapping):
        raise ConfigError(
            f"the subjects are a {type(subjects).__name__}",
            expected="a dictionary from name to engine",
            fix='name them, for example {"dense": engine, "ticket": other}',
        )
    if not subjects:
        raise ConfigError(
            "no subject to profile", expected="at least one engine or callable by name", fix='add {"dense": engine}'
        )
    engines = {name: _as_engine(name, subject) for name, subject in subjects.items()}
    check_known(baseline, tuple(subjects), "baseline")
    targets = {name: target_of(engine.manifest) for name, engine in engines.items()}
    if any(target != targets[baseline] for target in targets.values()):
        listed = ", ".join(f"{name} for {target['name']}" for name, target in targets.items())
        raise ConfigError(
            f"the subjects were built for different targets: {listed}",
            expected="one target in one profile, with the same options",
            fix="measure the engines of each target in a run of their own",
        )
    return engines


def check_known(name: str, known: Sequence[str], what: str) -> None:
    """Raise a :class:`ConfigError` with a hint unless ``name`` is one of the subjects."""
    if name not in known:
        raise ConfigError(
            f"unknown {what} {name!r}",
            expected=f"one of the subjects: {', '.join(known)}",
            fix=f"{nearest(str(name), list(known))}name one of them",
        )


def checked_batches(batches: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes, or a :class:`ConfigError` unless they are distinct positive whole numbers, at least one."""
    given = tuple(batches) if isinstance(batches, Iterable) else (batches,)
    whole = all(isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1 for batch in given)
    if not isinstance(batches, Iterable) or not given or not whole or len(set(given)) != len(given):
        listed = ", ".join(map(repr, given)) if isinstance(batches, Iterable) else f"the one value {batches!r}"
        raise ConfigError(
            f"the batch sizes are {listed or 'none'}",
            expected="a list of batch sizes, each a whole number from 1 on, none twice",
            fix="give for example 1 and 8, or a list of one",
        )
    return given


def target_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The target that a manifest names, with at least its ``name`` and ``runtime``."""
    target = manifest.get("target", {"name": "this process", "runtime": "python"})
    found = dict(target) if isinstance(target, Mapping) else {"name": str(target)}
    return {"name": "unnamed", "runtime": "unknown", **found}


def on_gpu(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest's target is an NVIDIA GPU."""
    target = target_of(manifest)
    return target.get("device") == "cuda" or str(target["runtime"]) in GPU_RUNTIMES


def is_open(engine: EngineLike) -> bool:
    """Whether a subject was opened by somebody else, who knows how."""
    return isinstance(engine, _Opened)


def is_plain(engine: EngineLike) -> bool:
    """Whether a subject is a callable, of which nothing more is known."""
    return isinstance(engine, _Opened) and isinstance(engine.runner, _PlainCall)


def checked_feeds(runners: Mapping[str, RunnerLike], reference: str, batch: int) -> Feeds:
    """Inputs for all runners, after each has run on them once.

    Args:
        runners: opened engines by name.
        reference: the one whose sample inputs everybody gets and whose output shapes everybody must have.
        batch: the batch size; an engine that does not accept it says so itself.

    Raises:
        EngineError: outputs that are not finite, or of other names or shapes than the reference's.
    """
    feeds = runners[reference].sample_inputs(batch)
    outputs = {name: runner.run(feeds) for name, runner in runners.items()}
    expected = _shapes(outputs[reference])
    for name, output in outputs.items():
        if _shapes(output) != expected:
            raise EngineError(
                f"{name!r} at batch {batch} gives {_shapes(output)}",
                expected=f"the outputs of {reference!r}: {expected}",
                fix="compare engines that compute the same outputs",
            )
        for key, array in output.items():
            values = np.asarray(array)
            if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
                raise EngineError(
                    f"output {key!r} of {name!r} at batch {batch} holds NaN or infinity",
                    expected="finite outputs; a time of a broken engine means nothing",
                    fix=f"verify {name!r} before timing it",
                )
    return feeds


def _shapes(outputs: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(array)) for name, array in outputs.items()}


def _as_engine(name: str, subject: Any) -> EngineLike:
    if all(hasattr(subject, attribute) for attribute in ("manifest", "runnable", "open")):
        return cast(EngineLike, subject)
    if all(hasattr(subject, attribute) for attribute in ("manifest", "sample_inputs", "prepare", "run")):
        return _Opened(subject)
    if isinstance(subject, str | Path):
        raise ConfigError(
            f"subject {name!r} is the path {str(subject)!r}",
            expected=_EXPECTED,
            fix=f"load the engine first: deploy_sparse.load_engine({str(subject)!r}), or open_entry of "
            "deploy_sparse.engine.entry; from an ONNX file build one: deploy_sparse.build_engine",
        )
    if not callable(subject) or not _needs_no_argument(subject):
        what = "takes arguments" if callable(subject) else "cannot be called"
        raise ConfigError(
            f"subject {name!r} is of type {type(subject).__name__}, which is no engine and {what}",
            expected=_EXPECTED,
            fix="build an engine from it first: deploy_sparse.build_engine(…); or, to time the call itself, "
            f"pass lambda: {name}(inputs)",
        )
    return _Opened(_PlainCall(subject, {}))


def _needs_no_argument(call: Callable[..., object]) -> bool:
    """Whether ``call()`` is a valid call; a module says what it needs in ``forward`` alone."""
    try:
        signature = inspect.signature(getattr(call, "forward", call))
    except (TypeError, ValueError):  # some built-in functions keep theirs to themselves
        return True
    try:
        signature.bind()
    except TypeError:
        return False
    return True
