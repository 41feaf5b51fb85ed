"""SIGINT and SIGTERM: the first asks the run to stop at the next safe point, the second stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from ..errors import Interrupted


class Interrupts:
    """While entered, turns the first signal into :class:`Interrupted` at the next :meth:`poll`.

    A second signal acts at once, which loses nothing either: every artifact appears whole or not at all.

    Args:
        resume: the command that continues, for the message.
        grace_s: a further signal this soon after the first is the same one: torchrun passes on what the terminal
            has sent to all processes already.
    """

    def __init__(self, resume: str, *, grace_s: float = 0.0) -> None:
        self.resume = resume
        self.grace_s = grace_s
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def poll(self, saved: str = "everything finished so far is saved") -> None:
        """Raise :class:`Interrupted` if a signal came; ``saved`` says what is on disk."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Interrupted(f"stopped by {name}: {saved}", signal_number=self.received, fix=self.resume)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at >= self.grace_s:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
