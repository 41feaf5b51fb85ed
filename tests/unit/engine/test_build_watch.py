"""Watching a build: what it reports, when it stops it, and that nothing it calls gets through C++."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_sparse.engine import watch as module
from deploy_sparse.engine.watch import Progress, Watch, progress_line
from deploy_sparse.errors import BuildError, ConfigError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nested_phases_share_their_step(clock: Clock) -> None:
    seen: list[Progress] = []
    watch = Watch(seen.append, clock=clock)
    watch.begin("all", None, 2)
    watch.begin("first half", "all", 4)
    for index in range(4):
        assert watch.step("first half", index)
    watch.end("first half")
    watch.step("all", 0)
    watch.begin("second half", "all", 2)
    watch.begin("a detail", "second half", 2)
    watch.step("a detail", 0)
    assert [(p.what, p.fraction) for p in seen] == [
        ("all", 0),
        ("first half", 0),
        ("first half", 1 / 8),
        ("first half", 2 / 8),
        ("first half", 3 / 8),
        ("first half", 4 / 8),
        ("all", 4 / 8),
        ("all", 4 / 8),
        ("second half", 4 / 8),
        ("a detail", 4 / 8),
        ("a detail", 4 / 8 + 1 / 8),
    ]
    watch.finish()
    assert seen[-1].fraction == 1.0


def test_time_left_is_told_once_something_is_known(clock: Clock) -> None:
    seen: list[Progress] = []
    watch = Watch(seen.append, clock=clock)
    clock.now += 50  # an export, which tells nothing of the compilation
    watch.begin("all", None, 100)
    clock.now += 9
    watch.step("all", 0)
    watch.step("all", 9)
    assert [(p.elapsed_s, p.left_s) for p in seen] == [(50, None), (59, pytest.approx(891)), (59, pytest.approx(81))]
    clock.now += 1
    watch.finish()
    assert (seen[-1].elapsed_s, seen[-1].left_s) == (60, 0)


def test_time_left_follows_the_speed_of_late(clock: Clock) -> None:
    seen: list[Progress] = []
    watch = Watch(seen.append, clock=clock)
    watch.begin("all", None, 100)
    for index in range(50):  # half of the steps take 0.1 s each, the others 10 s
        clock.now += 0.1
        watch.step("all", index)
    assert seen[-1].left_s == pytest.approx(5)
    for index in range(50, 60):
        clock.now += 10
        watch.step("all", index)
    assert seen[-1].left_s == pytest.approx(400)
    clock.now += 200
    watch.begin("within", "all", 1)  # nothing went on in the latter half of the time
    assert seen[-1].left_s is None


def test_progress_in_words() -> None:
    assert str(Progress("Timing", 0.419, 65.2, None)) == " 41 %  65 s  Timing"
    assert str(Progress("Timing", 1.0, 1.4, 725)) == "100 %  1 s, about 12 min 05 s left  Timing"


calls = st.lists(
    st.tuples(
        st.sampled_from("bse"), st.sampled_from("abcd"), st.sampled_from(["a", "b", "c", None]), st.integers(-1, 5)
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(calls)
def test_whatever_is_called_progress_never_falls_and_ends_at_one(events) -> None:
    seen: list[Progress] = []
    watch = Watch(seen.append)
    for kind, name, parent, number in events:
        act = {"b": lambda: watch.begin(name, parent, number), "s": lambda: watch.step(name, number)}  # noqa: B023
        assert act.get(kind, lambda: watch.end(name))()  # noqa: B023
    watch.finish()
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("kind", ["event", "function"])
def test_cancelling_stops_and_stays(kind: str) -> None:
    event = threading.Event()
    watch = Watch(cancel=event if kind == "event" else event.is_set)
    watch.begin("all", None, 3)
    watch.check()
    assert watch.step("all", 0)
    event.set()
    assert not watch.step("all", 1)
    event.clear()  # too late
    assert not watch.step("all", 2)
    for ask in (watch.check, watch.finish):
        with pytest.raises(BuildError, match="the build was cancelled"):
            ask()


def test_time_limit_counts_from_the_start(clock: Clock) -> None:
    watch = Watch(time_limit_s=2.5, clock=clock)
    clock.now += 2.4
    watch.check()
    assert watch.begin("all", None, 3)
    clock.now += 0.2
    assert not watch.step("all", 0)
    with pytest.raises(BuildError, match=r"took longer than its limit of 2\.5 s(.|\n)*raise the limit"):
        watch.check()


def test_a_build_that_is_done_is_not_thrown_away(clock: Clock) -> None:
    watch = Watch(time_limit_s=1, clock=clock)
    watch.begin("all", None, 1)
    clock.now += 5
    watch.finish()


@pytest.mark.parametrize("limit", [0, -1, float("nan"), True, "5"])
def test_bad_limits(limit: object) -> None:
    with pytest.raises(ConfigError, match="the time limit is"):
        Watch(time_limit_s=limit)


@pytest.mark.parametrize("name", ["progress", "cancel"])
def test_what_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is of type int"):
        Watch(**{name: 3})


def test_what_the_caller_raises_ends_the_build_and_reaches_the_caller() -> None:
    def fails(*_: object) -> None:
        raise KeyError("mine")

    for watch in (Watch(fails), Watch(cancel=fails)):
        assert not watch.begin("all", None, 1)
        assert not watch.end("all")
        with pytest.raises(KeyError, match="mine"):
            watch.check()


def test_signals_are_kept_until_the_end() -> None:
    watch, steps = Watch(), []
    before = signal.getsignal(signal.SIGINT)

    def compiles() -> None:
        with watch.signals_kept():
            watch.begin("all", None, 2)
            os.kill(os.getpid(), signal.SIGINT)
            steps.append(watch.step("all", 0))

    with pytest.raises(KeyboardInterrupt):
        compiles()
    assert steps == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_the_callers_own_runs_at_once() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        watch = Watch()
        with watch.signals_kept():
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        watch.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone() -> None:
    kept: list[object] = []

    def build() -> None:
        with Watch().signals_kept():
            kept.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert kept == [signal.getsignal(signal.SIGINT)]


def test_waiting_reports_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    seen: list[Progress] = []
    Watch(seen.append).wait(lambda: len(pauses) == 3, "waiting for somebody")
    assert [(p.what, p.fraction, p.left_s) for p in seen] == [("waiting for somebody", 0, None)] * 3
    with pytest.raises(BuildError, match="cancelled"):
        Watch(cancel=lambda: len(pauses) == 5).wait(lambda: False, "waiting for somebody")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    with progress_line(stream) as show:
        show(Progress("Timing of very many layers", 0.25, 3, 9))
        show(Progress("too soon after the last one", 0.26, 3, 9))
        show(Progress("compiled", 1.0, 12, 0))
    assert stream.getvalue().split("\r\x1b[2K") == [
        "",
        " 25 %  3 s, about 9 s left  T",
        "100 %  12 s, about 0 s left  ",
        "",
    ]


def test_no_line_in_a_file() -> None:
    stream = io.StringIO()
    with progress_line(stream) as show:
        assert show is None
    assert stream.getvalue() == ""


def test_costs_no_heavy_import() -> None:
    code = "import sys, deploy_sparse.engine.watch; print(*sorted({'torch', 'onnx', 'numpy', 'pydantic'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
