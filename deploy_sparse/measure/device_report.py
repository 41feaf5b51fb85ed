"""The records of several runs as one report for each device they were measured on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import ConfigError
from .compare import compare_all
from .contents import Report
from .line_plot import LinePlot
from .record import LatencyRecord
from .table import Table

Shown = TypeVar("Shown", Table, LinePlot)


@dataclass(frozen=True)
class Source:
    """Records from one place, and what its own report says besides.

    ``name`` stands for the network where the records do not name theirs.
    """

    name: str
    records: tuple[LatencyRecord, ...]
    provenance: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    plots: tuple[LinePlot, ...] = ()


Owned = tuple[LatencyRecord, Source]


def device_of(record: LatencyRecord) -> str:
    """The GPU that worked, else the processor; of a GPU that nothing tells the name of, what it stands beside."""
    gpu, processor = record.conditions.gpu, record.environment.get("processor", "unknown device")
    if gpu is not None:
        return gpu.name
    return f"a GPU beside {processor}" if record.timed and record.on_gpu else processor


def device_reports(sources: Sequence[Source], title: str | None = None) -> dict[str, Report]:
    """A report for each device, in order of appearance.

    Records that are in several sources count once. What was only compiled is told where the first of what its machine
    timed is. Tables and curves of a source go where all its records go.

    Args:
        sources: at least one.
        title: the title of every report; by default it names the device.

    Raises:
        ConfigError: there is no record, or two sources hold different records of one measurement.
    """
    owned = _owned(sources)
    if not owned:
        raise ConfigError("no record to report", expected="at least one", fix="measure with: deploy-sparse profile")
    timed = [record for record, _ in owned if record.timed]
    machines = {record.environment.get("processor"): device_of(record) for record in reversed(timed)}
    parts: dict[str, list[Owned]] = {}
    for record, source in owned:
        device = device_of(record)
        if not record.timed:
            device = machines.get(record.environment.get("processor"), device)
        parts.setdefault(device, []).append((record, source))
    return {device: _report(device, own, len(sources) > 1, title) for device, own in parts.items()}


def file_names(devices: Iterable[str]) -> dict[str, str]:
    """The stem of a file for each device, all different: ``nvidia-h200`` for ``"NVIDIA H200"``."""
    names: dict[str, str] = {}
    for device in devices:
        stem = name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
        number = 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[device] = name
    return names


def _report(device: str, own: Sequence[Owned], several: bool, title: str | None) -> Report:
    records = tuple(record for record, _ in own)
    here = list({id(source): source for _, source in own}.values())
    # What a source says of layers or training does not say on which of several devices.
    whole = [source for source in here if {r.run_id for r in source.records} <= {r.run_id for r in records}]
    return Report(
        title or f"Latency on {device}",
        records,
        compare_all(records),
        provenance=_found_in(here, len(records)) if several else here[0].provenance,
        tables=tuple(_named(table, source, several) for source in whole for table in source.tables),
        conditions=tuple(_condition(pair, source, several) for source in whole for pair in source.conditions),
        plots=tuple(_named(plot, source, several) for source in whole for plot in source.plots),
        names=tuple(dict.fromkeys((record.run_id, source.name) for record, source in own)) if several else (),
    )


def _owned(sources: Sequence[Source]) -> list[Owned]:
    """Every record once, with the first source that holds it."""
    seen: dict[tuple[object, ...], Owned] = {}
    for source in sources:
        for record in source.records:
            key = (record.run_id, record.target, record.batch, record.subject, record.status)
            other, owner = seen.setdefault(key, (record, source))
            if other != record:
                raise ConfigError(
                    f"{owner.name} and {source.name} hold different records of {record.subject!r} at batch "
                    f"{record.batch} on {record.target} of run {record.run_id}",
                    expected="one record of each subject, target and batch of a run",
                    fix="leave one of them out; records are not to be edited",
                )
    return list(seen.values())


def _found_in(here: Sequence[Source], records: int) -> tuple[str, ...]:
    names = ", ".join(dict.fromkeys(source.name for source in here))
    sources = "1 source" if len(here) == 1 else f"{len(here)} sources"
    return (f"{records} records from {sources}: {names}",)


def _named(shown: Shown, source: Source, several: bool) -> Shown:
    return replace(shown, title=f"{source.name}: {shown.title}") if several else shown


def _condition(pair: tuple[str, str], source: Source, several: bool) -> tuple[str, str]:
    """A command stays as it is, to be copied."""
    label, text = pair
    return (label, f"{text} ({source.name})") if several and label != "command" else pair
