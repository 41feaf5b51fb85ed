"""What every test may rely on: exports at full speed, and one small finished run to read."""

import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: workers share the cores

import pytest
from recipe_runs import finish


@pytest.fixture(scope="session", autouse=True)
def _structured_torch_logs_stay_out_of_pytest():
    """pytest's log capture makes torch write a structured trace of every export, which is eight times slower."""
    logger = logging.getLogger("torch.__trace")
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


@pytest.fixture(scope="session", autouse=True)
def _layer_times_stay_out_of_the_users_cache(tmp_path_factory):
    """What the planner times, it keeps in a folder of these tests, for their processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOY_SPARSE_LAYER_TIMES", str(tmp_path_factory.mktemp("layer-times")))
        yield


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """(folder, JSON result) of a small run of imp_refill."""
    folder = tmp_path_factory.mktemp("runs") / "imp_refill-resnet_digits"
    return folder, finish(folder)
