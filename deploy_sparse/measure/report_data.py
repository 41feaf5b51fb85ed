"""What a report is made from, and how its records are put in order: by network, target, batch and run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import ConfigError
from .compare import Comparison
from .line_plot import LinePlot
from .record import LatencyRecord
from .table import Table

Key = tuple[str, str, int, str]  # run, target, batch, subject
Group = tuple[LatencyRecord, ...]  # records that were measured side by side


@dataclass(frozen=True)
class Report:
    """Everything a report shows. Records of one run, target and batch make a group, and are of one network.

    ``provenance`` are the lines under the title, ``plots`` and ``tables`` any extra ones, ``conditions`` further
    (label, text) pairs; the text with the label ``command`` is shown as code, to be copied. ``names`` has a (run,
    name) pair for runs whose records do not say of which network they are.

    Raises:
        ConfigError: a comparison whose record is not among ``records``.
    """

    title: str
    records: tuple[LatencyRecord, ...]
    comparisons: tuple[Comparison, ...]
    provenance: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    plots: tuple[LinePlot, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        timed = {_key(record) for record in self.records if record.timed}
        for comparison in self.comparisons:
            if _comparison_key(comparison) not in timed:
                raise ConfigError(
                    f"{comparison.subject!r} at batch {comparison.batch} is compared but has no timed record here",
                    expected="the record of every compared subject",
                    fix="make the comparisons from these records: compare_all(records)",
                )

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The records by network, target, batch and run, each in order of appearance, the baseline first."""
        networks = _numbered(self.network_of(record) for record in self.records)
        targets = _numbered(record.target for record in self.records)
        runs = _numbered(record.run_id for record in self.records)
        groups: dict[tuple[int, int, int, int], list[LatencyRecord]] = {}
        for record in self.records:
            place = networks[self.network_of(record)], targets[record.target], record.batch, runs[record.run_id]
            groups.setdefault(place, []).append(record)
        return tuple(
            tuple(sorted(group, key=lambda record: record.subject != record.baseline))
            for _, group in sorted(groups.items())
        )

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks, in order of appearance; empty for records that do not say."""
        return tuple(dict.fromkeys(map(self.network_of, self.records)))

    @cached_property
    def chapters(self) -> tuple[Report, ...]:
        """A report for each network, with its name as title, and nothing but its records and comparisons."""
        records: dict[str, list[LatencyRecord]] = {name: [] for name in self.networks}
        for record in self.records:
            records[self.network_of(record)].append(record)
        return tuple(
            replace(
                self,
                title=name,
                records=tuple(own),
                comparisons=tuple(c for record in own if (c := self.comparison_of(record)) is not None),
                provenance=(),
                tables=(),
                conditions=(),
                plots=(),
            )
            for name, own in records.items()
        )

    @cached_property
    def repeated(self) -> bool:
        """Whether several runs measured one network, target and batch alike, so that rows need their run's name."""
        return len({self._place(group) for group in self.groups}) < len(self.groups)

    def network_of(self, record: LatencyRecord) -> str:
        """The network's name: the record's own, else the run's; empty where neither says."""
        return record.network or dict(self.names).get(record.run_id, "")

    def place_of(self, group: Group) -> str:
        """``"cpu, batch 1"``, after the network where there are several, with the run where several measured that."""
        place, first = self._place(group), group[0]
        same = [other for other in self.groups if self._place(other) == place]
        words = (self.target_of(group), f"batch {first.batch}", way_of(first))
        return ", ".join([*filter(None, words), *([f"run {first.run_id}"] if len(same) > 1 else [])])

    def target_of(self, group: Group) -> str:
        """The group's target, after the network where there are several."""
        network = self.network_of(group[0]) if len(self.networks) > 1 else ""
        return ", ".join(filter(None, (network, group[0].target)))

    def comparison_of(self, record: LatencyRecord) -> Comparison | None:
        """The comparison of this record with its baseline, if there is one."""
        return self._by_key.get(_key(record))

    def record_of(self, comparison: Comparison) -> LatencyRecord:
        """The compared subject's record."""
        return self._timed[_comparison_key(comparison)]

    @cached_property
    def _by_key(self) -> dict[Key, Comparison]:
        return {_comparison_key(comparison): comparison for comparison in self.comparisons}

    @cached_property
    def _timed(self) -> dict[Key, LatencyRecord]:
        return {_key(record): record for record in self.records if record.timed}

    def _place(self, group: Group) -> tuple[str, str, int, str]:
        return self.network_of(group[0]), group[0].target, group[0].batch, way_of(group[0])


def way_of(record: LatencyRecord) -> str:
    """How it was timed where that is out of the ordinary: ``"cold cache, with transfers, CUDA graph"``; else empty."""
    found = record.conditions
    words = {
        "cold cache": found.cache == "cold",
        "with transfers": found.transfers == "included",
        "CUDA graph": found.cuda_graph,
    }
    return ", ".join(word for word, holds in words.items() if holds)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _key(record: LatencyRecord) -> Key:
    return record.run_id, record.target, record.batch, record.subject


def _comparison_key(comparison: Comparison) -> Key:
    return comparison.run_id, comparison.target, comparison.batch, comparison.subject
