"""What every test may rely on: exports at full speed, and small finished runs to read, made once for all processes."""

import functools
import gc
import logging
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: workers share the cores

import pytest
from recipe_runs import finished_once


@pytest.fixture(scope="session", autouse=True)
def _structured_torch_logs_stay_out_of_pytest():
    """pytest's log capture makes torch write a structured trace of every export, which is eight times slower."""
    logger = logging.getLogger("torch.__trace")
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


_seen = None


def pytest_runtest_setup(item):
    """Exports make much garbage: what other modules and big imports left alive is not searched each time for more.

    And torch reads the source of every ONNX operator anew for each export, a third of its time; here once.
    """
    global _seen
    seen, _seen = _seen, (item.path, len(sys.modules) // 100)
    if seen != _seen:
        gc.collect()
        gc.freeze()
        if "torch" in sys.modules:  # recipes that ran in this process asked for them
            sys.modules["torch"].use_deterministic_algorithms(False)
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    if exporter and not hasattr(exporter.ONNXRegistry.from_torchlib, "cache_info"):
        exporter.ONNXRegistry.from_torchlib = staticmethod(functools.cache(exporter.ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session", autouse=True)
def _layer_times_stay_out_of_the_users_cache(tmp_path_factory):
    """What the planner times, it keeps in a folder of these tests, for their processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOY_SPARSE_LAYER_TIMES", str(tmp_path_factory.mktemp("layer-times")))
        yield


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """(folder, JSON result) of a small run of imp_refill."""
    return finished_once(tmp_path_factory, "imp_refill")


@pytest.fixture(scope="session")
def small_chase_run(tmp_path_factory):
    """(folder, JSON result) of a small run of chase."""
    return finished_once(tmp_path_factory, "chase")


@pytest.fixture(scope="session")
def small_regroup_run(tmp_path_factory):
    """(folder, JSON result) of a small run of imp_regroup, whose format is chosen by timing."""
    return finished_once(tmp_path_factory, "imp_regroup")
