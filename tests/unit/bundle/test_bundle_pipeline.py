"""engines/pipeline.py does what it says: from a compact network's folder to a proved bundle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploy_sparse import api, zoo
from deploy_sparse.bundle import open_bundle
from deploy_sparse.ticket import ModelRef

SCRIPT = Path(__file__).resolve().parents[3] / "engines" / "pipeline.py"


@pytest.fixture
def compact_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = zoo.build("resnet_digits", widths=(4, 4, 4))
    reference = ModelRef("resnet_digits", {"widths": [4, 4, 4]}, (1, 8, 8))
    ticket = api.oneshot_ticket(model, (torch.randn(2, 1, 8, 8),), sparsity=0.5, reference=reference)
    api.compact(ticket).save(tmp_path / "compact")
    return tmp_path / "compact"


def test_it_goes_from_a_compact_network_to_a_proved_bundle(compact_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(compact_folder), str(tmp_path / "shipped")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "ran {'output': (2, 10)}" in done.stdout
    assert re.search(
        r"bundled network.zip and rebuilt: the engine for cpu computes the parity sample: max\|Δ\| 0,", done.stdout
    )
    (engine,) = (tmp_path / "shipped" / "engines").glob("network-cpu-*")
    (rebuilt,) = (tmp_path / "shipped" / "received").glob("network-cpu-*")
    assert engine.name == rebuilt.name
    assert open_bundle(tmp_path / "shipped" / "network.zip").manifest["macs"] > 0


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 40
