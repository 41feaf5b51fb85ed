"""The folder of a suite's run: what it is a run of, what it holds already, and what it refuses to be continued with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from .. import artifact
from ..config import Config, differences
from ..engine.cuda.gpu import local_gpu
from ..engine.target import Target
from ..errors import ArtifactError, RunError
from ..measure.record import LatencyRecord, append_records, check_appendable, read_records
from .config import Suite
from .layers import LayerFacts

Kind = TypeVar("Kind", bound=Config)
STATE, RECORDS, SUBJECTS, LAYERS = "suite.json", "records.jsonl", "subjects.jsonl", "layers.jsonl"
_GROWING = ("forms", "networks")  # of a suite: new ones may come, those that the folder knows stay as they are


class SubjectFacts(Config):
    """What the records do not say of a subject: how it was made, and of its MACs how many lie where nothing was cut."""

    network: str
    subject: str
    target: str
    how: str
    parity: str = ""
    macs: int | None = None
    dense_macs: int | None = None
    whole_macs: int | None = None


def machine() -> dict[str, Any]:
    """Versions and hardware, with the GPU where there is one."""
    gpu = local_gpu()
    return {**artifact.environment(), **({"gpu": f"{gpu.name} ({gpu.capability})"} if gpu else {})}


@dataclass(frozen=True)
class Folder:
    """An open folder of one suite's run; make one with :func:`opened`."""

    path: Path
    suite: Suite

    @property
    def records(self) -> tuple[LatencyRecord, ...]:
        """All records so far, in the order of their measurement."""
        file = self.path / RECORDS
        return read_records(file) if file.exists() and file.stat().st_size else ()

    @property
    def subjects(self) -> dict[tuple[str, str, str], SubjectFacts]:
        """What is known of the subjects, by network, subject and target."""
        return {(facts.network, facts.subject, facts.target): facts for facts in self._facts(SUBJECTS, SubjectFacts)}

    @property
    def layers(self) -> dict[tuple[str, str, str], LayerFacts]:
        """Layers' times, by network, subject and target."""
        return {(facts.network, facts.subject, facts.target): facts for facts in self._facts(LAYERS, LayerFacts)}

    def add(self, records: Sequence[LatencyRecord]) -> None:
        """Append records, all or none."""
        append_records(self.path / RECORDS, records)

    def describe(self, facts: SubjectFacts | LayerFacts) -> None:
        """Keep what is known of a subject, or of its layers; saying the same again changes nothing."""
        name, known = (SUBJECTS, self.subjects) if isinstance(facts, SubjectFacts) else (LAYERS, self.layers)
        if dict(known).get((facts.network, facts.subject, facts.target)) != facts:
            lines = [*self._lines(name), facts.model_dump_json()]
            artifact.write_bytes(self.path / name, "".join(f"{line}\n" for line in lines).encode())

    def _facts(self, name: str, kind: type[Kind]) -> list[Kind]:
        found = []
        for number, line in enumerate(self._lines(name), start=1):
            try:
                found.append(kind.model_validate_json(line))
            except ValidationError as problem:
                raise ArtifactError(
                    f"{self.path / name}, line {number}: {problem.errors()[0]['msg']}",
                    expected="what deploy-sparse bench wrote",
                    fix=f"restore {name} from a copy, or measure into a new folder with --out DIR",
                ) from None
        return found

    def _lines(self, name: str) -> list[str]:
        file = self.path / name
        return file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []

    def check_target(self, target: Target) -> None:
        """Refuse a target that has changed since records of that name were made.

        Raises:
            RunError: another target of that name was measured.
        """
        for record in self.records:
            digest = record.hashes.get("target")
            if record.target == target.name and digest is not None and digest != target.digest:
                raise RunError(
                    f"{self.path} holds records of another target {target.name!r} ({digest[:12]}, now "
                    f"{target.digest[:12]})",
                    expected="the target as it was when the suite was started",
                    fix="undo the change of the target, give the target another name, or measure into a new folder "
                    "with --out DIR",
                )


@contextlib.contextmanager
def opened(path: Path, suite: Suite) -> Iterator[Folder]:
    """The folder for a suite's run, new or continued; one process at a time has it.

    Raises:
        RunError: it is of another suite, was measured by other versions or on another machine, or another process has
            it.
        ArtifactError: it holds something else, or cannot be written.
    """
    path = Path(path)
    with artifact.writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        check_appendable(path / RECORDS)
        state = {
            "kind": "suite",
            "suite": suite.name,
            "measured": json.loads(json.dumps(suite.measured())),
            "machine": machine(),
        }
        file = path / STATE
        if file.exists():
            before = artifact.read_json(file)
            _refuse_another(path, before, state)
            artifact.write_json(file, _with_more(before, state))
        elif any(path.iterdir()):
            raise ArtifactError(
                f"{path} holds something else than a suite's run",
                expected="a new or empty folder, or one that deploy-sparse bench made",
                fix="choose another folder with --out DIR",
            )
        else:
            artifact.write_json(file, state)
        yield Folder(path, suite)


def _refuse_another(path: Path, before: Any, now: Mapping[str, Any]) -> None:
    if not isinstance(before, dict) or before.get("kind") != "suite":
        raise ArtifactError(
            f"{path / STATE} is not of a suite's run",
            expected="what deploy-sparse bench wrote",
            fix="choose another folder with --out DIR",
        )
    parts = {
        "suite": (
            {"suite": before.get("suite"), **before.get("measured", {})},
            {"suite": now["suite"], **_of_both(before.get("measured", {}), now["measured"])},
        ),
        "machine": (before.get("machine", {}), now["machine"]),
    }
    for what, (old, new) in parts.items():
        if changed := differences(old, new):
            holds = "another suite" if what == "suite" else "measurements of another machine or of other versions"
            raise RunError(
                f"{path} holds {holds}: {'; '.join(changed)}",
                expected=f"the {what} as it was when the run was started",
                fix="undo these changes to continue it, or measure into a new folder with --out DIR",
            )


def _of_both(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured now, without new forms and networks, and with those of before that are not asked for now."""
    old = {key: before.get(key, {}) for key in _GROWING}
    return {**now, **{key: {name: now[key].get(name, kept) for name, kept in old[key].items()} for key in _GROWING}}


def _with_more(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The state with new forms and networks besides those of before."""
    measured = {key: {**before["measured"].get(key, {}), **now["measured"][key]} for key in _GROWING}
    return {**now, "measured": {**now["measured"], **measured}}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with artifact.writing(path):
        descriptor = os.open(path, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is measuring in {path}",
                expected="one process a folder, so that times mean something",
                fix="wait for it to end, or choose another folder with --out DIR",
            ) from None
        yield
    finally:
        os.close(descriptor)
