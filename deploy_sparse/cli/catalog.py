"""Where recipes and their configs are, what they are called, and how one is loaded."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import Config, config_from, parse_overrides, read_toml
from ..errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Recipe:
    """A recipe file; ``configs`` are the TOML files made for it, by name."""

    name: str
    path: Path
    summary: str
    configs: dict[str, Path]


def recipes_folder() -> Path:
    """The checkout's ``recipes`` folder, or the copy the wheel carries."""
    checkout = _PACKAGE.parent / "recipes"
    return checkout if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir() else _PACKAGE / "_recipes"


def recipes() -> dict[str, Recipe]:
    """Every shipped recipe by name; reads the files' docstrings without importing them."""
    return {path.stem: _recipe(path) for path in sorted(recipes_folder().glob("*.py"))}


def find_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a user's own by path (``./mine.py``).

    Raises:
        ConfigError: no such recipe.
    """
    if name.endswith(".py") or "/" in name:
        if not Path(name).is_file() or not name.endswith(".py"):
            what = "is no .py file" if Path(name).exists() else "does not exist"
            raise ConfigError(f"recipe file {name} {what}", expected="a Python file", fix="check the path")
        return _recipe(Path(name))
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"unknown recipe {name!r}",
            expected=f"one of {', '.join(known)}, or the path of a recipe file",
            fix=f"{nearest(name, list(known))}see deploy-sparse ls",
        )
    return known[name]


def find_config(recipe: Recipe, name: str) -> Path:
    """One of the recipe's configs by name, or a TOML file by path.

    Raises:
        ConfigError: no such config.
    """
    if name.endswith(".toml") or "/" in name:
        if not Path(name).is_file():
            raise ConfigError(f"config file {name} does not exist", expected="a TOML file", fix="check the path")
        return Path(name)
    if name not in recipe.configs:
        known = ", ".join(recipe.configs)
        raise ConfigError(
            f"unknown config {name!r} for recipe {recipe.name}",
            expected=f"one of {known}, or the path of a TOML file" if known else "the path of a TOML file",
            fix=f"{nearest(name, list(recipe.configs))}see deploy-sparse ls, or copy a config here: deploy-sparse cp",
        )
    return recipe.configs[name]


def load_recipe(recipe: Recipe) -> ModuleType:
    """Import a recipe file under a private name.

    Raises:
        ConfigError: it lacks ``RecipeConfig``, ``check`` or ``main``.
    """
    name = f"_deploy_sparse_recipe_{recipe.name}"
    module = ModuleType(name)
    module.__file__ = str(recipe.path)
    sys.modules[name] = module  # pydantic resolves annotations through it
    try:
        exec(compile(recipe.path.read_bytes(), recipe.path, "exec"), module.__dict__)
    except (ImportError, SyntaxError, NameError, AttributeError, ValueError, TypeError) as problem:
        raise ConfigError(
            f"{recipe.path} cannot be loaded ({type(problem).__name__}: {problem})",
            expected="a recipe that imports without error",
            fix=f"see the traceback of: python {recipe.path}",
        ) from problem
    if not all(hasattr(module, name) for name in ("RecipeConfig", "check", "main")):
        raise ConfigError(
            f"{recipe.path} is no recipe",
            expected="a class RecipeConfig(Config) and functions check(config) and main(config, run)",
            fix="start from a copy: deploy-sparse cp imp_refill",
        )
    return module


def load_config(
    module: ModuleType, file: Path | None, overrides: list[str]
) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The recipe's configuration, and the layers it was made of (``file``, ``command line``) for :mod:`.cat`.

    Raises:
        ConfigError: an unknown key or an unusable value, in either layer.
    """
    layers = {"file": read_toml(file) if file else {}, "command line": parse_overrides(overrides)}
    config_from(module.RecipeConfig, layers["file"], source=str(file))  # so that an error names the file
    return config_from(module.RecipeConfig, *layers.values(), source="the command line"), layers


def _recipe(path: Path) -> Recipe:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    except (SyntaxError, ValueError) as problem:
        raise ConfigError(
            f"{path} is no Python file ({problem})", expected="a recipe", fix="start from a copy: deploy-sparse cp"
        ) from None
    configs = {p.stem: p for p in sorted((path.parent / "configs" / path.stem).glob("*.toml"))}
    return Recipe(path.stem, path, docstring.partition("\n")[0], configs)
