"""Progress for people: a live bar on a terminal, calm plain lines anywhere else. Standard output is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

PLAIN_INTERVAL_S = 5.0


class Console:
    """Writes to ``stream`` (standard error by default); ``quiet`` silences everything but warnings."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.live = self.stream.isatty() and not quiet

    def say(self, text: str) -> None:
        """One line of news."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """One line that must be seen."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        with suppress(BrokenPipeError):  # a reader that left must not stop the work
            print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Progress over ``total`` units of work."""
        if not self.live:
            yield PlainTask(self, title, total)
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=RichConsole(file=self.stream), transient=True) as bar:
            number = bar.add_task(title, total=total, note="")
            yield LiveTask(lambda done, note: bar.update(number, completed=done, note=note))
        self.say(title)


class Silence(Console):
    """Says nothing at all: for the processes of a distributed run that are not its first."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def _print(self, text: str) -> None:
        pass


class Task:
    """A running piece of work."""

    def advance(self, done: int, note: str = "") -> None:
        """``done`` of the total units are finished; ``note`` says something about the last one."""


class LiveTask(Task):
    """Moves a bar."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self.update = update

    def advance(self, done: int, note: str = "") -> None:
        self.update(done, note)


class PlainTask(Task):
    """Prints the first and last unit, and one in between every few seconds."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console, self.title, self.total = console, title, total
        self.spoke = float("-inf")

    def advance(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done == self.total or now - self.spoke >= PLAIN_INTERVAL_S:
            self.spoke = now
            self.console.say(f"{self.title}: {done}/{self.total} {note}".rstrip())
