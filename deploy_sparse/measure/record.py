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
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from .. import artifact
from ..config import Config
from ..errors import ArtifactError
from .timing import Stats, summarise

SCHEMA_VERSION: Final = 1
NOT_TIMED = "compiled, not timed here"
_FILE_OF_RECORDS = f"a file of latency records (.jsonl), one of schema version {SCHEMA_VERSION} in every line"

Milliseconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Conditions(Config):
    """How a subject was timed. Times in ms and s as named; ``processor_mhz`` is before and after, where known."""

    threads: int | None = None
    warmup_ms: float
    duration_s: float
    min_iterations: int
    block_ms: float
    interleaved_with: tuple[str, ...] = ()
    processor_mhz: tuple[float, float] | None = None


class LatencyRecord(Config):
    """One subject × target × batch of one run.

    ``samples_ms[i][j]`` is call *j* of block *i*; blocks of equal *i* in one run are pairs. ``cpu_ms`` is the mean
    process CPU time of a call. ``accuracy`` is a fraction. ``hashes`` names what the subject was made from:
    ``engine``, ``onnx``, ``ticket``, ``target``, where known.

    Raises:
        ArtifactError: samples, statistics and status that contradict each other.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: Annotated[str, Field(min_length=1)]
    date: AwareDatetime
    subject: Annotated[str, Field(min_length=1)]
    baseline: Annotated[str, Field(min_length=1)]
    target: Annotated[str, Field(min_length=1)]
    runtime: str
    batch: Annotated[int, Field(ge=1)]
    status: Literal["timed", "compiled, not timed here"]
    reason: str | None = None
    stats: Stats | None = None
    cpu_ms: Annotated[float, Field(ge=0)] | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    parameters: Count | None = None
    macs: Count | None = None
    engine_bytes: Count | None = None
    build_seconds: Annotated[float, Field(ge=0)] | None = None
    peak_memory_bytes: Count | None = None
    hashes: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    conditions: Conditions
    samples_ms: tuple[Annotated[tuple[Milliseconds, ...], Field(min_length=1)], ...] = ()

    @property
    def timed(self) -> bool:
        """Whether this record holds times."""
        return self.status == "timed"

    @model_validator(mode="after")
    def _no_made_up_times(self) -> LatencyRecord:
        if self.date.utcoffset():
            raise self._contradiction(f"is dated {self.date.isoformat()}", "a date in UTC")
        if not self.timed:
            if self.samples_ms or self.stats is not None or self.cpu_ms is not None:
                raise self._contradiction(f"is {self.status!r} but holds times", "no samples and no statistics")
            if not self.reason:
                raise self._contradiction(f"is {self.status!r} without a reason", "the reason, in words")
            return self
        if not self.samples_ms or self.stats is None or self.reason is not None:
            raise self._contradiction(
                "is 'timed' without samples and statistics, or with a reason not to be",
                "raw samples, their statistics and no reason",
            )
        actual = summarise([sample for block in self.samples_ms for sample in block])
        if not all(  # the last bits of a mean may differ between machines
            math.isclose(stated, found, rel_tol=1e-6, abs_tol=1e-9)
            for stated, found in zip(asdict(self.stats).values(), asdict(actual).values(), strict=True)
        ):
            raise self._contradiction("has statistics that are not those of its samples", "stats=summarise(samples)")
        return self

    def _contradiction(self, what: str, expected: str) -> ArtifactError:
        return ArtifactError(
            f"the record of {self.subject!r} at batch {self.batch} {what}",
            expected=expected,
            fix="measure again; do not edit records",
        )

    def to_json_line(self) -> str:
        """This record as one line of JSON, without the line end; samples come last."""
        return self.model_dump_json()


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
        expected=f"one latency record of schema version {SCHEMA_VERSION} as JSON",
        fix=f"restore {path.name} from a copy, or measure again into another file",
    )


def _record(line: bytes) -> LatencyRecord:
    version = content.get("schema_version") if isinstance(content := json.loads(line), dict) else None
    if version != SCHEMA_VERSION:
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
