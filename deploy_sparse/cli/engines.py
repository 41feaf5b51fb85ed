"""List the engines in a folder (ls), check every one of them (verify), or remove those nobody needs any more (gc).

ls reads manifests and compares sizes. verify checks every hash, and that the library installed here takes each
engine; it names the bad ones and exits with 2. gc removes what is damaged, unfinished, incompatible with the library
installed here, or superseded: of one name, target and GPU only the latest engine stays. It never touches engines for
GPUs that this machine does not have, nor anything that is no engine. --dry-run shows what would go.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .output import emit, table

if TYPE_CHECKING:
    from ..engine.store import Entry, Store

EXAMPLES = """  deploy-sparse engines ls
  deploy-sparse engines verify engines/out --here
  deploy-sparse engines gc --dry-run
  deploy-sparse engines gc engines/out --keep 2 --older-than 30
"""
ACTIONS = ("ls", "verify", "gc")
_UNITS = ((86400, "days"), (3600, "h"), (60, "min"))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="{ls,verify,gc}", help="what to do")
    parser.add_argument("folder", nargs="?", default="engines/out", help="folder of engines; engines/out by default")
    parser.add_argument("--here", action="store_true", help="verify: engines that do not run on this machine are bad")
    parser.add_argument("--keep", type=int, metavar="N", help="gc: engines to keep of one name, target and GPU; 1")
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="gc: of what would go, only what is older than this"
    )
    parser.add_argument("--dry-run", action="store_true", help="gc: only show what would go")


def execute(options: argparse.Namespace) -> int:
    from ..errors import ConfigError, nearest

    if options.action not in ACTIONS:
        raise ConfigError(
            f"unknown action {options.action!r}",
            expected=f"one of {', '.join(ACTIONS)}",
            fix=f"{nearest(options.action, ACTIONS)}see deploy-sparse engines --help",
        )
    given = {
        "--here": ("verify", options.here),
        "--keep": ("gc", options.keep is not None),
        "--older-than": ("gc", options.older_than is not None),
        "--dry-run": ("gc", options.dry_run),
    }
    for name, (action, present) in given.items():
        if present and action != options.action:
            raise ConfigError(
                f"{name} with {options.action}",
                expected=f"{name} with {action} only",
                fix=f"drop it, or take deploy-sparse engines {action}",
            )
    return {"ls": _ls, "verify": _verify, "gc": _gc}[options.action](options)


def _ls(options: argparse.Namespace) -> int:
    from ..engine.store import read_store

    store = read_store(options.folder, hashes=False)
    value = {"folder": str(store.folder), "engines": [e.facts() for e in store.entries], "others": list(store.others)}
    emit(options, value, lambda: _listing(store))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..engine.store import read_store

    store = read_store(options.folder)
    found = [entry for entry in store.entries if not entry.being_written]
    bad = [entry for entry in found if entry.state != "good" or (options.here and not entry.runs_here)]
    value = {
        "folder": str(store.folder),
        "engines": [entry.facts() for entry in store.entries],
        "bad": [str(entry.folder) for entry in bad],
        "others": list(store.others),
    }

    def text() -> str:
        here = sum(entry.runs_here for entry in store.entries)
        return "\n".join([*map(_note, bad), f"{len(found) - len(bad)} of {len(found)} engines good; {here} run here"])

    emit(options, value, text)
    return 2 if bad else 0


def _gc(options: argparse.Namespace) -> int:
    from ..engine.collect import collect

    keep = 1 if options.keep is None else options.keep
    done = collect(options.folder, keep=keep, older_than_days=options.older_than, dry_run=options.dry_run)
    value = {
        "folder": options.folder,
        "dry_run": options.dry_run,
        "verdicts": [verdict.facts() for verdict in done.verdicts],
        "bytes": sum(entry.bytes for entry in done.removed),
        "kept": [str(entry.folder) for entry in done.kept],
        "others": list(done.others),
    }

    def text() -> str:
        word = "would remove" if options.dry_run else "removed"
        lines = [
            f"left {v.entry.folder}: {v.left} ({v.why})" if v.left else f"{word} {v.entry.folder}: {v.why}"
            for v in done.verdicts
        ]
        total = f"{word} {_count(done.removed)}, {_size(value['bytes'])}; kept {_count(done.kept)}"
        return "\n".join([*lines, total])

    emit(options, value, text)
    return 0


def _listing(store: Store) -> str:
    columns = ("engine", "target", "runtime", "for", "precision", "size", "age", "runs here")
    rows = []
    for entry in store.entries:
        facts = entry.facts()
        known = [facts[key] or "?" for key in ("target", "runtime", "for", "precision")]
        runs = "yes" if entry.runs_here else "no" if entry.state == "good" else entry.state
        rows.append((entry.folder.name, *known, _size(entry.bytes), _age(entry.age_s), runs))
    notes = [_note(entry) for entry in store.entries if not entry.runs_here]
    return "\n".join(
        [table(columns, rows) if rows else f"no engines in {store.folder}", *([""] if notes else []), *notes]
    )


def _note(entry: Entry) -> str:
    what = "does not run here" if entry.state == "good" else entry.state
    return f"{entry.folder}: {what}: {entry.why}\n  next step: {entry.fix}"


def _count(entries: tuple[Entry, ...]) -> str:
    return "1 engine" if len(entries) == 1 else f"{len(entries)} engines"


def _size(count: int) -> str:
    for unit, word in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count} B"


def _age(seconds: float) -> str:
    for unit, word in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.0f} s"
