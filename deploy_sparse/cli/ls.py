"""List the recipes with their configs, and the build targets."""

from __future__ import annotations

import argparse
from textwrap import wrap

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
        parts = []
        for recipe in found.values():
            configs = "  ".join(recipe.configs) or "(no configs)"
            parts += [
                recipe.name,
                f"  {recipe.summary}",
                *wrap(configs, 110, initial_indent="    ", subsequent_indent="    "),
            ]
        rows = [(name, target.runtime, target.description) for name, target in targets.items()]
        return "\n".join([*parts, "", table(("target", "runtime", "description"), rows)])

    emit(options, value, text)
    return 0
