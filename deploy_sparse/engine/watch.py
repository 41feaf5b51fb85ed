"""Watching a build from outside: how far it is, and whether it is to stop. Imports no library."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol, TextIO

from ..errors import BuildError, ConfigError

_KNOWN_S, _KNOWN = 1.0, 0.001  # nothing is said of the time left before this much was measured
_ALMOST = 0.99
_PAUSE_S = 0.05


class Stopped(BuildError):
    """A build that was cancelled or ran over its time: nothing is wrong with what was built."""


class Flag(Protocol):
    """Something like a ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether it was set."""


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        what: the innermost step under way, in the compiler's words.
        fraction: share of the compiler's steps that are done, from 0 to 1; it never falls. Steps differ in length.
        elapsed_s: seconds since the build began.
        left_s: seconds left if the rest goes as fast as the latter half of the compilation up to now; None until that
            is known. An engine's last steps can be its longest, so this is a guess.
    """

    what: str
    fraction: float
    elapsed_s: float
    left_s: float | None

    def __str__(self) -> str:
        left = f", about {_time(self.left_s)} left" if self.left_s is not None else ""
        return f"{math.floor(100 * self.fraction):3d} %  {_time(self.elapsed_s)}{left}  {self.what}"


@dataclass
class _Phase:
    """A part of a compilation that is under way: ``done`` of ``steps`` steps, within a step of phase ``parent``."""

    parent: str | None
    steps: int
    done: int = 0


