"""Dense training: the baseline, through the same code as every ticket, deployed and timed alone.

Trains the network of ``[model]`` on ``[data]`` as ``[fit]`` says, keeps the epoch with the best *validation* accuracy,
exports it to ONNX, compiles engines for ``deploy.targets`` and times them. *Test* accuracy is the deployed engine's.
Use it to see what a network reaches before looking for tickets, or to prepare a baseline engine.

Everything goes into the run folder; an interrupted run continues with ``--resume``.
Several GPUs: ``torchrun --nproc-per-node 4 -m deploy_sparse.cli.main run dense --config …``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deploy_sparse.sparsify.method import Method
from deploy_sparse.train.run import Run
from deploy_sparse.workflow.config import StudyConfig, check_study
from deploy_sparse.workflow.finish import deploy
from deploy_sparse.workflow.prepare import prepare


class RecipeConfig(StudyConfig):
    """All of the recipe's configuration."""


def check(config: RecipeConfig) -> None:
    """Refuse what cannot work before a run folder exists."""
    check_study(config)


def main(config: RecipeConfig, run: Run) -> Mapping[str, Any]:
    """Run the recipe in ``run``'s folder and return its results as JSON values."""
    work = prepare(config, run, method="dense")
    dense = work.trainer.dense(Method(), {}, rewind_epoch=0)
    return deploy(work, dense.best, None, "dense", [])


if __name__ == "__main__":
    from deploy_sparse.cli.main import main as command_line

    raise SystemExit(command_line(["run", __file__, *sys.argv[1:]]))
