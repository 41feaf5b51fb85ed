"""Runs a suite: makes each network's forms, builds them for each target, times them side by side, and goes on where it
was stopped."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ..artifact import environment
from ..engine.target import Target, in_precision, load_target
from ..errors import ConfigError, DeploySparseError, Interrupted
from ..measure.interleave import BLOCK_MS
from ..measure.pinning import check_threads, pinned
from ..measure.profile import profile
from ..measure.record import NOT_BUILT, NOT_TIMED, Conditions, LatencyRecord
from .building import Builder, Built
from .config import DENSE, Network, Suite
from .forms import Maker, Poll, Say
from .layers import layers_of
from .state import Folder

Untimed = tuple[Literal["compiled, not timed here", "not built"], str]  # the status of the record, and why
BLOCKS = 16  # of the timed seconds, at least: with fewer pairs an interval means little


@dataclass(frozen=True)
class Selection:
    """What of a suite is measured; None or nothing for all of it.

    Attributes:
        targets: names or files, instead of the suite's.
        batches: instead of the suite's and its networks'.
        only: shell patterns of networks, or of ``network/form``.
        cpus: processors to run on; all by default.
    """

    targets: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Group:
    """A network and its forms on one target, at the batches where something is missing.

    Attributes:
        missing: by batch, the forms without a record; the dense network is timed beside them each time.
    """

    network: Network
    target: Target
    missing: Mapping[int, tuple[str, ...]]

    @property
    def forms(self) -> tuple[str, ...]:
        """Every form that misses a record at some batch, in the suite's order."""
        wanted = {form for forms in self.missing.values() for form in forms}
        return tuple(form for form in self.network.forms if form in wanted)


def selected_targets(suite: Suite, selection: Selection) -> tuple[Target, ...]:
    """Every target in every precision, those that the target does not take left out where it takes another.

    Raises:
        ConfigError: an unknown target, or one that takes none of the precisions.
    """
    found: list[Target] = []
    for name in selection.targets or suite.targets:
        target, problems = load_target(name), []
        for precision in suite.precisions:
            try:
                found.append(in_precision(target, precision))
            except ConfigError as problem:
                problems.append(problem)
        if len(problems) == len(suite.precisions):
            raise problems[0]
    if len({target.name for target in found}) < len(found):
        raise ConfigError(
            f"targets {', '.join(target.name for target in found)}",
            expected="every target once, under names of their own",
            fix="drop the repetition",
        )
    return tuple(found)


def groups(
    suite: Suite, selection: Selection, targets: Sequence[Target], records: Sequence[LatencyRecord]
) -> tuple[Group, ...]:
    """What is still to be measured.

    Raises:
        ConfigError: a batch outside a target's range, or a pattern that matches nothing.
    """
    _check_selection(suite, selection, targets)
    timed = {(r.network, r.subject, r.target, r.batch) for r in records if r.timed}
    untimed = {(r.network, r.subject, r.target) for r in records if not r.timed}
    found = []
    for network in suite.networks:
        forms = tuple(form for form in network.forms if _wanted(network, form, selection.only))
        for target in targets:
            missing = {}
            for batch in selection.batches or suite.batches_of(network):
                left = tuple(
                    form
                    for form in forms
                    if (network.name, form, target.name, batch) not in timed
                    and (network.name, form, target.name) not in untimed
                )
                if left:
                    missing[batch] = left
            if missing:
                found.append(Group(network, target, missing))
    return tuple(found)


def check(suite: Suite, selection: Selection) -> None:
    """Refuse what cannot be measured, before a folder is made.

    Raises:
        ConfigError: see :func:`selected_targets` and :func:`groups`; processors that this process may not use, or fewer
            than a target has threads.
    """
    targets = selected_targets(suite, selection)
    groups(suite, selection, targets, ())
    for target in targets:
        check_threads(selection.cpus or None, None if target.on_gpu else target.threads)
    with pinned(selection.cpus or None):
        pass


