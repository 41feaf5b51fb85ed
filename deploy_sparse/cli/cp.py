"""Copy a recipe, or one of its configs, to edit it. Copies run by path: deploy-sparse run ./a.py --config ./b.toml"""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import emit

EXAMPLES = """  deploy-sparse cp imp_refill my_recipe.py
  deploy-sparse cp imp_refill --config resnet_digits my_config.toml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name")
    parser.add_argument("destination", nargs="?", help="file or folder to write; this folder by default")
    parser.add_argument("--config", help="copy this config instead of the recipe")


def execute(options: argparse.Namespace) -> int:
    from .. import artifact
    from ..errors import ArtifactError
    from .catalog import find_config, find_recipe

    recipe = find_recipe(options.recipe)
    source = find_config(recipe, options.config) if options.config else recipe.path
    destination = Path(options.destination or ".")
    if destination.is_dir():
        destination = destination / source.name
    if destination.exists():
        raise ArtifactError(
            f"{destination} already exists", expected="a name that is free", fix="choose another destination"
        )
    artifact.write_bytes(destination, source.read_bytes())
    emit(options, {"source": str(source), "copy": str(destination)}, lambda: f"{destination}")
    return 0
