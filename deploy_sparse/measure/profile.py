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
from .calls import TimedCall, check_cache, check_transfers, checked_graphs, open_subject, timed_call
from .clocks import Watch
from .cold import Evictor
from .compare import Comparison, compare_all
from .contents import Report, final_table, untimed_table
from .gpu_state import GpuMonitor, gpu_monitor
from .interleave import BLOCK_MS, DURATION_S, MIN_ITERATIONS, WARMUP_MS, Samples, interleave
from .pinning import allowed_cpus, check_threads, cpu_list, pinned
from .record import NOT_TIMED, Conditions, Fraction, LatencyRecord, append_records
from .record_conditions import Cache, Transfers
from .subjects import (
    EngineLike,
    Subject,
    check_known,
    checked_batches,
    checked_engines,
    checked_feeds,
    is_plain,
    on_gpu,
    target_of,
)
from .table import plain
from .timing import HOST_CLOCK, Clock, summarise


class Facts(Config):
    """What the caller knows of a subject and its manifest does not say.

    ``network`` and ``form`` say which network it is (told of one subject it holds for all) and how it was made of it;
    ``sparsity`` and ``accuracy`` are fractions; ``precision`` is what a callable computes in, where an engine's
    manifest knows; ``ticket`` is the digest of the ticket the subject came from.
    """

    network: str | None = None
    form: str | None = None
    precision: str | None = None
    sparsity: Fraction | None = None
    accuracy: Fraction | None = None
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
    cache: Cache = "warm",
    transfers: Transfers = "excluded",
    cuda_graph: bool = False,
    cpus: Sequence[int] | None = None,
    facts: Mapping[str, Facts] | None = None,
    poll: Callable[[], None] | None = None,
    clock: Clock = HOST_CLOCK,
) -> Profile:
    """Time all subjects side by side on the same inputs, at each batch size.

    An engine that cannot run here gets one record, at the first batch size, with the reason and no times. A prepared
    call that has a device's own clock is timed on both clocks.

    Args:
        subjects: name to engine, to a runner of :func:`deploy_sparse.load_engine` (which stays open), or to a callable
            without arguments; one target for all.
        baseline: the name that the others are compared with.
        batches: batch sizes, each within the engines' range; for callables only a label.
        duration_s: timed seconds per subject and batch, a floor like ``min_iterations``.
        warmup_ms: untimed ms per subject and batch before that.
        min_iterations: timed calls per subject and batch, at least.
        block_ms: length of one block in ms before the next subject has its turn.
        cache: ``"cold"`` evicts the processors' caches before each call, outside of what is timed; ``duration_s``
            counts that too. Not for GPUs.
        transfers: ``"included"`` times ``run``, from NumPy arrays to NumPy arrays, instead of calls on inputs that are
            in place.
        cuda_graph: open the engines so that calls replay CUDA graphs.
        cpus: processors to run on, for all threads of this process; afterwards they are as they were.
        facts: by subject name, what the manifest does not say, for example the accuracy.
        poll: called between blocks; what it raises ends the run.
        clock: replaced in tests.

    Raises:
        ConfigError: no subject or one of another type, an unknown baseline, a bad batch or duration, several targets,
            precisions or networks, or a way of timing that the subjects or the machine do not have.
        EngineError: outputs that are not finite or differ in shape from the baseline's; the engine's own complaint
            about a batch outside its range passes through.
    """
    engines = checked_engines(subjects, baseline)
    batches = checked_batches(batches)
    _check_facts(facts, tuple(engines))
    what = {name: _what(engine.manifest, (facts or {}).get(name, Facts())) for name, engine in engines.items()}
    _check_one(what, "precision", "what a lower one gains is not the ticket's doing")
    network = _check_one(what, "network", "another network is not the same one made smaller")
    what = {name: {**fields, "network": network} for name, fields in what.items()}
    check_transfers(engines, transfers)
    check_cache(engines, cache)
    graphs = checked_graphs(engines, cuda_graph, transfers)
    check_threads(cpus, target_of(engines[baseline].manifest).get("threads"))
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
        stack.enter_context(pinned(cpus))
        allowed = allowed_cpus()
        evictor = stack.enter_context(Evictor(allowed or ())) if cache == "cold" and able else None
        watch = Watch(_monitor(stack, [engines[name] for name in able]))
        runners = {name: stack.enter_context(open_subject(engines[name], cuda_graph)) for name in able}
        reference = baseline if baseline in runners else next(iter(runners), baseline)
        feeds = {batch: checked_feeds(runners, reference, batch) for batch in batches} if runners else {}
        for batch in batches:
            # Prepared per batch: a runner may reuse its buffers for the next size.
            calls = {name: timed_call(runner, feeds[batch], transfers) for name, runner in runners.items()}
            samples = _timed(calls, evictor, watch, poll, clock, floors) if calls else {}
            seen = watch.stop() if calls else {}
            for name, engine in engines.items():
                if name in unable and batch != batches[0]:
                    continue  # one record says why it has no times; a second would say nothing more
                conditions: dict[str, Any] = {"threads": target_of(engine.manifest).get("threads"), **floors}
                if name in samples:
                    conditions |= {
                        **seen,
                        "interleaved_with": tuple(other for other in samples if other != name),
                        "transfers": None if is_plain(engine) else transfers,
                        "cuda_graph": graphs[name],
                        "cache": cache,
                        "evicted_bytes": None if evictor is None else evictor.bytes,
                        "cpus": None if allowed is None else cpu_list(allowed),
                    }
                records.append(
                    make(
                        date=datetime.now(UTC).replace(microsecond=0),
                        subject=name,
                        batch=batch,
                        conditions=Conditions(**conditions),
                        **what[name],
                        **(_times(samples[name]) if name in samples else _no_times(unable[name])),
                    )
                )
    return Profile(tuple(records), compare_all(records))


