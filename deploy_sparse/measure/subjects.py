"""What can be measured, and the checks that come before any clock is started.

A subject is anything that answers :class:`EngineLike`, or a callable without arguments that returns when its work is
done. Nothing here knows how an engine was built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np

from ..errors import ConfigError, EngineError, nearest

Feeds = Mapping[str, np.ndarray]


class RunnerLike(Protocol):
    """An opened engine. Arrays are [batch, …] by name; ``prepare`` gives a call that returns when its work is done."""

    def __enter__(self) -> RunnerLike: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...
    def sample_inputs(self, batch: int, /) -> Feeds: ...
    def prepare(self, feeds: Feeds, /) -> Callable[[], object]: ...
    def run(self, feeds: Feeds, /) -> Feeds: ...


class EngineLike(Protocol):
    """A built engine: ``runnable`` gives None where it can run, else the reason why it cannot."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    def runnable(self) -> str | None: ...
    def open(self) -> RunnerLike: ...


Subject = EngineLike | Callable[[], object]


@dataclass(frozen=True)
class _PlainCall:
    """A callable that answers as an engine and as its own runner; it takes no feeds and has no outputs to check."""

    call: Callable[[], object]
    manifest: Mapping[str, Any]

    def runnable(self) -> None:
        return None

    def open(self) -> RunnerLike:
        return self

    def __enter__(self) -> RunnerLike:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def sample_inputs(self, batch: int, /) -> Feeds:
        return {}

    def prepare(self, feeds: Feeds, /) -> Callable[[], object]:
        return self.call

    def run(self, feeds: Feeds, /) -> Feeds:
        self.call()
        return {}


def checked_engines(subjects: Mapping[str, Subject], baseline: str) -> dict[str, EngineLike]:
    """Every subject as an engine.

    Raises:
        ConfigError: no subject, something that is neither engine nor callable, an unknown baseline, several targets.
    """
    if not subjects:
        raise ConfigError(
            "no subject to profile", expected="at least one engine or callable by name", fix='add {"dense": engine}'
        )
    check_known(baseline, tuple(subjects), "baseline")
    engines = {name: _as_engine(name, subject) for name, subject in subjects.items()}
    targets = {name: target_of(engine.manifest) for name, engine in engines.items()}
    if any(target != targets[baseline] for target in targets.values()):
        listed = ", ".join(f"{name} for {target['name']}" for name, target in targets.items())
        raise ConfigError(
            f"the subjects were built for different targets: {listed}",
            expected="one target in one profile, with the same options",
            fix="call profile() once for each target",
        )
    return engines


def check_known(name: str, known: Sequence[str], what: str) -> None:
    """Raise a :class:`ConfigError` with a hint unless ``name`` is one of the subjects."""
    if name not in known:
        raise ConfigError(
            f"unknown {what} {name!r}",
            expected=f"one of the subjects: {', '.join(known)}",
            fix=f"{nearest(name, list(known))}name one of them",
        )


def check_batches(batches: Sequence[int]) -> None:
    """Raise a :class:`ConfigError` unless ``batches`` are distinct positive whole numbers, at least one."""
    whole = all(isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1 for batch in batches)
    if not batches or not whole or len(set(batches)) != len(batches):
        raise ConfigError(
            f"batches are {tuple(batches)!r}",
            expected="at least one batch size, each a whole number from 1 on, none twice",
            fix="give for example batches=(1, 8)",
        )


def target_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The target that a manifest names, with at least its ``name`` and ``runtime``."""
    target = manifest.get("target", {"name": "this process", "runtime": "python"})
    found = dict(target) if isinstance(target, Mapping) else {"name": str(target)}
    return {"name": "unnamed", "runtime": "unknown", **found}


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


def _as_engine(name: str, subject: Subject) -> EngineLike:
    if all(hasattr(subject, attribute) for attribute in ("manifest", "runnable", "open")):
        return cast(EngineLike, subject)
    if callable(subject):
        return _PlainCall(subject, {})
    raise ConfigError(
        f"subject {name!r} is of type {type(subject).__name__}",
        expected="an engine, or a callable without arguments",
        fix=f"build an engine from it first: build_engine({name}, …)",
    )
