"""From a latency that was asked for to a ticket that has it: allocate by the table, build, time, correct.

A table adds up layers timed alone and leaves norms, activations and copies as they were, so what it predicts is off by
some per cent. So the ticket's network is built and timed beside the dense one, and where the measured latency misses
the asked one by more than the tolerance, the limit is scaled by how much prediction and measurement differ, and the
channels are chosen again. What is delivered was timed a second time, with engines opened again, as these may differ by
a few per cent and the nearest of several timings is partly luck; that second figure is the one reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import ConfigError
from ..sparsify.allocation import Allocation, LatencyBudget
from ..sparsify.widths import Costs, LayerWidths
from ..sparsify.worth import Worth
from ..ticket import Ticket

TOLERANCE = 0.05
"""How far the measured latency may be from the asked one, as a share of it."""
AIM = 0.5
"""Of the tolerance, at which no further pass is made: a ticket at its edge would be off the next time it is timed."""
PASSES = 5
"""How many tickets are made, at most; each is timed once, and once more before it is taken."""

Say = Callable[[str], None]
_FORM = re.compile(r"([0-9]*\.?[0-9]+)\s*(x|ms)", re.IGNORECASE)


class Counted(Protocol):
    """A layer's dense widths, as a table has them."""

    @property
    def c_in(self) -> int: ...
    @property
    def c_out(self) -> int: ...


class Times(Costs, Protocol):
    """What budgets need of a :class:`~.latency.table.LatencyTable`."""

    @property
    def multiple(self) -> int: ...
    @property
    def layers(self) -> Mapping[str, Counted]: ...


@dataclass(frozen=True)
class Asked:
    """The latency that was asked for: a share of the dense network's, or a time. One of the two is None."""

    share: float | None
    ms: float | None

    @classmethod
    def parse(cls, text: str) -> Asked:
        """``"0.5x"`` is half of the dense network's latency, ``"3.2ms"`` a time.

        Raises:
            ConfigError: anything else, a share above 1, or nothing at all.
        """
        found = _FORM.fullmatch(text.strip())
        number = float(found[1]) if found else math.nan
        share = bool(found) and found is not None and found[2].lower() == "x"
        if not number > 0 or (share and number > 1):
            raise ConfigError(
                f"latency {text!r}",
                expected="a share of the dense network's latency in (0, 1] such as 0.5x, or a time such as 3.2ms",
                fix="write a number, and x or ms",
            )
        return cls(number, None) if share else cls(None, number)

    def limit_ms(self, dense_ms: float) -> float:
        """The time in ms, where the dense network takes ``dense_ms``."""
        if self.share is not None:
            return self.share * dense_ms
        assert self.ms is not None
        return self.ms

    def miss(self, ms: float, share: float) -> float:
        """How far a measured time, ``share`` of the dense network's, is from what was asked, as a share of that."""
        return share / self.share - 1 if self.share is not None else ms / (self.ms or math.nan) - 1

    def __str__(self) -> str:
        return f"{self.share:g}x" if self.share is not None else f"{self.ms:g}ms"


@dataclass(frozen=True)
class Timed:
    """A compact network timed beside the dense one.

    Attributes:
        ms, dense_ms: medians.
        share: its time over the dense one's, the median over paired blocks.
        low, high: the 95 % interval of that; None with too few blocks.
    """

    ms: float
    dense_ms: float
    share: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Pass:
    """One ticket on the way.

    Attributes:
        limit_ms: in the table's ms.
        allocation: within that.
        timings: none, one, or a second one that confirms.
    """

    limit_ms: float
    allocation: Allocation
    timings: tuple[Timed, ...] = ()

    @property
    def timed(self) -> Timed | None:
        """The timing that counts: the last one."""
        return self.timings[-1] if self.timings else None


@dataclass(frozen=True)
class Landing:
    """How a latency was reached.

    Attributes:
        asked: the latency.
        passes: every ticket that was made, in order.
        chosen: the one whose confirmed latency is nearest to what was asked; the only one where none was timed.
    """

    asked: Asked
    passes: tuple[Pass, ...]
    chosen: Pass

    @property
    def miss(self) -> float | None:
        """The measured latency's distance from the asked one, as a share of it; None where nothing was timed."""
        timed = self.chosen.timed
        return None if timed is None else self.asked.miss(timed.ms, timed.share)

    @property
    def landed(self) -> bool | None:
        """Whether that is within the tolerance."""
        return None if self.miss is None else abs(self.miss) <= TOLERANCE

    def summary(self) -> dict[str, Any]:
        """As JSON values: asked, predicted and measured; ``passes`` has every pass."""
        return {"asked": str(self.asked), **_as_json(self.chosen), "miss": self.miss, "landed": self.landed,
                "passes": [_as_json(each) for each in self.passes]}  # fmt: skip

    def sentence(self) -> str:
        """Asked, predicted and measured latency in a line."""
        found, timed = self.chosen.allocation, self.chosen.timed
        parts = [
            f"asked {self.asked}",
            f"predicted {found.ms / found.dense_ms:.3f}x ({found.ms:.4g} of {found.dense_ms:.4g} ms)",
        ]
        if timed is None:
            return ", ".join([*parts, "not timed"])
        interval = "" if timed.low is None else f", 95 % interval {timed.low:.3f}–{timed.high:.3f}"
        parts.append(f"measured {timed.share:.3f}x ({timed.ms:.4g} of {timed.dense_ms:.4g} ms{interval})")
        if not self.landed:
            parts.append(f"off by {self.miss:+.1%}")
        return ", ".join(parts)


