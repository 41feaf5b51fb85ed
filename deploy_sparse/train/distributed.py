"""Several processes that train as one, as torchrun starts them; alone, everything here costs nothing.

The first process decides, writes and prints. What the processes tell each other is tensors, or JSON as bytes in a
tensor: never a pickled object. Messages go over the CPU (gloo), gradients over the device they are on (NCCL on GPUs).
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DeploySparseError, Interrupted, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)  # the first process may be reading, writing or measuring for long while others wait


class ElsewhereError(DeploySparseError):
    """The first process met an error and reports it; the others end with it too."""


@dataclass(frozen=True)
class World:
    """The processes of this run. Every process must make the same calls in the same order.

    Attributes:
        rank: this process's number; 0 is the first one.
        size: number of processes.
        local_rank: this process's number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """The first process's ``value``, JSON, on every process."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed as dist

        message = json.dumps(value).encode() if self.main else b""
        length = torch.tensor(len(message))
        dist.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.main:
            content = _bytes(message)
        dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, JSON, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed as dist

        message = _bytes(json.dumps(value).encode())
        lengths = [torch.tensor(0) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(message)))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(message)] = message
        found = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [json.loads(bytes(part[:length].tolist())) for part, length in zip(found, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.most(0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return self._reduced(number, "MAX")

    def sum(self, number: int) -> int:
        """The sum of the processes' numbers."""
        return self._reduced(number, "SUM")

    def share_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors, on every process, by the first one's."""
        if self.size == 1:
            return
        from torch import distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def check_same(self, digest: str, what: str, *, fix: str = "train with one process, and report this") -> None:
        """Refuse to go on with something that should be equal on every process and is not.

        Raises:
            RunError: the digests differ.
        """
        digests = self.gather(digest)
        if len({*digests}) > 1:
            raise RunError(
                f"{what} differ between processes ({', '.join(text[:12] for text in digests)})",
                expected="the same everywhere",
                fix=fix,
            )

    def main_first(self, action: Callable[[], T]) -> T:
        """Call ``action`` on the first process, then on the others; where it fails there, no other calls it.

        Raises:
            ElsewhereError: on the other processes, when the first one met an error of this package.
        """
        if self.size == 1:
            return action()
        if self.main:
            try:
                value = action()
            except DeploySparseError as problem:
                self.agree([problem.given, problem.expected, problem.fix])
                raise
            self.agree(None)
            return value
        if (said := self.agree(None)) is not None:
            given, expected, fix = said
            raise ElsewhereError(given, expected=expected, fix=fix)
        return action()

    def main_only(self, action: Callable[[], object]) -> None:
        """Call ``action`` on the first process alone; the others wait for it, and end with its error."""
        self.main_first(action if self.main else lambda: None)

    def _reduced(self, number: int, operation: str) -> int:
        if self.size == 1:
            return number
        import torch
        from torch import distributed as dist

        value = torch.tensor(number)
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
        return int(value)


ALONE = World()
_current = ALONE


def world() -> World:
    """The processes this one belongs to; one alone outside :func:`joined`."""
    return _current


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes that torchrun started; without torchrun, be alone.

    Raises:
        RunError: another process ended while this one waited for it.
    """
    global _current
    number = {key: int(os.environ.get(key, "0") or 0) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if number["WORLD_SIZE"] < 2 or "MASTER_ADDR" not in os.environ or _current.size > 1:
        yield _current
        return
    import torch
    from torch import distributed as dist

    both = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=TIMEOUT)
    _current = World(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"])
    try:
        yield _current
    except RuntimeError as problem:
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            raise
        raise RunError(
            f"another of the {_current.size} processes ended ({str(problem).splitlines()[0]})",
            expected="all of them until the end",
            fix="see what that process said, and continue with --resume",
        ) from problem
    finally:
        _current = ALONE
        gc.collect()  # a wrapper in a reference cycle would keep the group, whose threads abort the interpreter's exit
        dist.destroy_process_group()


def poll_together(poll: Callable[..., None], *saved: str) -> None:
    """Call ``poll`` on every process; when one of them is asked to stop, all stop here.

    Raises:
        Interrupted: on every process.
    """
    stop = None
    try:
        poll(*saved)
    except Interrupted as problem:
        stop = problem
    number = world().most(0 if stop is None else stop.exit_code - 128)
    if stop is not None:
        raise stop
    if number:
        name, what = signal.Signals(number).name, "".join(f": {text}" for text in saved)
        raise Interrupted(f"another process was stopped by {name}{what}", signal_number=number, fix="use --resume")


def _bytes(message: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
