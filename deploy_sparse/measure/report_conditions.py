"""Under what conditions a report's numbers hold: said once where it holds for all, else with where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from .contents import Report
from .record import LatencyRecord
from .table import UNKNOWN, Code, Table, count

Of = Callable[[LatencyRecord], str]

MOST_NAMES = 6  # that are listed one by one
_FURTHER = {  # conditions that not all records state, and what they are called
    "transfers": "transfers",
    "cuda_graph": "CUDA graph",
    "cache": "cache",
    "evicted_bytes": "evicted before each call, bytes",
    "cpus": "processors allowed",
}


def conditions_table(report: Report) -> Table:
    """What holds for all records, one row each; a value that not all have stands with what it goes along with."""
    rows = (*_conditions(report), *report.conditions)
    cells = ((label, Code(value) if label == "command" else value) for label, value in rows)
    return Table("Conditions", ("condition", "value"), tuple(cells))


def hashes_table(report: Report) -> Table:
    """What every subject was made from; the first 12 digits of each hash."""
    programs = any("program" in record.hashes for record in report.records)
    kinds = ("engine", "onnx", *(["program"] if programs else []), "ticket", "target")
    several = len(report.networks) > 1
    rows = {
        (
            record.subject,
            *([report.network_of(record)] if several else []),
            record.target,
            *(record.hashes.get(kind, UNKNOWN)[:12] for kind in kinds),
        ): None
        for record in report.records
        if record.hashes
    }
    columns = ("subject", *(["network"] if several else []), "target", *kinds)
    note = "SHA-256; the records hold all 64 digits." if rows else ""
    return Table("Made from", columns, tuple(rows), note)


def _conditions(report: Report) -> Iterator[tuple[str, str]]:
    records = report.records
    timed = [record for record in records if record.timed]
    if any(report.networks):
        names = [network or "not named" for network in report.networks]
        yield "networks" if len(names) > 1 else "network", "; ".join(names)
    if any(record.precision for record in records):
        yield "precision", _told(report, records, lambda record: record.precision or "not stated")
    yield "baseline", _told(report, records, lambda record: record.baseline)
    yield "targets", _listed((f"{record.target} ({record.runtime})" for record in records), "targets")
    for key in dict.fromkeys(key for record in records for key in record.environment):
        yield key, _told(report, records, partial(_of_environment, key))
    if timed:
        yield "threads", _told(report, timed, _threads)
        yield "timing", _told(report, timed, _timing)
        yield "interleaved", _told(report, timed, _interleaved)
        clocks = [mhz for record in timed for mhz in record.conditions.processor_mhz or ()]
        yield "processor clock", f"{_range(clocks)} MHz" if clocks else "not known"
        for key, label in _FURTHER.items():
            if any(getattr(record.conditions, key) is not None for record in timed):
                yield label, _told(report, timed, partial(_of_conditions, key))
        if any(record.conditions.gpu for record in timed):
            yield from _gpu(report, timed)
    if records:
        dates = sorted(record.date for record in records)
        first, last = (f"{date:%Y-%m-%d %H:%M} UTC" for date in (dates[0], dates[-1]))
        yield "date", first if first == last else f"{first} to {last}"
        yield "run", _listed(sorted({record.run_id for record in records}), "runs")


def _told(report: Report, records: Sequence[LatencyRecord], value: Of) -> str:
    """The value that all records share, or each one with the networks, targets, batches or runs that have it."""
    found = list(dict.fromkeys(map(value, records)))
    if len(found) == 1:
        return found[0]
    for name, of in _explanations(report):
        parts: dict[str, dict[str, None]] = {}
        for record in records:
            parts.setdefault(value(record), {}).setdefault(of(record))
        places = [place for own in parts.values() for place in own]
        if len(places) == len(set(places)):
            return "; ".join(f"{text} ({name}{_enumerated(own)})" for text, own in parts.items())
    return "; ".join(found)


def _explanations(report: Report) -> Iterator[tuple[str, Of]]:
    yield "", lambda record: report.network_of(record) or "network not named"
    yield "", lambda record: record.target
    yield "batch ", lambda record: str(record.batch)
    yield "run ", lambda record: record.run_id
    yield "", lambda record: record.subject


def _enumerated(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(listed[:MOST_NAMES]) + more


def _listed(names: Iterable[str], what: str) -> str:
    """Every name once; of many only the first and the last."""
    listed = list(dict.fromkeys(names))
    if len(listed) <= MOST_NAMES:
        return "; ".join(listed)
    return f"{len(listed)} {what}, from {listed[0]} to {listed[-1]}"


def _threads(record: LatencyRecord) -> str:
    threads = record.conditions.threads
    return "not stated" if threads is None else str(threads)


def _timing(record: LatencyRecord) -> str:
    c = record.conditions
    return (
        f"warm-up {c.warmup_ms:g} ms, then blocks of {c.block_ms:g} ms in turns, for at "
        f"least {c.duration_s:g} s and {c.min_iterations} calls a subject"
    )


def _interleaved(record: LatencyRecord) -> str:
    beside = record.conditions.interleaved_with
    return ", ".join(sorted({record.subject, *beside})) if beside else "no"


def _of_environment(key: str, record: LatencyRecord) -> str:
    return record.environment.get(key, "absent")


def _gpu(report: Report, timed: Sequence[LatencyRecord]) -> Iterator[tuple[str, str]]:
    """The GPU, what was asked of it, and the range of what was measured while it worked."""
    found = [record.conditions.gpu for record in timed if record.conditions.gpu is not None]
    yield "GPU", _told(report, timed, _gpu_name)
    clocks = [mhz for gpu in found for mhz in gpu.sm_mhz or ()]
    most = max((gpu.sm_max_mhz or 0 for gpu in found), default=0)
    if clocks:
        yield "GPU clock", f"{_range(clocks)} MHz" + (f", of {most} MHz at most" if most else "")
    states = [state for gpu in found for state in (gpu.before, gpu.after)]
    for label, unit, values in (
        ("GPU power before and after", "W", [s.power_w for s in states]),
        ("GPU temperature before and after", "°C", [s.temperature_c for s in states]),
    ):
        known = [value for value in values if value is not None]
        if known:
            yield label, f"{_range(known)} {unit}"
    yield "GPU clocks held down by", _told(report, timed, _held_by)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _gpu_name(record: LatencyRecord) -> str:
    gpu = record.conditions.gpu
    if gpu is None:
        return "none"
    limit = None if gpu.power_limit_w is None else f"power limit {gpu.power_limit_w:.0f} W"
    return ", ".join(filter(None, (gpu.name, f"driver {gpu.driver}" if gpu.driver else None, limit)))


def _held_by(record: LatencyRecord) -> str:
    gpu = record.conditions.gpu
    return "not known" if gpu is None else ", ".join(gpu.held_by) or "nothing"


def _of_conditions(key: str, record: LatencyRecord) -> str:
    if key == "evicted_bytes" and record.conditions.cache == "warm":
        return "nothing"
    return _text(getattr(record.conditions, key))


def _text(value: object) -> str:
    """A condition's value as people read it."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return count(value) if isinstance(value, int) else str(value)
