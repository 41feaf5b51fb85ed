"""One subject measured under one condition: what was timed, how, and from which files. Kept as JSON lines.

A record holds either raw samples or the reason why there are none. Statistics that the samples do not bear out, and
times without samples, are refused at construction; so no file of records can hold a made-up time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from .. import artifact
from ..config import Config
from ..errors import ArtifactError
from .record_conditions import SINCE_VERSION_2 as _NEW_CONDITIONS
from .record_conditions import Conditions as Conditions
from .timing import Stats, summarise

SCHEMA_VERSION: Final = 2
READABLE: Final = (1, 2)
GPU_RUNTIMES = ("tensorrt", "tensorrt-rtx", "torch-tensorrt")
NOT_TIMED: Final = "compiled, not timed here"
NOT_BUILT: Final = "not built"
_FILE_OF_RECORDS = "a file of latency records (.jsonl), one of schema version 1 or 2 in every line"
_NEW_FIELDS = frozenset({"network", "form", "precision", "sparsity", "device_stats", "device_samples_ms"})
_AS_VERSION_1: dict[str, Any] = {  # what to leave out
    **dict.fromkeys(_NEW_FIELDS, True),
    "stats": {"p95"},
    "conditions": set(_NEW_CONDITIONS),
}

Milliseconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Blocks = tuple[Annotated[tuple[Milliseconds, ...], Field(min_length=1)], ...]


class LatencyRecord(Config):
    """One subject × target × batch of one run.

    Attributes:
        network, form: which network the subject is, and how it was made of it, such as ``"resnet50"`` and
            ``"channels"``.
        precision: what it computes in, as read back from the engine: ``"fp32"``, ``"tf32"`` where products of fp32 may
            be rounded to that, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"fp8"``.
        sparsity, accuracy: fractions.
        samples_ms: ``[i][j]`` is call *j* of block *i* on the host's clock; blocks of equal *i* in one run are pairs.
        stats: of the samples. In a record of schema version 1, which does not state it, ``p95`` is filled in.
        device_samples_ms, device_stats: other calls in the same turns, on the clock of the device alone.
        cpu_ms: the mean process CPU time of a call.
        hashes: what the subject was made from: ``engine``, ``onnx``, ``ticket``, ``target``, where known.

    Raises:
        ArtifactError: samples, statistics, status and schema version that contradict each other.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    run_id: Annotated[str, Field(min_length=1)]
    date: AwareDatetime
    subject: Annotated[str, Field(min_length=1)]
    baseline: Annotated[str, Field(min_length=1)]
    target: Annotated[str, Field(min_length=1)]
    runtime: str
    batch: Annotated[int, Field(ge=1)]
    network: str | None = None
    form: str | None = None
    precision: str | None = None
    sparsity: Fraction | None = None
    status: Literal["timed", "compiled, not timed here", "not built"]
    reason: str | None = None
    stats: Stats | None = None
    device_stats: Stats | None = None
    cpu_ms: Annotated[float, Field(ge=0)] | None = None
    accuracy: Fraction | None = None
    parameters: Count | None = None
    macs: Count | None = None
    engine_bytes: Count | None = None
    build_seconds: Annotated[float, Field(ge=0)] | None = None
    peak_memory_bytes: Count | None = None
    hashes: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    conditions: Conditions
    samples_ms: Blocks = ()
    device_samples_ms: Blocks = ()

    @property
    def timed(self) -> bool:
        """Whether this record holds times."""
        return self.status == "timed"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU did the work, as far as the record tells."""
        how = self.conditions
        known = how.gpu is not None or how.cuda_graph is not None or self.device_stats is not None
        return known or self.runtime in GPU_RUNTIMES

    @model_validator(mode="after")
    def _no_made_up_times(self) -> LatencyRecord:
        if self.date.utcoffset():
            raise self._contradiction(f"is dated {self.date.isoformat()}", "a date in UTC")
        new = sorted(self.model_fields_set & _NEW_FIELDS | self.conditions.model_fields_set & _NEW_CONDITIONS)
        if self.schema_version == 1 and new:
            raise self._contradiction(f"is of schema version 1 but states {', '.join(new)}", "schema version 2")
        if self.schema_version == 1 and self.status == NOT_BUILT:
            raise self._contradiction(f"is of schema version 1 but {NOT_BUILT!r}", "schema version 2")
        if not self.timed:
            times = (self.stats, self.device_stats, self.cpu_ms)
            if self.samples_ms or self.device_samples_ms or any(value is not None for value in times):
                raise self._contradiction(f"is {self.status!r} but holds times", "no samples and no statistics")
            if not self.reason:
                raise self._contradiction(f"is {self.status!r} without a reason", "the reason, in words")
            return self
        if not self.samples_ms or self.stats is None or self.reason is not None:
            raise self._contradiction(
                "is 'timed' without samples and statistics, or with a reason not to be",
                "raw samples, their statistics and no reason",
            )
        stats = self.stats
        if self.schema_version == 1 and math.isnan(stats.p95):
            stats = replace(stats, p95=_summary(self.samples_ms).p95)
            object.__setattr__(self, "stats", stats)  # frozen; nobody has seen it yet
        self._check_stats(stats, self.samples_ms)
        if self.device_stats is not None or self.device_samples_ms:
            if self.device_stats is None or len(self.device_samples_ms) != len(self.samples_ms):
                raise self._contradiction(
                    "has times of the device without their statistics, or in other blocks than those of the host",
                    "statistics, and as many blocks on both clocks",
                )
            self._check_stats(self.device_stats, self.device_samples_ms)
        return self

    def _check_stats(self, stated: Stats, samples_ms: Blocks) -> None:
        found = asdict(_summary(samples_ms))
        for name, value in asdict(stated).items():  # the last bits of a mean may differ between machines
            if not math.isclose(value, found[name], rel_tol=1e-6, abs_tol=1e-9):
                raise self._contradiction(
                    "has statistics that are not those of its samples", "stats=summarise(samples)"
                )

    def _contradiction(self, what: str, expected: str) -> ArtifactError:
        return ArtifactError(
            f"the record of {self.subject!r} at batch {self.batch} {what}",
            expected=expected,
            fix="measure again; do not edit records",
        )

    def to_json_line(self) -> str:
        """This record as one line of JSON in its own schema version, without the line end; samples come last."""
        return self.model_dump_json(exclude=_AS_VERSION_1 if self.schema_version == 1 else None)


def _summary(samples_ms: Blocks) -> Stats:
    return summarise([sample for block in samples_ms for sample in block])


def append_records(path: Path, records: Sequence[LatencyRecord]) -> None:
    """Append records to a file of JSON lines: all of them or none, even beside another writer.

    Raises:
        ArtifactError: the file cannot be written or holds anything but records; it is left as it was.
    """
    path = Path(path)
    data = _lines(records)
    with _appending(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            existing = stream.readall()
            _parsed(path, existing)
            try:
                _write_all(stream.fileno(), data)
                os.fsync(stream.fileno())
            except BaseException:
                os.ftruncate(stream.fileno(), len(existing))  # a half-written record is no record
                raise


def check_appendable(path: Path) -> None:
    """Check that :func:`append_records` can append to ``path``, before anything is timed. Leaves nothing behind.

    Raises:
        ArtifactError: a folder, a place that cannot be written, or a file that holds anything but records.
    """
    path = Path(path)
    with _appending(path):
        if path.exists():
            with open(path, "rb+") as stream:
                _parsed(path, stream.read())
            return
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=parent):
            pass


def write_records(path: Path, records: Sequence[LatencyRecord]) -> None:
    """Replace ``path`` atomically by a file of exactly these records, whatever it held.

    Raises:
        ArtifactError: there is no record, or the folder cannot be written; an old file is untouched.
    """
    if not records:
        raise ArtifactError(
            f"no record to write to {path}", expected="at least one record", fix="measure something first"
        )
    artifact.write_bytes(path, _lines(records))


def read_records(path: Path) -> tuple[LatencyRecord, ...]:
    """Every record of a file of JSON lines, at least one.

    Raises:
        ArtifactError: missing, without a record, a torn last line, or a line that is no record; names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise ArtifactError(
            f"{path} cannot be read ({problem.strerror})",
            expected=_FILE_OF_RECORDS,
            fix="check the path, or measure with: deploy-sparse profile",
        ) from None
    if not data:
        raise ArtifactError(
            f"{path} holds no record", expected=_FILE_OF_RECORDS, fix="measure with: deploy-sparse profile"
        )
    return _parsed(path, data)


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(
                f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}",
                expected="the name of a file to append records to",
                fix=f"name a file, for example {path / 'records.jsonl' if path.is_dir() else 'records.jsonl'}",
            )
        yield
    except OSError as problem:
        raise ArtifactError(
            f"{path} cannot be written ({problem.strerror or problem})",
            expected="a file this user may append to, on a disk with room",
            fix="choose another file or free the space; nothing that was there is lost",
        ) from problem


