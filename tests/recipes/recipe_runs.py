"""Small recipe runs: in this process, or in one of their own where signals, exit codes or a fresh start are the point."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = [
    "--model.arguments", "{widths = [16, 16, 32]}", "--fit.epochs", "3", "--fit.warmup_epochs", "0", "--fit.checkpoint_every", "1", "--imp.rounds", "2", "--imp.rewind_epoch", "1",
    "--refill.rounds", "[1, 2]", "--refill.multiple", "4", "--runtime.threads", "1", "--deploy.targets", '["cpu"]',
    "--deploy.batches", "[1]", "--deploy.duration_s", "0.1",
]  # fmt: skip

REGROUP = [
    "--model.arguments", "{blocks = [1], widths = [32]}", "--data.arguments", "{train_images = 200, validation_images = 50, test_images = 50}", "--fit.epochs", "2", "--runtime.threads", "1", "--imp.rounds", "2",
    "--imp.rewind_epoch", "1", "--regroup.rounds", "[1, 2]", "--deploy.targets", '["cpu"]', "--deploy.batches", "[1]", "--deploy.duration_s", "0.05",
]  # fmt: skip
DST = [
    "--model.arguments", "{widths = [16, 16, 32]}", "--fit.epochs", "6", "--fit.warmup_epochs", "0", "--fit.checkpoint_every", "1", "--sparse.density", "0.1",
    "--explore.interval", "4", "--runtime.threads", "1", "--deploy.targets", '["cpu"]', "--deploy.batches", "[1]", "--deploy.duration_s", "0.05",
]  # fmt: skip
CHASE = [*DST, "--channels.interval", "4", "--sparse.baseline", "untrained"]
SETTINGS = {"imp_refill": SMALL, "imp_regroup": REGROUP, "chase": CHASE, "rigl": DST, "set": DST}
CONFIGS = {"imp_regroup": "resnet_synthetic"}


def words(folder: Path, *more: str, recipe: str = "imp_refill") -> list[str]:
    """What follows ``deploy-sparse``."""
    config = CONFIGS.get(recipe, "resnet_digits")
    return ["run", recipe, "--config", config, "--out", str(folder), *SETTINGS[recipe], *more]


def command(folder: Path, *more: str, recipe: str = "imp_refill") -> list[str]:
    return [sys.executable, "-m", "deploy_sparse.cli.main", *words(folder, *more, recipe=recipe)]


def finish(folder: Path, *more: str, recipe: str = "imp_refill") -> dict:
    """Run to the end in this process with little warm-up, leave torch as it was, and return the JSON result."""
    import torch

    from deploy_sparse.cli.main import main
    from deploy_sparse.measure.profile import profile

    threads, mode, benchmark = (
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.backends.cudnn.benchmark,
    )
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setitem(profile.__kwdefaults__, "warmup_ms", 10.0)
            code = main(words(folder, "--json", *more, recipe=recipe))
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue())


def finish_afresh(folder: Path, *more: str, recipe: str = "imp_refill") -> dict:
    """The same in a new process, which knows nothing but the folder."""
    answer = subprocess.run(
        command(folder, "--json", *more, recipe=recipe), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def finished_once(factory: pytest.TempPathFactory, recipe: str) -> tuple[Path, dict]:
    """(folder, JSON result) of one run for the whole session: a worker makes it, all work on copies of their own."""
    temporary = factory.getbasetemp()
    common = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary
    name = f"{recipe}-{CONFIGS.get(recipe, 'resnet_digits')}"
    made, result = common / "runs-of-all" / name, common / "runs-of-all" / f"{name}.json"
    made.parent.mkdir(exist_ok=True)
    with (made.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(made, ignore_errors=True)  # of a worker that failed
            result.write_text(json.dumps(finish(made, recipe=recipe)))
    folder = Path(shutil.copytree(made, factory.mktemp("runs") / name))
    return folder, json.loads(result.read_text().replace(str(made), str(folder)))


def stop_when(
    folder: Path, appears: str, number: signal.Signals, delay: float, *more: str, recipe: str = "imp_refill"
) -> subprocess.CompletedProcess:
    """Start a run, wait until ``appears`` exists in its folder plus ``delay`` seconds, and send it a signal."""
    line, pipes = command(folder, *more, recipe=recipe), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, text=True, env={**os.environ}, **pipes) as process:
        try:
            deadline = time.monotonic() + 300
            while not (folder / appears).exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(delay)
            process.send_signal(number)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()  # one that hangs fails its own test alone
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
