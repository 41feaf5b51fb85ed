"""List the recipes with their configs, and the build targets."""

from __future__ import annotations

import argparse

from .output import emit, table

EXAMPLES = """  deploy-sparse ls
  deploy-sparse ls --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(options: argparse.Namespace) -> int:
    from ..engine.target import list_targets, load_target
    from .catalog import recipes

    found = {name: recipe for name, recipe in recipes().items()}
    targets = {name: load_target(name) for name in list_targets()}
    value = {
        "recipes": {
            n: {"summary": r.summary, "configs": list(r.configs), "path": str(r.path)} for n, r in found.items()
        },
        "targets": {n: {"runtime": t.runtime, "description": t.description} for n, t in targets.items()},
    }

    def text() -> str:
        rows = [(r.name, c) for r in found.values() for c in (r.configs or ["-"])]
        summaries = [f"{r.name}: {r.summary}" for r in found.values()]
        parts = [table(("recipe", "config"), rows), "", *summaries, ""]
        parts.append(
            table(("target", "runtime", "description"), [(n, t.runtime, t.description) for n, t in targets.items()])
        )
        return "\n".join(parts)

    emit(options, value, text)
    return 0