def run(
    suite: Suite, folder: Folder, selection: Selection, *, poll: Poll = lambda: None, say: Say = lambda text: None
) -> int:
    """Measure what the folder lacks; every group of records is kept as soon as it is there.

    What cannot be made, built or run gets a record with the reason, and the rest goes on.

    Args:
        poll: called between steps and timed blocks; what it raises ends the run.
        say: receives a line for every step.

    Returns:
        the number of new records.

    Raises:
        ConfigError: see :func:`selected_targets` and :func:`groups`.
        RunError: a target has changed since the folder has records of it.
    """
    targets = selected_targets(suite, selection)
    for target in targets:
        folder.check_target(target)
    before = len(folder.records)
    todo = groups(suite, selection, targets, folder.records)
    for name in dict.fromkeys(group.network.name for group in todo):
        own = [group for group in todo if group.network.name == name]
        with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
            network = own[0].network
            maker = Maker(network, suite.batches_of(network), suite.seconds, suite.seed, poll, say)
            bench = _Bench(suite, folder, Builder(suite, maker, Path(scratch)), selection.cpus, poll, say)
            for group in own:
                bench.measure(group)
    return len(folder.records) - before


@dataclass(frozen=True)
class _Bench:
    """Builds and times the groups of one network."""

    suite: Suite
    folder: Folder
    builder: Builder
    cpus: tuple[int, ...]
    poll: Poll
    say: Say

    def measure(self, group: Group) -> None:
        """Build what the group misses and time it, batch by batch; one append for each batch."""
        built, failed = self._built(group)
        told: set[str] = set()
        for batch, forms in group.missing.items():
            self.poll()
            started = time.perf_counter()
            reasons = {
                subject: failed[subject] for subject in (DENSE, *forms) if subject in failed and subject not in told
            }
            own = {form: built[form] for form in forms if form in built and form not in told}
            found = self._timed(built, batch, tuple(own), reasons) if own else []
            run_id = found[0].run_id if found else _run_id()
            found += [self._untimed(subject, why, group.target, batch, run_id) for subject, why in reasons.items()]
            if not found:
                continue
            if batch == next(iter(group.missing)):
                self._look_into(built, group.target, batch, {record.subject for record in found if record.timed})
            self.folder.add(found)
            told |= {record.subject for record in found if not record.timed}
            timed, seconds = sum(record.timed for record in found), time.perf_counter() - started
            self.say(f"{self._place(group.target)}, batch {batch}: {timed} of {len(found)} timed in {seconds:.0f} s")

    def _place(self, target: Target) -> str:
        return f"{self.builder.maker.network.name}, {target.name}"

    def _built(self, group: Group) -> tuple[dict[str, Built], dict[str, Untimed]]:
        """Engines by subject, and why there is none; without the dense network nothing is built."""
        built: dict[str, Built] = {}
        failed: dict[str, Untimed] = {}
        for subject in (DENSE, *group.forms):
            self.poll()
            started = time.perf_counter()
            try:
                built[subject] = self.builder.build(subject, group.target)
            except Interrupted:
                raise
            except _PROBLEMS as problem:
                failed[subject] = NOT_BUILT, _reason(problem)
                self.say(f"{self._place(group.target)}: {subject} is not built: {_reason(problem)}")
                if subject == DENSE:
                    why = f"{_reason(problem)} (the dense network)"
                    return {}, dict.fromkeys((DENSE, *group.forms), (NOT_BUILT, why))
                continue
            self.folder.describe(self.builder.description(subject, built[subject].made, group.target))
            self.say(f"{self._place(group.target)}: {subject} built in {time.perf_counter() - started:.0f} s")
        return built, failed

    def _timed(
        self, built: Mapping[str, Built], batch: int, forms: tuple[str, ...], reasons: dict[str, Untimed]
    ) -> list[LatencyRecord]:
        """Records of the dense network and the forms beside it. Where they fail together each is tried alone, and what
        does not run is added to ``reasons``."""
        own = {subject: built[subject] for subject in (DENSE, *forms)}
        try:
            made = profile(
                {subject: part.engine for subject, part in own.items()},
                DENSE,
                batches=(batch,),
                facts={subject: part.facts for subject, part in own.items()},
                poll=self.poll,
                cpus=self.cpus or None,
                **_way(self.suite, own[DENSE].engine.target),
                **_floors(self.suite),
            )
        except Interrupted:
            raise
        except _PROBLEMS as problem:
            if len(forms) == 1:
                reasons[forms[0]] = NOT_TIMED, f"did not run: {_reason(problem)}"
                return []
            return [record for form in forms for record in self._timed(built, batch, (form,), reasons)]
        return list(made.records)

    def _look_into(self, built: Mapping[str, Built], target: Target, batch: int, timed: set[str]) -> None:
        """Time the layers of the forms that the suite names, once each; a runtime that tells none has no such table."""
        network, known = self.builder.maker.network, self.folder.layers
        for form in network.layer_tables:
            if form in timed and (network.name, form, target.name) not in known:
                self.poll()
                engines = built[DENSE].engine, built[form].engine
                try:
                    self.folder.describe(layers_of(network.name, form, engines, batch, self.suite.seconds, self.poll))
                except Interrupted:
                    raise
                except _PROBLEMS as problem:
                    self.say(f"{self._place(target)}: {form} has no times of layers: {_reason(problem)}")

    def _untimed(self, subject: str, found: Untimed, target: Target, batch: int, run_id: str) -> LatencyRecord:
        status, why = found
        known = self.builder.facts(subject, None, target)
        return LatencyRecord(
            run_id=run_id,
            date=datetime.now(UTC).replace(microsecond=0),
            subject=subject,
            baseline=DENSE,
            target=target.name,
            runtime=target.runtime,
            batch=batch,
            status=status,
            reason=why,
            network=known.network,
            form=known.form,
            precision=target.precision,
            hashes={"target": target.digest},
            environment=environment(),
            conditions=Conditions(**_floors(self.suite)),
        )