def budget_of(table: Times, asked: Asked, *, multiple: int | None = None, worth: Worth = "product") -> LatencyBudget:
    """The knapsack's limit by a table.

    Args:
        multiple: of the kept channels; the table's own by default.

    Raises:
        ConfigError: a time above the dense network's, or a multiple below 1.
    """
    widths = widths_of(table)
    dense_ms = table.network_ms(widths)
    limit = asked.limit_ms(dense_ms)
    if limit > dense_ms:
        raise ConfigError(
            f"latency {str(asked)!r}, where the dense network takes {dense_ms:.4g} ms",
            expected="less than that, by the latency table",
            fix=f"ask for less, such as 0.5x, or run the dense network: it has {asked} already",
        )
    return LatencyBudget(limit, table, widths, table.multiple if multiple is None else multiple, worth)


def widths_of(table: Times) -> LayerWidths:
    """The dense layers' input and output channels."""
    return {path: (shape.c_in, shape.c_out) for path, shape in table.layers.items()}


def land(
    asked: Asked,
    limit_ms: float,
    make: Callable[[float], tuple[Ticket, Allocation]],
    timed: Callable[[Ticket], Timed] | None,
    *,
    tolerance: float = TOLERANCE,
    passes: int = PASSES,
    say: Say = lambda text: None,
) -> tuple[Ticket, Landing]:
    """Make tickets until one has the asked latency to half of the tolerance, confirm that, and return the nearest.

    The first limit is the asked time by the table. The second is what the first ticket was predicted, over how much its
    measured latency exceeded what was asked; later ones lie on the line through two earlier passes. It ends early where
    the limit cannot go lower, or the same channels come out again.

    A ticket that has it is timed once more, and taken if it is within the tolerance then too; else its second timing is
    what the next limit goes by. The nearest of several that were not is timed once more as well, and gives way to
    another where that is nearer then. So whatever is returned was timed twice, and the second timing is its latency.

    Args:
        asked: the latency.
        limit_ms: that, by the table.
        make: the ticket within a limit, and its allocation; a :class:`ConfigError` where the limit cannot be met.
        timed: measures a ticket, with its engines opened anew; None takes the first one as it is.
        tolerance: how far the measured latency may be from what was asked, as a share.
        passes: tickets to make at most.
        say: receives a line for each timing.

    Raises:
        ConfigError: the first limit cannot be met, or no pass at all.
    """
    if passes < 1:
        raise ConfigError(f"{passes} passes", expected="1 or more", fix="leave it out")
    tickets: list[Ticket] = []
    done: list[Pass] = []
    limit, seen = limit_ms, set()

    def time(number: int) -> float:
        """Time a pass, once more where it was already; how far off it is now."""
        again = ", timed again" * bool(done[number].timings)
        if timed is not None:
            done[number] = replace(done[number], timings=(*done[number].timings, timed(tickets[number])))
        say(f"pass {number + 1}{again}: {Landing(asked, (), done[number]).sentence()}")
        return abs(_missed(asked, done[number]))

    for number in range(passes):
        try:
            ticket, allocation = make(limit)
        except ConfigError:
            if not done:
                raise
            say(f"pass {number + 1}: a limit of {limit:.4g} ms is below what the channels can reach")
            break
        if allocation.kept in seen:
            break
        seen.add(allocation.kept)
        tickets.append(ticket)
        done.append(Pass(limit, allocation))
        if time(number) <= AIM * tolerance and (timed is None or time(number) <= tolerance):
            break
        limit = min(_next_limit(asked, done), allocation.dense_ms)

    def nearest() -> int:
        return min(range(len(done)), key=lambda number: abs(_missed(asked, done[number])))

    while timed is not None and len(done[nearest()].timings) < 2:
        time(nearest())
    return tickets[nearest()], Landing(asked, tuple(done), done[nearest()])


def _next_limit(asked: Asked, done: list[Pass]) -> float:
    """Scaled by measured over predicted; once there are two passes, where the line through two of them hits.

    These are the nearest on both sides of what was asked, else the last two, where they differ enough for a line.
    """
    points = [(each.allocation.ms, _missed(asked, each)) for each in done]
    below = max((point for point in points if point[1] < 0), default=None)
    above = min((point for point in points if point[1] >= 0), default=None)
    predicted, miss = points[-1]
    if below is not None and above is not None and below[0] < above[0]:
        return below[0] - below[1] * (above[0] - below[0]) / (above[1] - below[1])
    if len(points) > 1:
        before, missed = points[-2]
        far = abs(predicted - before) > 0.02 * predicted
        if far and (slope := (miss - missed) / (predicted - before)) > 0:
            return min(max(predicted - miss / slope, predicted / 2), 2 * predicted)
    return predicted / (1 + miss)


def _missed(asked: Asked, each: Pass) -> float:
    return 0.0 if each.timed is None else asked.miss(each.timed.ms, each.timed.share)


def _as_json(each: Pass) -> dict[str, Any]:
    found, timed = each.allocation, each.timed
    return {
        "limit_ms": each.limit_ms,
        "predicted_ms": found.ms,
        "predicted": found.ms / found.dense_ms,
        "retained": found.retained,
        "measured": None if timed is None else timed.share,
        "timings": [one.share for one in each.timings],
        "interval": None if timed is None or timed.low is None else [timed.low, timed.high],
        "measured_ms": None if timed is None else timed.ms,
        "dense_ms": None if timed is None else timed.dense_ms,
    }
