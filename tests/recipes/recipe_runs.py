"""Small recipe runs in processes of their own, so that signals and exit codes are real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SMALL = [
    "--model.arguments", "{widths = [16, 16, 32]}", "--fit.epochs", "3", "--fit.warmup_epochs", "0", "--fit.checkpoint_every", "1", "--imp.rounds", "2", "--imp.rewind_epoch", "1",
    "--refill.rounds", "[1, 2]", "--refill.multiple", "4", "--runtime.threads", "1", "--deploy.targets", '["cpu"]',
    "--deploy.batches", "[1]", "--deploy.duration_s", "0.1",
]  # fmt: skip

REGROUP = [
    "--data.arguments", "{train_images = 200, validation_images = 50, test_images = 50}", "--fit.epochs", "2", "--runtime.threads", "1", "--imp.rounds", "1",
    "--regroup.rounds", "[1]", "--deploy.targets", '["cpu"]', "--deploy.batches", "[1]", "--deploy.duration_s", "0.05",
]  # fmt: skip


DST = [
    "--model.arguments", "{widths = [16, 16, 32]}", "--fit.epochs", "6", "--fit.warmup_epochs", "0", "--fit.checkpoint_every", "1", "--sparse.density", "0.1",
    "--explore.interval", "4", "--runtime.threads", "1", "--deploy.targets", '["cpu"]', "--deploy.batches", "[1]", "--deploy.duration_s", "0.05",
]  # fmt: skip
CHASE = [*DST, "--channels.interval", "4", "--sparse.baseline", "untrained"]
SETTINGS = {"imp_refill": SMALL, "chase": CHASE, "rigl": DST, "set": DST}


def command(folder: Path, *more: str, recipe: str = "imp_refill") -> list[str]:
    words = ["run", recipe, "--config", "resnet_digits", "--out", str(folder), *SETTINGS[recipe], *more]
    return [sys.executable, "-m", "deploy_sparse.cli.main", *words]


def finish(folder: Path, *more: str, recipe: str = "imp_refill") -> dict:
    """Run to the end and return the JSON result."""
    answer = subprocess.run(
        command(folder, "--json", *more, recipe=recipe), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def stop_when(
    folder: Path, appears: str, number: signal.Signals, delay: float, *more: str, recipe: str = "imp_refill"
) -> subprocess.CompletedProcess:
    """Start a run, wait until ``appears`` exists in its folder plus ``delay`` seconds, and send it a signal."""
    process = subprocess.Popen(
        command(folder, *more, recipe=recipe),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    deadline = time.monotonic() + 120
    while not (folder / appears).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
