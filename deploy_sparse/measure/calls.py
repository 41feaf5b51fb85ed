"""How subjects are called while they are timed: with or without transfers, and with or without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

from ..errors import ConfigError, nearest
from .record_conditions import Cache, Transfers
from .subjects import EngineLike, Feeds, RunnerLike, is_open, is_plain, on_gpu, target_of


def checked_graphs(engines: Mapping[str, EngineLike], cuda_graph: bool, transfers: Transfers) -> dict[str, bool | None]:
    """Whether each engine's timed calls replay a CUDA graph; None where that is not known, or none is possible.

    Raises:
        ConfigError: graphs were asked for where there can be none, or it is not known of all whether they do.
    """
    found = {name: _graph(name, engine, cuda_graph, transfers) for name, engine in engines.items()}
    if len(set(found.values())) > 1:
        (opened, *_), (other, *_) = ([n for n in found if (found[n] is None) == unknown] for unknown in (True, False))
        raise ConfigError(
            f"{opened!r} is open already, so whether it replays CUDA graphs is not known, as it is of {other!r}",
            expected="engines that profile opens itself, or all of them opened alike",
            fix=f"give the engine of {opened!r} instead of the runner",
        )
    return found


def _graph(name: str, engine: EngineLike, asked: bool, transfers: Transfers) -> bool | None:
    target = target_of(engine.manifest)
    opened, torch = is_open(engine), str(target["runtime"]).startswith("torch")
    if not on_gpu(engine.manifest):
        if asked:
            raise ConfigError(
                f"CUDA graphs were asked for, and {name!r} does not run on a GPU",
                expected="engines of a target for a GPU",
                fix="leave CUDA graphs out",
            )
        return None
    if asked and opened:
        raise ConfigError(
            f"CUDA graphs were asked for, and {name!r} is open already",
            expected="an engine that profile opens itself",
            fix="give the engine, or open it with them: load_engine(…, cuda_graph=True)",
        )
    if torch and transfers == "included":
        if asked:
            raise ConfigError(
                f"CUDA graphs and transfers were asked for, and with {target['runtime']} {name!r} replays a graph only "
                "on inputs that are on the GPU",
                expected="CUDA graphs with transfers excluded, or transfers without CUDA graphs",
                fix="leave one of them out",
            )
        return False
    if asked or target.get("cuda_graph"):
        return True
    return None if opened else False


def open_subject(engine: EngineLike, cuda_graph: bool) -> AbstractContextManager[RunnerLike]:
    """Open an engine, with CUDA graphs where they are asked for."""
    return cast(Any, engine).open(cuda_graph=True) if cuda_graph else engine.open()


def check_transfers(engines: Mapping[str, EngineLike], transfers: Transfers) -> None:
    """Raise a :class:`ConfigError` unless ``transfers`` is known and every subject can be timed with them."""
    _check_word("transfers", transfers, get_args(Transfers))
    for name, engine in engines.items():
        if transfers == "included" and is_plain(engine):
            raise ConfigError(
                f"transfers were asked for, and {name!r} is a callable, which copies what it copies",
                expected="engines",
                fix="leave transfers out, or let the callable copy",
            )


def check_cache(engines: Mapping[str, EngineLike], cache: Cache) -> None:
    """Raise a :class:`ConfigError` unless ``cache`` is known and every subject can be timed with it."""
    _check_word("cache", cache, get_args(Cache))
    for name, engine in engines.items():
        if cache == "cold" and on_gpu(engine.manifest):
            raise ConfigError(
                f"cold caches were asked for, and {name!r} runs on a GPU",
                expected="engines that run on the CPU: its caches are what can be evicted",
                fix="measure with warm caches",
            )


def _check_word(name: str, given: object, words: Sequence[str]) -> None:
    if given not in words:
        raise ConfigError(
            f"{name} = {given!r}",
            expected=f"one of {', '.join(words)}",
            fix=f"{nearest(str(given), list(words))}choose one",
        )


@dataclass(frozen=True)
class TimedCall:
    """What is timed of a subject: on the host's clock, and where there is one on the device's, in ms."""

    call: Callable[[], object]
    device_ms: Callable[[], float] | None


def timed_call(runner: RunnerLike, feeds: Feeds, transfers: Transfers) -> TimedCall:
    """The call to time, from inputs that are in place or with the copies there and back.

    The device's clock is read on inputs that are in place either way: beside a call with transfers it says what the
    computation alone took.
    """
    prepared = runner.prepare(feeds)
    call = prepared if transfers == "excluded" else partial(runner.run, feeds)
    return TimedCall(call, getattr(prepared, "gpu_ms", None))
