"""Who may use what, and until when: runs in progress are counted, contexts are lent to one run each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

from ..errors import EngineError

T = TypeVar("T")


class Gate:
    """Lets calls in (``with gate``) until it is closed; closing waits for those that are inside.

    Args:
        closed: makes the error of calls that come too late.
    """

    def __init__(self, closed: Callable[[], EngineError]) -> None:
        self._closed_error = closed
        self._condition = threading.Condition()
        self._inside: list[int] = []  # identities of threads
        self._open, self._emptied = True, False

    def __enter__(self) -> None:
        with self._condition:
            if not self._open:
                raise self._closed_error()
            self._inside.append(threading.get_ident())

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._inside.remove(threading.get_ident())
            if not self._open:
                self._condition.notify_all()

    def close(self) -> bool:
        """Turn later calls away and wait for those inside; False when somebody else has closed it.

        Raises:
            EngineError: this thread is inside itself, as a signal handler can be; waiting would never end.
        """
        with self._condition:
            if threading.get_ident() in self._inside:
                raise EngineError(
                    "close() was called from inside a run, by a signal handler for example",
                    expected="a call after the run, or from another thread",
                    fix="note the wish in the handler, and close after the run",
                )
            self._open = False
            self._condition.wait_for(lambda: not self._inside)  # who is interrupted here may close again
            first, self._emptied = not self._emptied, True
            return first


class Pool(Generic[T]):
    """A fixed set of things that one call at a time may use each.

    A call borrows one thing and borrows no second while it has it, so calls cannot wait for each other in a circle.

    Args:
        items: what is lent.
        closed: makes the error of calls that come after :meth:`close`.
    """

    def __init__(self, items: Sequence[T], closed: Callable[[], EngineError]) -> None:
        self._free = list(items)
        self._count = len(self._free)
        self._closed_error = closed
        self._condition = threading.Condition()
        self._open = True

    @contextmanager
    def borrow(self, wanted: T | None = None) -> Iterator[T]:
        """Lend a free item, or ``wanted`` once it is free; it comes back whatever happens in the block.

        Raises:
            EngineError: the pool is closed.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._open or self._has(wanted))
            if not self._open:
                raise self._closed_error()
            item = self._free.pop() if wanted is None else self._free.pop(self._free.index(wanted))
        try:
            yield item
        finally:
            with self._condition:
                self._free.append(item)
                self._condition.notify_all()

    def close(self) -> tuple[T, ...]:
        """Turn later calls away, wait until everything is back and give it away; closing twice gives nothing."""
        with self._condition:
            self._open = False
            self._condition.notify_all()
            self._condition.wait_for(lambda: len(self._free) == self._count)
            items, self._free, self._count = tuple(self._free), [], 0
            return items

    def _has(self, wanted: T | None) -> bool:
        return bool(self._free) if wanted is None else wanted in self._free
