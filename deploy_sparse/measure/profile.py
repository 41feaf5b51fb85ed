"""Engines (or plain callables) in, defended numbers out: check, warm up, interleave, record, compare."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import environment
from ..config import Config
from ..errors import ConfigError
from .compare import Comparison, compare_all
from .contents import Report, final_table, untimed_table
from .interleave import BLOCK_MS, DURATION_S, MIN_ITERATIONS, WARMUP_MS, Samples, interleave
from .record import NOT_TIMED, Conditions, LatencyRecord, append_records
from .subjects import Subject, check_known, checked_batches, checked_engines, checked_feeds, target_of
from .table import plain
from .timing import HOST_CLOCK, Clock, summarise


class Facts(Config):
    """What the caller knows of a subject and its manifest does not say.

    ``accuracy`` is a fraction, ``ticket`` the digest of the ticket the subject came from.
    """

    accuracy: float | None = None
    parameters: int | None = None
    macs: int | None = None
    peak_memory_bytes: int | None = None
    ticket: str | None = None


@dataclass(frozen=True)
class Profile:
    """The records of one run, and every timed subject compared with the baseline."""

    records: tuple[LatencyRecord, ...]
    comparisons: tuple[Comparison, ...]

    def table(self) -> str:
        """The result as plain text: what was timed, then what could not be."""
        report = Report("profile", self.records, self.comparisons)
        untimed = untimed_table(report)
        return plain(final_table(report)) + (f"\n{plain(untimed)}" if untimed.rows else "")

    def save(self, path: Path) -> None:
        """Append the records to a file of JSON lines; :func:`.record.read_records` reads it back."""
        append_records(path, self.records)


def profile(
    subjects: Mapping[str, Subject],
    baseline: str = "dense",
    *,
    batches: Sequence[int] = (1,),
    duration_s: float = DURATION_S,
    warmup_ms: float = WARMUP_MS,
    min_iterations: int = MIN_ITERATIONS,
    block_ms: float = BLOCK_MS,
    facts: Mapping[str, Facts] | None = None,
    poll: Callable[[], None] | None = None,
    clock: Clock = HOST_CLOCK,
) -> Profile:
    """Time all subjects side by side on the same inputs, at each batch size.

    An engine that cannot run here gets one record, at the first batch size, with the reason and no times.

    Args:
        subjects: name to engine, to a runner of :func:`deploy_sparse.load_engine` (which stays open), or to a callable
            without arguments; one target for all.
        baseline: the name that the others are compared with.
        batches: batch sizes, each within the engines' range; for callables only a label.
        duration_s: timed seconds per subject and batch, a floor like ``min_iterations``.
        warmup_ms: untimed ms per subject and batch before that.
        min_iterations: timed calls per subject and batch, at least.
        block_ms: length of one block in ms before the next subject has its turn.
        facts: by subject name, what the manifest does not say, for example the accuracy.
        poll: called between blocks; what it raises ends the run.
        clock: replaced in tests.

    Raises:
        ConfigError: no subject or one of another type, an unknown baseline, a bad batch or duration, several targets.
        EngineError: outputs that are not finite or differ in shape from the baseline's; the engine's own complaint
            about a batch outside its range passes through.
    """
    engines = checked_engines(subjects, baseline)
    batches = checked_batches(batches)
    _check_facts(facts, tuple(engines))
    unable = {name: reason for name, engine in engines.items() if (reason := engine.runnable()) is not None}
    able = [name for name in engines if name not in unable]
    floors: dict[str, Any] = {
        "warmup_ms": warmup_ms,
        "duration_s": duration_s,
        "min_iterations": min_iterations,
        "block_ms": block_ms,
    }
    make = partial(
        LatencyRecord,
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        baseline=baseline,
        environment=environment(),
    )
    records = []
    with ExitStack() as stack:
        runners = {name: stack.enter_context(engines[name].open()) for name in able}
        reference = baseline if baseline in runners else next(iter(runners), baseline)
        feeds = {batch: checked_feeds(runners, reference, batch) for batch in batches} if runners else {}
        for batch in batches:
            # Prepared per batch: a runner may reuse its buffers for the next size.
            calls = {name: runner.prepare(feeds[batch]) for name, runner in runners.items()}
            mhz = _processor_mhz()
            samples = interleave(calls, poll=poll, clock=clock, **floors) if calls else {}
            clocks = (mhz, after) if mhz and (after := _processor_mhz()) else None
            for name, engine in engines.items():
                if name in unable and batch != batches[0]:
                    continue  # one record says why it has no times; a second would say nothing more
                others = tuple(other for other in samples if other != name) if name in samples else ()
                records.append(
                    make(
                        date=datetime.now(UTC).replace(microsecond=0),
                        subject=name,
                        batch=batch,
                        conditions=Conditions(
                            threads=target_of(engine.manifest).get("threads"),
                            interleaved_with=others,
                            processor_mhz=clocks if name in samples else None,
                            **floors,
                        ),
                        **_what(engine.manifest, (facts or {}).get(name, Facts())),
                        **(_times(samples[name]) if name in samples else _no_times(unable[name])),
                    )
                )
    return Profile(tuple(records), compare_all(records))


def _check_facts(facts: Any, known: tuple[str, ...]) -> None:
    if facts is not None and not isinstance(facts, Mapping):
        raise ConfigError(
            f"the facts are of type {type(facts).__name__}",
            expected="a dictionary from subject name to Facts",
            fix='give for example {"dense": Facts(accuracy=0.95)}',
        )
    for name, fact in (facts or {}).items():
        check_known(name, known, "subject in facts")
        if not isinstance(fact, Facts):
            raise ConfigError(
                f"the facts of {name!r} are of type {type(fact).__name__}",
                expected="a Facts of deploy_sparse.measure.profile",
                fix="give for example Facts(accuracy=0.95)",
            )


def _times(samples: Samples) -> dict[str, Any]:
    stats = summarise([sample for block in samples.blocks_ms for sample in block])
    return {"status": "timed", "stats": stats, "cpu_ms": samples.cpu_ms, "samples_ms": samples.blocks_ms}


def _no_times(reason: str) -> dict[str, Any]:
    return {"status": NOT_TIMED, "reason": reason.removeprefix(f"{NOT_TIMED}: ")}


def _what(manifest: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The fields of a record that say what was measured; facts win over the manifest."""
    target = target_of(manifest)
    hashes = {
        "engine": manifest.get("digest"),
        "onnx": manifest.get("onnx_sha256"),
        "program": manifest.get("program_sha256"),
        "ticket": facts.ticket,
        "target": manifest.get("target_digest"),
    }
    return {
        "target": target["name"],
        "runtime": target["runtime"],
        "accuracy": facts.accuracy,
        "parameters": manifest.get("parameters") if facts.parameters is None else facts.parameters,
        "macs": manifest.get("macs") if facts.macs is None else facts.macs,
        "engine_bytes": manifest.get("bytes"),
        "build_seconds": manifest.get("build_seconds"),
        "peak_memory_bytes": facts.peak_memory_bytes,
        "hashes": {kind: digest for kind, digest in hashes.items() if digest},
    }


def _processor_mhz() -> float | None:
    """The fastest core's clock in MHz right now, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    return max(clocks, default=0.0) or None
