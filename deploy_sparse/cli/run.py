"""Run a recipe. Any key of its configuration can be given as --key value; see them with: deploy-sparse cat RECIPE."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..errors import DeploySparseError, Interrupted
from .output import emit, key_values, result_text

if TYPE_CHECKING:
    from ..train.distributed import World

EXAMPLES = """  deploy-sparse run imp_refill --config resnet_digits
  deploy-sparse run imp_refill --config resnet_digits --seed 1 --fit.epochs 20 --out runs/second
  deploy-sparse run imp_refill --config resnet_digits --resume
  deploy-sparse run ./my_recipe.py --config ./my_config.toml

several GPUs, or several processes on the CPU, train as one:
  torchrun --nproc-per-node 2 -m deploy_sparse.cli.main run imp_refill --config resnet_digits

a stopped run exits with 128 + the signal's number (130 for SIGINT, 143 for SIGTERM), bad input with 2; under torchrun
the exit code is torchrun's own, 1 for any failure or stop
"""
TAKES_OVERRIDES = True
TORCHRUN_GRACE_S = 5.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name (deploy-sparse ls) or file")
    parser.add_argument("--config", help="a config's name or TOML file; the recipe's defaults without it")
    parser.add_argument("--out", help="run folder; runs/<recipe>-<config> by default")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder, or start it")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")


def execute(options: argparse.Namespace) -> int:
    from ..train.distributed import ElsewhereError, joined

    with joined() as world:
        try:
            return _execute(options, world)
        except DeploySparseError as problem:
            if world.main:
                raise
            if not isinstance(problem, ElsewhereError | Interrupted):  # the first process does not know of it
                print(f"error: process {world.rank}: {problem.given}", file=sys.stderr, flush=True)
            if not isinstance(problem, Interrupted):
                time.sleep(TORCHRUN_GRACE_S)  # torchrun ends all with the first one that fails: let the message out
            return problem.exit_code


def _execute(options: argparse.Namespace, world: World) -> int:
    from ..train.console import Console
    from ..train.interrupt import Interrupts
    from ..train.run import open_run
    from ..train.runtime import NEUTRAL
    from .catalog import find_config, find_recipe, load_config, load_recipe

    def prepare() -> tuple[str, Any, Any, Path]:
        recipe = find_recipe(options.recipe)
        file = find_config(recipe, options.config) if options.config else None
        module = load_recipe(recipe)
        config, _ = load_config(module, file, options.overrides)
        module.check(config)
        folder = Path(options.out or f"runs/{recipe.name}-{file.stem if file else 'default'}")
        return recipe.name, module, config, folder

    name, module, config, folder = world.main_first(prepare)
    command = _resume_command(options, world.size)
    with (
        Interrupts(command, grace_s=TORCHRUN_GRACE_S if world.size > 1 else 0.0) as interrupts,
        open_run(
            folder,
            name,
            config.model_dump(mode="json"),
            resume=options.resume,
            command=command,
            console=Console(quiet=options.quiet),
            poll=interrupts.poll,
            changeable=("deploy", *(f"runtime.{key}" for key in sorted(NEUTRAL))),
        ) as run,
    ):
        result = module.main(config, run)
        run.finish(result)
    if world.main:
        emit(options, {"folder": str(folder), **result}, lambda: _text(folder, result))
    return 0


def _text(folder: Path, result: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in result.items() if isinstance(value, str | int)}
    return f"\n{result_text(result)}\n\n{key_values({'run folder': folder, **shown})}"


def _resume_command(options: argparse.Namespace, processes: int) -> str:
    words = ["deploy-sparse"]
    if processes > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        words = ["torchrun", *(["--nnodes", str(processes // here)] if here < processes else [])]
        words += ["--nproc-per-node", str(here), "-m", "deploy_sparse.cli.main"]
    words += ["run", options.recipe]
    for option in ("config", "out"):
        if value := getattr(options, option):
            words += [f"--{option}", value]
    words += [*options.overrides, "--resume"]
    return " ".join(quote(word) for word in words)
