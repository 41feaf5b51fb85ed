"""The modules of the surgery scoreboard, which are scripts and no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def board():
    spec = importlib.util.spec_from_file_location("surgery_scoreboard", FOLDER / "surgery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(board):
    return sys.modules["surgery_subject"]


@pytest.fixture(scope="module")
def part(board):
    return sys.modules["surgery_part"]


@pytest.fixture(scope="module")
def table(board):
    return sys.modules["surgery_table"]


@pytest.fixture
def peer(board):
    import surgery_peer

    return surgery_peer
