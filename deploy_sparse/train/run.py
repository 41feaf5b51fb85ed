"""A run folder: everything one recipe run makes, and how it is continued after any interruption."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from .. import artifact
from ..config import differences, flatten
from ..errors import ArtifactError, RunError
from .console import Console, Silence
from .distributed import poll_together, world

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """An open run folder. Make one with :func:`open_run`.

    Under torchrun every process holds one; only the first process writes and prints through it.

    Attributes:
        folder: where everything goes.
        recipe: the recipe's name.
        config: the full configuration as JSON values.
        console: for progress.
        poll: raises when this process was asked to stop; call it in every long loop outside a stage.
        command: the command that continues this run.
        origin: the command that started it.
    """

    folder: Path
    recipe: str
    config: Mapping[str, Any]
    console: Console
    poll: Callable[..., None]
    command: str
    origin: str
    started: str

    def once(self, name: str, make: Callable[[], T], save: Callable[[T, Path], Any], load: Callable[[Path], T]) -> T:
        """The stage ``name``: loaded when an earlier attempt finished it, otherwise made and saved.

        Under torchrun every process calls this alike, and the first one's folder decides.

        Args:
            make: computes the value.
            save: writes it atomically to a folder or file.
            load: reads it back, verifying it.
        """
        poll_together(self.poll)
        target = self.folder / name
        if world().agree(target.exists()):
            try:
                value = world().main_first(lambda: load(target))
            except ArtifactError as problem:
                raise ArtifactError(
                    problem.given, expected=problem.expected, fix=f"remove {target} and continue with: {self.command}"
                ) from None
            self.console.say(f"{name}: already there")
            return value
        value = make()
        world().main_only(lambda: save(value, target))
        poll_together(self.poll)
        return value

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``, unless an earlier attempt did."""
        if not world().main:
            return
        path, line = self.folder / "metrics.jsonl", json.dumps(row) + "\n"
        with artifact.writing(path), open(path, "a+") as stream:
            stream.seek(0)
            if line not in stream:
                stream.write(line)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``run.json`` with status ``finished`` and the result."""
        if not world().main:
            return
        artifact.write_json(self.folder / "run.json", {**self._description("finished"), "result": dict(result)})

    def interrupted(self, why: str) -> None:
        """Write ``run.json`` with status ``interrupted``; a finished run stays finished."""
        if not world().main or artifact.read_json(self.folder / "run.json").get("status") == "finished":
            return
        artifact.write_json(self.folder / "run.json", {**self._description("interrupted"), "why": why})

    def _description(self, status: str) -> dict[str, Any]:
        return {
            "kind": "run",
            "recipe": self.recipe,
            "status": status,
            "started": self.started,
            "updated": _now(),
            "command": self.command,
            "origin": self.origin,
            "processes": world().size,
            "config": dict(self.config),
            "environment": artifact.environment(),
        }


@contextlib.contextmanager
def open_run(
    folder: Path,
    recipe: str,
    config: Mapping[str, Any],
    *,
    resume: bool,
    command: str,
    console: Console,
    poll: Callable[..., None] = lambda *saved: None,
    changeable: tuple[str, ...] = (),
) -> Iterator[Run]:
    """Start a run in a free folder, or continue the one in it; the folder is locked while open.

    Under torchrun every process opens the run alike; the first one looks, decides and holds the lock.

    Args:
        changeable: keys of the configuration, or whole tables, that may differ when a run is continued, because no
            earlier result depends on them.

    Raises:
        RunError: the folder holds another run, other files, a run of another configuration, or a running process.
        ArtifactError: the folder cannot be written.
    """
    folder = Path(folder)
    previous: dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        world().main_only(lambda: previous.update(_taken(folder, recipe, config, resume, changeable, console, held)))
        facts = [previous.get("origin", command.removesuffix(" --resume")), previous.get("started", _now())]
        run = Run(folder, recipe, config, console if world().main else Silence(), poll, command, *world().agree(facts))
        if previous.get("status") != "finished":
            world().main_only(lambda: artifact.write_json(folder / "run.json", run._description("running")))
        try:
            yield run
        except BaseException as problem:
            with contextlib.suppress(ArtifactError):
                run.interrupted(str(problem).splitlines()[0] if str(problem) else type(problem).__name__)
            raise


def _taken(
    folder: Path,
    recipe: str,
    config: Mapping[str, Any],
    resume: bool,
    changeable: tuple[str, ...],
    console: Console,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    """Lock the folder, refuse what must not be continued, and sweep; the run that was there, if any."""
    _refuse_foreign(folder, resume)
    with artifact.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(_locked(folder))
    _refuse_occupied(folder, resume)
    previous = _previous(folder, recipe, config, changeable, console)
    for leftover in folder.rglob(".tmp-*"):  # of a killed process: this one holds the lock
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    _cut_torn_line(folder / "metrics.jsonl")
    return previous


def _refuse_foreign(folder: Path, resume: bool) -> None:
    if not folder.is_dir() or (folder / "run.json").is_file():
        return
    ours = resume and (folder / ".lock").is_file()  # a run whose run.json was removed
    if not ours and any(not p.name.startswith((".lock", ".tmp-")) for p in folder.iterdir()):
        raise RunError(
            f"{folder} is not empty and holds no run", expected="a free folder", fix="choose another one: --out DIR"
        )


def _refuse_occupied(folder: Path, resume: bool) -> None:
    if (folder / "run.json").is_file() and not resume:
        found = read_run(folder)
        raise RunError(
            f"{folder} already holds a run of {found.get('recipe')} (status: {found.get('status')})",
            expected="a free folder",
            fix="continue it with --resume, or choose another folder with --out DIR",
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``run.json``.

    Raises:
        RunError: damaged; nothing but the status and the table of results is lost with it.
    """
    try:
        found = artifact.read_json(folder / "run.json")
    except ArtifactError as problem:
        found = problem
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict) or "recipe" not in found:
        raise RunError(
            f"{folder / 'run.json'} is damaged",
            expected="the file as the run wrote it",
            fix=f"remove {folder / 'run.json'} and continue the run with --resume; what is finished is found again",
        )
    return found