def _monitor(stack: ExitStack, engines: Sequence[EngineLike]) -> GpuMonitor | None:
    """What looks at the GPU, where subjects run on one and something can."""
    monitor = gpu_monitor() if any(on_gpu(engine.manifest) for engine in engines) else None
    return None if monitor is None else stack.enter_context(monitor)


def _timed(
    calls: Mapping[str, TimedCall],
    evictor: Evictor | None,
    watch: Watch,
    poll: Callable[[], None] | None,
    clock: Clock,
    floors: Mapping[str, Any],
) -> dict[str, Samples]:
    def look() -> None:
        if poll is not None:
            poll()
        watch.look()

    watch.start()
    return interleave(
        {name: timed.call for name, timed in calls.items()},
        device={name: timed.device_ms for name, timed in calls.items() if timed.device_ms is not None},
        before_each=evictor,
        poll=look,
        clock=clock,
        **floors,
    )


def _check_one(what: Mapping[str, Mapping[str, Any]], field: str, why: str) -> str | None:
    """The one value of a field among those that are known; none where none is."""
    known = {name: fields[field] for name, fields in what.items() if fields[field]}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in known.items())
        raise ConfigError(
            f"the subjects are of different {field}s: {listed}",
            expected=f"one {field} in one profile: {why}",
            fix=f"measure the subjects of each {field} in a run of their own",
        )
    return next(iter(known.values()), None)


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
    device = samples.device_blocks_ms
    return {
        "status": "timed",
        "stats": stats,
        "device_stats": summarise([sample for block in device for sample in block]) if device else None,
        "cpu_ms": samples.cpu_ms,
        "samples_ms": samples.blocks_ms,
        "device_samples_ms": device,
    }


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
        "network": facts.network,
        "form": facts.form,
        "precision": _precision(manifest) or facts.precision,
        "sparsity": facts.sparsity,
        "accuracy": facts.accuracy,
        "parameters": manifest.get("parameters") if facts.parameters is None else facts.parameters,
        "macs": manifest.get("macs") if facts.macs is None else facts.macs,
        "engine_bytes": manifest.get("bytes"),
        "build_seconds": manifest.get("build_seconds"),
        "peak_memory_bytes": facts.peak_memory_bytes,
        "hashes": {kind: digest for kind, digest in hashes.items() if digest},
    }


def _precision(manifest: Mapping[str, Any]) -> str | None:
    """What an engine computes in, as it was read back when it was built."""
    found = manifest.get("precision")
    if not isinstance(found, Mapping) or not found.get("built"):
        return None
    return "tf32" if found["built"] == "fp32" and found.get("tf32") else str(found["built"])
