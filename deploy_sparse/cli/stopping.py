"""SIGTERM and SIGHUP end a command as Ctrl-C does: whatever it had begun is cleaned up on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _Ended(BaseException):
    """No Exception, as code that turns those of a library into messages must let it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP unwind the stack, so that temporary files and folders are removed.

    The first one counts; further ones do not disturb the removal. A signal with a handler stays as it is, and so does
    one that is ignored, as SIGHUP is under nohup.

    Raises:
        Interrupted: one came.
    """
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # only there handlers can be set
        taken = []

    def end(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    try:
        for number in taken:
            signal.signal(number, end)
        yield
    except _Ended as ended:
        name = signal.Signals(ended.number).name
        given = f"stopped by {name}: what was under way is removed"
        raise Interrupted(given, signal_number=ended.number, fix="start it again") from None
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