class Watch:
    """What a build reports to, and asks whether to go on. One for each build; any thread may use it.

    A time limit counts from here, so the export and waiting for others are in it. It and ``cancel`` are looked at
    between the compiler's steps: a build stops at the end of the step under way, and one that is done is not thrown
    away.

    Args:
        progress: called with a :class:`Progress` at each step; what it raises ends the build.
        time_limit_s: seconds that the build may take; None for any.
        cancel: an object with ``is_set()``, such as a ``threading.Event``, or a function; true stops the build.

    Raises:
        ConfigError: one of them is of another kind.
    """

    def __init__(
        self,
        progress: Callable[[Progress], object] | None = None,
        *,
        time_limit_s: float | None = None,
        cancel: Flag | Callable[[], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if time_limit_s is not None and (
            isinstance(time_limit_s, bool) or not isinstance(time_limit_s, int | float) or not time_limit_s > 0
        ):
            raise ConfigError(
                f"the time limit is {time_limit_s!r}", expected="seconds, more than 0", fix="leave it out for no limit"
            )
        asked: Any = getattr(cancel, "is_set", cancel)
        for name, given in (("progress", progress), ("cancel", asked)):
            if given is not None and not callable(given):
                raise ConfigError(
                    f"{name} is of type {type(given).__name__}",
                    expected="a threading.Event or a function" if name == "cancel" else "a function of one argument",
                    fix="leave it out, or pass a function",
                )
        self._asked: Callable[[], object] | None = asked
        self._progress, self._limit, self._clock = progress, time_limit_s, clock
        self._began, self._compiling = clock(), math.nan
        self._course: deque[tuple[float, float]] = deque()  # seconds of compiling, and the fraction then
        self._phases: dict[str, _Phase] = {}
        self._fraction = 0.0
        self._stop: BaseException | None = None
        self._lock = threading.RLock()

    def check(self) -> None:
        """Raise the reason to stop, if there is one.

        Raises:
            Stopped: cancelled, or over its time. Anything that ``progress`` or ``cancel`` raised; KeyboardInterrupt.
        """
        self._goes_on()
        self._raise_kept()

    def tell(self, what: str) -> None:
        """Report a step of what comes before the compilation, and raise the reason to stop, if there is one.

        Raises:
            BuildError: as :meth:`check`. Anything that ``progress`` raised.
        """
        self.check()
        self._report(what)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Ask ``ready`` until it is true, with short pauses; ``what`` is reported meanwhile.

        Raises:
            BuildError: as :meth:`check`.
        """
        while True:
            self.check()
            if ready():
                return
            self._report(what)
            time.sleep(_PAUSE_S)

    @contextmanager
    def signals_kept(self) -> Iterator[None]:
        """What a signal's handler raises in the body, such as KeyboardInterrupt, is kept, and raised at the end of it.

        Python runs handlers before the first instruction of whatever function C++ calls, where nothing can catch
        what they raise.

        Raises:
            BaseException: what was kept, or what else ended the build.
        """
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
        if threading.current_thread() is not threading.main_thread():  # only there handlers run, and can be set
            handlers = {}

        def handle(number: int, frame: FrameType | None) -> None:
            self.safely(partial(handlers[signal.Signals(number)], number, frame))

        try:
            for number in handlers:
                signal.signal(number, handle)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._raise_kept()

    # What a compiler calls. These never raise, as no exception may pass through C++: they keep it for check().

    def begin(self, what: str, parent: str | None, steps: int) -> bool:
        """Phase ``what``, of so many steps, begins within a step of phase ``parent``; whether to go on."""

        def act() -> None:
            if parent not in self._phases:
                self._compiling = self._clock() if math.isnan(self._compiling) else self._compiling
            self._phases[what] = _Phase(parent if parent in self._phases else None, max(1, steps))
            self._report(what)

        return self.safely(act)

    def step(self, what: str, index: int) -> bool:
        """Step ``index``, from 0, of phase ``what`` is done; whether to go on."""

        def act() -> None:
            if (phase := self._phases.get(what)) is not None:
                phase.done = min(phase.steps, max(phase.done, index + 1))
                self._report(what)

        return self.safely(act)

    def end(self, what: str) -> bool:
        """Phase ``what`` is over; whether to go on."""

        def act() -> None:
            if (phase := self._phases.pop(what, None)) is not None:
                self._report(phase.parent or what)

        return self.safely(act)

    def safely(self, act: Callable[[], object]) -> bool:
        """Do something without ever raising, and say whether to go on; what it raises stops the build."""
        try:
            with self._lock:
                act()
        except BaseException as problem:
            self._stop = self._stop or problem
        return self._goes_on()

    def finish(self) -> None:
        """The compilation is done: report 1.0.

        Raises:
            BuildError: it was found cancelled or over its time before. Others as :meth:`check`.
        """
        self._raise_kept()
        self._phases.clear()
        self._fraction = 1.0
        self._report("compiled")

    def _raise_kept(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _goes_on(self) -> bool:
        """Whether there is no reason to stop; once there is one, it stays."""
        if self._stop is None:
            try:
                if self._asked is not None and self._asked():
                    self._stop = Stopped(
                        "the build was cancelled",
                        expected="a build that may end",
                        fix="start it again; nothing is left",
                    )
                elif self._limit is not None and self._clock() - self._began > self._limit:
                    self._stop = Stopped(
                        f"the build took longer than its limit of {self._limit:g} s",
                        expected="a build within its time limit",
                        fix="raise the limit, or lower builder_level or the ranges of the target",
                    )
            except BaseException as problem:
                self._stop = problem
        return self._stop is None

    def _report(self, what: str) -> None:
        with self._lock:
            now = self._clock()
            self._fraction = max(self._fraction, min(_ALMOST, self._estimate()))
            if self._progress is not None:
                self._progress(Progress(what, self._fraction, now - self._began, self._left(now - self._compiling)))

    def _estimate(self) -> float:
        """Share of steps done, over nested phases."""
        shares: dict[str | None, float] = {}
        for name, phase in reversed(self._phases.items()):  # those within another began after it
            share = min(1.0, (phase.done + shares.get(name, 0.0)) / phase.steps)
            shares[phase.parent] = max(shares.get(phase.parent, 0.0), share)
        return shares.get(None, 0.0)

    def _left(self, spent: float) -> float | None:
        """Seconds left after so many of compiling (NaN before it), at the speed of the latter half of them."""
        if not spent >= 0:
            return None
        self._course.append((spent, self._fraction))
        while len(self._course) > 1 and self._course[1][0] <= spent / 2:
            self._course.popleft()
        then, before = self._course[0]
        if self._fraction == 1.0:
            return 0.0
        if spent < _KNOWN_S or self._fraction - before < _KNOWN:
            return None
        return (1 - self._fraction) * (spent - then) / (self._fraction - before)


@contextmanager
def progress_line(stream: TextIO) -> Iterator[Callable[[Progress], None] | None]:
    """A function that shows progress on one line of a terminal, which is empty again afterwards; None for a file."""
    if not stream.isatty():
        yield None
        return
    shown = -math.inf

    def show(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 2 * _PAUSE_S or progress.fraction == 1.0:
            shown = time.monotonic()
            stream.write(f"\r\x1b[2K{str(progress)[: shutil.get_terminal_size().columns - 1]}")
            stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[2K")
        stream.flush()


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"