def _previous(
    folder: Path, recipe: str, config: Mapping[str, Any], changeable: tuple[str, ...], console: Console
) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        return {}
    found = read_run(folder)
    before, now = (dict(flatten(c)) for c in (found["config"], json.loads(json.dumps(config))))
    fixed = [k for k in {**before, **now} if not any(f"{k}.".startswith(f"{free}.") for free in changeable)]
    changed = differences(*({k: c[k] for k in fixed if k in c} for c in (before, now)))
    if found.get("recipe") != recipe:
        changed.insert(0, f"recipe: {found.get('recipe')} -> {recipe}")
    if changed:
        keys = before.keys() != now.keys()
        version = " (if you made none: with the version of deploy_sparse that it was started with)" * keys
        raise RunError(
            f"{folder} holds a run of another configuration: {'; '.join(changed)}",
            expected="the configuration it was started with",
            fix=f"drop these changes to continue it{version}, or start a new run with --out DIR",
        )
    elsewhere = differences(
        {**found.get("environment", {}), "processes": found.get("processes", 1)},
        {**artifact.environment(), "processes": world().size},
    )
    if elsewhere:
        console.warn(
            f"this run was started elsewhere, its numbers may differ in the last digits: {'; '.join(elsewhere)}"
        )
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with artifact.writing(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is running in {folder}",
                expected="one process a run folder",
                fix="wait for it to end, or choose another folder with --out DIR",
            ) from None
        yield
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path) -> None:
    """Drop the unfinished last line that a killed process may have left; its epoch is trained again."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        artifact.write_bytes(path, content[: content.rfind(b"\n") + 1])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
