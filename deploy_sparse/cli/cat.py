"""Print a recipe's full configuration as TOML, with where each value comes from; what is not set as comments."""

from __future__ import annotations

import argparse

from .output import emit

EXAMPLES = """  deploy-sparse cat imp_refill --config resnet_digits
  deploy-sparse cat imp_refill --config resnet_digits --fit.epochs 20
"""
TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("--config", help="a config's name or TOML file")


def execute(options: argparse.Namespace) -> int:
    from ..config import flatten, keys_of, toml_text
    from .catalog import find_config, find_recipe, load_config, load_recipe

    recipe = find_recipe(options.recipe)
    module = load_recipe(recipe)
    file = find_config(recipe, options.config) if options.config else None
    config, layers = load_config(module, file, options.overrides)
    values = config.model_dump(mode="json")
    given = {origin: {key for key, _ in flatten(layer)} for origin, layer in layers.items()}
    descriptions = {key: description for key, (_, _, description) in keys_of(module.RecipeConfig).items()}

    def origin(key: str) -> str:
        for name in ("command line", "file"):
            if any(key == known or key.startswith(f"{known}.") for known in given[name]):
                return name
        return "default"

    rows = {key: {"value": value, "origin": origin(key)} for key, value in flatten(values)}
    origins = {key: "not set" if row["value"] is None else row["origin"] for key, row in rows.items()}
    emit(options, rows, lambda: _annotated(toml_text(values, unset=True), origins, descriptions))
    return 0


def _annotated(text: str, origins: dict[str, str], descriptions: dict[str, str]) -> str:
    lines, section = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        key = section + line.removeprefix("# ").partition(" = ")[0]
        if " = " in line and key in origins:
            joint = ": " if line.startswith("# ") else "; "
            note = joint.join(filter(None, (origins[key], " ".join(descriptions.get(key, "").split()))))
            line = f"{line:<32} # {note}"
        lines.append(line)
    return "\n".join(lines)