_PROBLEMS = (DeploySparseError, RuntimeError, MemoryError)  # libraries that run out of memory, for example


def _reason(problem: BaseException) -> str:
    said = problem.given if isinstance(problem, DeploySparseError) else f"{type(problem).__name__}: {problem}"
    return " ".join(said.split())[:500]


def _run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _way(suite: Suite, target: Target) -> dict[str, Any]:
    """How calls are timed, as far as it goes for such a target: caches are a processor's, graphs a GPU's."""
    return {
        "transfers": suite.transfers,
        "cache": "warm" if target.on_gpu else suite.cache,
        "cuda_graph": suite.cuda_graph and target.on_gpu,
    }


def _floors(suite: Suite) -> dict[str, Any]:
    """How long everything is timed; short suites have shorter blocks, so that an interval has enough of them."""
    return {
        "warmup_ms": suite.warmup_ms,
        "duration_s": suite.seconds,
        "min_iterations": suite.min_iterations,
        "block_ms": min(BLOCK_MS, 1e3 * suite.seconds / BLOCKS),
    }


def _check_selection(suite: Suite, selection: Selection, targets: Sequence[Target]) -> None:
    for target in targets:
        for network in suite.networks:
            for batch in selection.batches or suite.batches_of(network):
                if not target.batch.min <= batch <= target.batch.max:
                    raise ConfigError(
                        f"batch {batch}, which target {target.name!r} does not take",
                        expected=f"batches from {target.batch.min} to {target.batch.max}",
                        fix="choose other batches with --batch, or a target file with a wider range",
                    )
    names = [network.name for network in suite.networks]
    for pattern in selection.only:
        if not any(_matches(network, form, pattern) for network in suite.networks for form in network.forms):
            raise ConfigError(
                f"--only {pattern!r} matches nothing in the suite {suite.name!r}",
                expected=f"a pattern of {', '.join(names)}, or of NETWORK/FORM",
                fix=f"mend the pattern, for example --only {names[0]!r}",
            )


def _wanted(network: Network, form: str, only: Sequence[str]) -> bool:
    return not only or any(_matches(network, form, pattern) for pattern in only)


def _matches(network: Network, form: str, pattern: str) -> bool:
    return fnmatchcase(f"{network.name}/{form}" if "/" in pattern else network.name, pattern)