def _lines(records: Sequence[LatencyRecord]) -> bytes:
    return "".join(f"{record.to_json_line()}\n" for record in records).encode()


def _parsed(path: Path, data: bytes) -> tuple[LatencyRecord, ...]:
    """The records in the content of a file; ``path`` is for messages."""
    *whole, rest = data.split(b"\n")
    records = []
    for number, line in enumerate([*whole, rest] if rest else whole, start=1):
        try:
            records.append(_record(line))
        except (ValueError, RecursionError, ArtifactError) as problem:
            if number > len(whole) > 0:
                raise ArtifactError(
                    f"{path}, line {number}: the last line is cut short",
                    expected="a line end after every record",
                    fix="something stopped while writing it; keep the whole lines with: "
                    f"head -n {len(whole)} {shlex.quote(str(path))} > whole.jsonl",
                ) from None
            raise _no_record(path, number, _brief(problem)) from None
    if rest:
        raise ArtifactError(
            f"{path}, line {len(records)}: the last line has no line end",
            expected="a line end after every record",
            fix=f"the record is whole; end its line with: echo >> {shlex.quote(str(path))}",
        )
    return tuple(records)


def _no_record(path: Path, number: int, why: str) -> ArtifactError:
    if number == 1:  # nothing says that records were ever in it, so nothing of it is to be removed
        return ArtifactError(
            f"{path} is no file of records (line 1: {why})",
            expected=_FILE_OF_RECORDS,
            fix="name a file that deploy-sparse profile wrote; to write records, a new name works too",
        )
    return ArtifactError(
        f"{path}, line {number}: {why}",
        expected="one latency record of schema version 1 or 2 as JSON",
        fix=f"restore {path.name} from a copy, or measure again into another file",
    )


def _record(line: bytes) -> LatencyRecord:
    version = content.get("schema_version") if isinstance(content := json.loads(line), dict) else None
    if version not in READABLE:
        raise ValueError(f"schema version {version}")
    return LatencyRecord.model_validate_json(line, strict=True)


def _brief(problem: Exception) -> str:
    if isinstance(problem, ValidationError):
        detail = problem.errors()[0]
        return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
    return str(problem.given if isinstance(problem, ArtifactError) else problem)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
